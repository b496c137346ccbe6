"""Sums of products of features over batches, kept in folds of samples."""

import functools
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence

import torch
from torch import Tensor

from dagrow.errors import BatchError, LossError
from dagrow.solvers import Moments, Pair, add_gram, complete, distinct
from dagrow.statistics._captures import Batch
from dagrow.statistics._features import Feature
from dagrow.statistics._products import product

FLUSH_ROWS = 2048  #: rows are collected up to this number before they are multiplied
ALIGNED = 16  #: rows start at multiples of so many entries, which makes products faster
FeaturePair = tuple[Feature, Feature]


def _features_of(pair: Pair) -> FeaturePair:
    """A pair of features; moments have keys of any kind."""
    x, y = pair
    assert isinstance(x, Feature)
    assert isinstance(y, Feature)
    return x, y


def _kind(values: Tensor) -> torch.dtype:
    """The type that products are taken in: at least single precision."""
    return torch.promote_types(values.dtype, torch.float32)


class MomentAccumulator:
    """Accumulators. Rows of layers without space wait in a buffer, so that products are large and few; images are
    products enough."""

    def __init__(self, pairs: Iterable[Pair], folds: int, dtype: torch.dtype) -> None:
        self.pairs = [_features_of(pair) for pair in distinct(pairs)]
        self.folds, self.dtype = folds, dtype
        self.loss, self.seen = 0.0, 0
        self.totals: dict[FeaturePair, Tensor] = {}
        self.waiting: list[tuple[int, dict[Feature, Tensor]]] = []
        self.rows = 0
        self.positions: dict[Feature, int] = defaultdict(int)
        self.resolution = 0.0

    def add(self, batch: Batch, loss: float) -> None:
        """A batch of n samples."""
        for feature in dict.fromkeys(f for pair in self.pairs for f in pair):
            feature.check(batch)
            count = feature.count(batch)
            if count % batch.samples or any(
                batch[e].spatial and len(batch[e].inputs) % batch.samples for e in feature.edges
            ):
                raise BatchError(
                    f"a layer sees {count} rows for {batch.samples} samples; samples must be the first dimension."
                )
            self.positions[feature] += count
        self.check_rows(batch)
        for capture in batch.captures.values():
            self.resolution = max(self.resolution, torch.finfo(_kind(capture.inputs)).eps)
        self.loss, self.seen = self.loss + loss, self.seen + batch.samples
        images = [pair for pair in self.pairs if any(batch[edge].spatial for f in pair for edge in f.edges)]
        for pair in images:  # many rows a batch: products enough, and kept as they come
            found = product(*pair, batch)
            if pair in self.totals:
                self.totals[pair] += found
            else:
                self.totals[pair] = found
        self.wait([pair for pair in self.pairs if pair not in images], batch)

    def check_rows(self, batch: Batch) -> None:
        for x, y in self.pairs:
            if x.count(batch) != y.count(batch):
                n = batch.samples
                raise BatchError(
                    f"layer {', '.join(x.edges)} has {x.count(batch) // n} positions in a sample of this batch, layer "
                    f"{', '.join(y.edges)} {y.count(batch) // n}, otherwise than in the example; trace with such a "
                    "batch."
                )

    def total(self, pair: FeaturePair, dx: int, dy: int, device: torch.device) -> Tensor:
        """The sums of a pair ``[F, dx, dy]``."""
        if pair not in self.totals:
            self.totals[pair] = torch.zeros(self.folds, dx, dy, dtype=self.dtype, device=device)
        return self.totals[pair]

    def wait(self, pairs: Sequence[FeaturePair], batch: Batch) -> None:
        """Puts the rows ``[n s, d]`` of pairs into the buffer."""
        found = {f: f.rows(batch) for pair in pairs for f in pair}
        kind = functools.reduce(torch.promote_types, (values.dtype for values in found.values()), torch.float32)
        rows = {f: values.to(kind).view(batch.samples, -1, values.shape[1]) for f, values in found.items()}
        if rows:
            self.waiting.append((batch.seen, rows))
            self.rows += max(values.shape[:2].numel() for values in rows.values())
        if self.rows >= FLUSH_ROWS * self.folds:
            self.flush()

    def flush(self) -> None:
        """Multiplies what is waiting."""
        features = list(self.waiting[0][1])
        for fold in range(self.folds):
            joined = {f: self.joined(f, fold) for f in features}
            for x, y in self.pairs:
                if x not in joined or y not in joined:
                    continue
                total = self.total((x, y), joined[x].shape[1], joined[y].shape[1], joined[x].device)[fold]
                if x == y:
                    add_gram(total, joined[x])
                else:
                    total += joined[x].T @ joined[y]
            del joined  # before the next fold's
        self.waiting, self.rows = [], 0

    def joined(self, feature: Feature, fold: int) -> Tensor:
        """The fold's rows of all waiting batches; samples go round-robin into folds."""
        parts = [rows[feature][(fold - start) % self.folds :: self.folds] for start, rows in self.waiting]
        counts, width = [part.shape[:2].numel() for part in parts], parts[0].shape[2]
        out = parts[0].new_empty(sum(counts), -(-width // ALIGNED) * ALIGNED)[:, :width]
        for part, rows in zip(parts, out.split(counts), strict=True):
            rows.unflatten(0, part.shape[:2]).copy_(part)
        return out

    def moments(self, forward: bool) -> Moments:
        if self.seen < self.folds:
            raise BatchError(f"there are {self.seen} samples for {self.folds} folds; give more samples, or folds=1.")
        if self.waiting:
            self.flush()
        for (x, y), total in self.totals.items():
            if x == y:
                complete(total)
            self.check(x, y, total)
        counts = torch.tensor([len(range(fold, self.seen, self.folds)) for fold in range(self.folds)])
        positions: dict[Hashable, float] = {f: count / self.seen for f, count in self.positions.items()}
        sums: dict[Pair, Tensor] = {(x, y): total for (x, y), total in self.totals.items()}
        return Moments(counts, sums, positions, self.resolution, self.loss / self.seen, forward)

    @staticmethod
    def check(x: Feature, y: Feature, total: Tensor) -> None:
        """A number that is none shows in the first row or column, one that is too large on the diagonal."""
        seen = [total[:, :1], total[:, :, :1], total.diagonal(dim1=1, dim2=2)]
        if not all(bool(torch.isfinite(part).all()) for part in seen):
            raise LossError(
                f"what layers {', '.join(dict.fromkeys((*x.edges, *y.edges)))} read, or the gradients there, are not "
                "finite, or too large for their type when squared, although the loss is finite. Look for infinite "
                "inputs, for square roots and norms of zero in the loss, and scale large inputs."
            )
