"""Sums of products of features over batches, kept in folds of samples."""

import functools
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dagrow.errors import BatchError, GrowthError, LossError
from dagrow.layers import with_constant
from dagrow.solvers import Moments, Pair, complete, distinct
from dagrow.statistics._captures import Batch
from dagrow.statistics._features import Feature
from dagrow.statistics._heldout_scores import SampleScores
from dagrow.statistics._kept_captures import LeftBatch
from dagrow.statistics._kept_rows import FeaturePair, KeptRows, most_rows
from dagrow.statistics._limits import SOLVING, Limits
from dagrow.statistics._products import add_product, product
from dagrow.statistics._waiting_batches import WaitingBatches

FLUSH_ROWS = 2048  #: rows are collected up to this number before they are multiplied
ALIGNED = 16  #: rows start at multiples of so many entries, which makes products faster


@dataclass(frozen=True)
class _BufferedRows:
    """The rows of a batch by sample ``[n, s, d]``, and the samples of each fold."""

    rows: dict[Feature, Tensor]
    samples: dict[int, slice]

    def of_fold(self, feature: Feature, fold: int) -> Tensor:
        return self.rows[feature][self.samples.get(fold, slice(0))]


class MomentAccumulator:
    """Adds up products of features, batch after batch.

    Rows of layers without space wait in a buffer, so that products are large and few; and so do images whose products
    are more numbers than they are themselves.

    Args:
        pairs: of features.
        folds: how many.
        dtype: of sums without space.
        limits: of memory and time.
        batches: how many will come, or at most so many.
        is_known: whether so many do come.
    """

    def __init__(
        self,
        pairs: Iterable[Pair],
        folds: int,
        dtype: torch.dtype,
        limits: Limits | None = None,
        batches: int | None = None,
        *,
        is_known: bool = True,
    ) -> None:
        self.pairs = [_features_of(pair) for pair in distinct(pairs)]
        self.features = list(dict.fromkeys(feature for pair in self.pairs for feature in pair))
        self.folds, self.dtype, self.limits, self.batches = folds, dtype, limits or Limits(), batches
        self.sums: dict[FeaturePair, Tensor] = {}
        self.positions: dict[Feature, int] = defaultdict(int)
        self.loss, self.samples, self.resolution = 0.0, 0, 0.0
        self.kept, self.waiting = KeptRows(self.pairs, folds, batches if is_known else None), WaitingBatches()
        self.buffer: list[_BufferedRows] = []
        self.buffered_rows = 0
        self.counts: Tensor | None = None
        self.units = 0
        self.forward, self.marks = True, list[int | None]()
        self.group_scores: dict[Feature, Tensor] = {}

    def take(self, batch: LeftBatch) -> None:
        """Adds what a batch left."""
        views = [Batch(dict(view), batch.samples, self.samples, self.folds) for view in batch.views]
        self.add(views, batch.loss, batch.units)
        self.forward = self.forward and batch.ran
        self.marks.append(batch.mark)

    def add(self, views: Sequence[Batch], loss: float, units: Tensor | None = None) -> None:
        """Adds what calls of the model on one batch left, and the sum of its samples' losses.

        Args:
            views: one for each kind of sizes that there were.
            loss: the sum.
            units: the number of the group that each sample is of, if samples are not independent units themselves.
        """
        samples = views[0].samples
        parts = [(view, None) for view in views] if units is None else self._grouped(views, units)
        for view in views:
            for feature in self.features:
                feature.check_sizes(view)
            for capture in view.captures.values():
                self.resolution = max(self.resolution, torch.finfo(_product_type(capture.inputs.dtype)).eps)
        scored = (
            [x for x, _ in self.pairs if isinstance(x, SampleScores)] if len(parts) > 1 or units is not None else []
        )
        pairs = [pair for pair in self.pairs if pair[0] not in scored]
        for part, _ in parts:
            for feature in self.features:
                self.positions[feature] += _checked_count(feature, part)
            self._check_positions(part)
            if not self.samples and part is parts[0][0]:
                self._check_room([each for each, _ in parts])
            self._add(pairs, part, alone=len(parts) == 1 and units is None)
        for scores in scored:
            self._score(scores, parts)
        self.loss, self.samples = self.loss + loss, self.samples + samples

    def _check_room(self, parts: Sequence[Batch]) -> None:
        """Before anything is summed: what all will take, as far as the first batch tells."""
        batch = parts[0]
        entries = {f: 0 if isinstance(f, SampleScores) else f.entries(batch.subset(slice(0, 1))) for f in self.features}
        needed, kept, captures = dict[FeaturePair, float](), set[Feature](), [*batch.captures.values()]
        for pair in self.pairs:
            x, y = (entries[feature] for feature in pair)
            rows = sum(pair[0].count(part) for part in parts) * (self.batches or 1)
            own = _product_type(*(batch[edge].inputs.dtype for feature in pair for edge in feature.edges)).itemsize
            if rows <= most_rows(min(x, y), self.folds > 1 or _have_space(pair, batch)):
                needed[pair] = own * rows * sum(entries[feature] for feature in {*pair} - kept)
                kept.update(pair)
                continue
            itemsize = own if _have_space(pair, batch) else self.dtype.itemsize
            needed[pair] = x * y * (self.folds * itemsize + (SOLVING * 8 if pair[0] == pair[1] else 0))
        if captures:
            self.limits.check_memory(needed, captures[0].inputs.device, self.folds)

    def _grouped(self, views: Sequence[Batch], units: Tensor) -> list[tuple[Batch, Tensor | None]]:
        """The samples of each fold, and the number of the group that each is of."""
        counts = torch.bincount(units % self.folds, minlength=self.folds)
        self.counts = counts if self.counts is None else self.counts + counts
        self.units = max(self.units, int(units.max()) + 1)
        if len(units.unique()) == 1:  # one unit, whatever becomes of its samples
            whole, fold = units[:1], int(units[0]) % self.folds
            return [(replace(view, samples=1, seen=0, only=fold), whole) for view in views]
        folds = [(fold, torch.nonzero(units % self.folds == fold).flatten()) for fold in range(self.folds)]
        return [(view.of_fold(which, fold), units[which]) for view in views for fold, which in folds if len(which)]

    def _score(self, scores: Feature, parts: Sequence[tuple[Batch, Tensor | None]]) -> None:
        """Adds scores of samples, of all views together, or keeps those of groups, which go on in other batches."""
        rows = [scores.rows(part) for part, _ in parts]
        if parts[0][1] is None:
            total = torch.stack(rows).sum(0)
            total[:, -1] = 1
            add_product(self._sums_of(scores, scores, total, total)[0], total, total)
            return
        table = self.group_scores.setdefault(scores, rows[0].new_zeros(0, rows[0].shape[1]))
        table = torch.cat([table, table.new_zeros(self.units - len(table), table.shape[1])])
        for (_, units), values in zip(parts, rows, strict=True):
            assert units is not None
            table.index_add_(0, units.to(table.device), values)
        self.group_scores[scores] = table

    def _add(self, pairs: Sequence[FeaturePair], batch: Batch, alone: bool) -> None:
        """Adds products of rows, position by position, or keeps the rows, or what the batch left."""
        self._release(self.kept.count(batch), batch)
        self.kept.take(batch)
        summed = [pair for pair in pairs if pair not in self.kept.pairs]
        of_images = [pair for pair in summed if _have_space(pair, batch)]
        without_space = [pair for pair in summed if pair not in of_images]
        if alone and not self.samples:
            self.waiting.begin(of_images, batch)
        for joined in self.waiting.add(batch) if alone else self.waiting.rest():
            self._multiply(self.waiting.pairs, joined)
        self._multiply([pair for pair in of_images if not alone or pair not in self.waiting.pairs], batch)
        if without_space:
            self._collect(without_space, batch)

    def _multiply(self, pairs: Sequence[FeaturePair], batch: Batch) -> None:
        """Adds products of images."""
        for x, y in pairs:
            if (x, y) in self.sums:  # many rows a batch: products enough, and kept as they come
                self.sums[x, y] += product(x, y, batch)
            else:
                self.sums[x, y] = product(x, y, batch)

    def _release(self, pairs: Sequence[FeaturePair], batch: Batch) -> None:
        """Multiplies the rows that were kept of pairs which have too many by now."""
        if pairs and self.buffer:
            self._flush()
        for pair, (x, y) in self.kept.release(pairs).items():
            sums = torch.stack(x.products(y))
            self.sums[pair] = sums if _have_space(pair, batch) else sums.to(self.dtype)

    def _check_positions(self, batch: Batch) -> None:
        n = batch.samples
        for x, y in self.pairs:
            calls = {edge: len(batch[edge].runs) for feature in (x, y) for edge in feature.edges}
            if len(set(calls.values())) > 1:
                told = ", ".join(f"{edge} {count}" for edge, count in calls.items())
                raise GrowthError(
                    f"layers were called in different numbers on a batch ({told}), so which of their calls belong "
                    "together cannot be told. Call the whole model as often as needed, or once on all inputs together; "
                    "if the number of calls follows from the batch, trace with a batch as they are."
                )
            if x.count(batch) != y.count(batch):
                raise BatchError(
                    f"layer {', '.join(x.edges)} has {x.count(batch) // n} positions in a sample of this batch, layer "
                    f"{', '.join(y.edges)} {y.count(batch) // n}, otherwise than in the example. Trace with a "
                    "batch as they are; where they differ among themselves, pad or crop them to one size."
                )

    def _collect(self, pairs: Sequence[FeaturePair], batch: Batch) -> None:
        """Puts the rows of pairs into the buffer, all in one type, and empties it when it is full."""
        rows = {feature: feature.rows(batch) for pair in pairs for feature in pair}
        dtype = _product_type(*(values.dtype for values in rows.values()))
        by_sample = {f: values.to(dtype).view(batch.samples, -1, values.shape[1]) for f, values in rows.items()}
        self.buffer.append(_BufferedRows(by_sample, dict(batch.fold_slices)))
        self.buffered_rows += max(values.shape[:2].numel() for values in by_sample.values())
        if self.buffered_rows >= FLUSH_ROWS * self.folds:
            self._flush()

    def _flush(self) -> None:
        """Multiplies what is in the buffer."""
        for fold in range(self.folds):
            rows = {feature: self._rows_of(feature, fold) for feature in self.buffer[0].rows}
            for x, y in self.pairs:
                if x in rows and y in rows and (x, y) not in self.kept.pairs:
                    add_product(self._sums_of(x, y, rows[x], rows[y])[fold], rows[x], rows[y])
            del rows  # before the next fold's
        self.buffer, self.buffered_rows = [], 0

    def _rows_of(self, feature: Feature, fold: int) -> Tensor:
        """The fold's rows of all batches in the buffer ``[n s, d]``."""
        parts = [batch.of_fold(feature, fold) for batch in self.buffer]
        counts, width = [part.shape[:2].numel() for part in parts], parts[0].shape[2]
        rows = parts[0].new_empty(sum(counts), -(-width // ALIGNED) * ALIGNED)[:, :width]
        for part, target in zip(parts, rows.split(counts), strict=True):
            target.unflatten(0, part.shape[:2]).copy_(part)
        return rows

    def _sums_of(self, x: Feature, y: Feature, x_rows: Tensor, y_rows: Tensor) -> Tensor:
        """The sums of a pair ``[F, dx, dy]``, which begin at zero."""
        if (x, y) not in self.sums:
            shape = self.folds, x_rows.shape[1], y_rows.shape[1]
            self.sums[x, y] = torch.zeros(shape, dtype=self.dtype, device=x_rows.device)
        return self.sums[x, y]

    def moments(self) -> Moments:
        """The moments of all samples."""
        units, kind = (self.samples, "samples") if self.counts is None else (self.units, "groups of samples")
        if units < self.folds:
            raise BatchError(f"there are {units} {kind} for {self.folds} folds; give more {kind}, or folds=1.")
        if self.buffer:
            self._flush()
        for joined in self.waiting.rest():
            self._multiply(self.waiting.pairs, joined)
        kept = self.kept.rows()
        for (x, y), sides in kept.items():
            _check_finite(x, y, [part.square().sum(0) for side in sides for part in side.folds])
        for scores, table in self.group_scores.items():  # a mean over groups, and the same over samples
            rows = with_constant(table[:, :-1] * (units / self.samples), True)
            add_product(self._sums_of(scores, scores, rows, rows)[0], rows, rows)
        for (x, y), sums in self.sums.items():
            if x == y:
                complete(sums)
            _check_finite(x, y, [sums[:, :1], sums[:, :, :1], sums.diagonal(dim1=1, dim2=2)])
        counts = self.counts
        if counts is None:
            counts = torch.tensor([len(range(fold, self.samples, self.folds)) for fold in range(self.folds)])
        positions: dict[Hashable, float] = {feature: rows / self.samples for feature, rows in self.positions.items()}
        return Moments(
            counts,
            dict(self.sums.items()),
            positions,
            self.resolution,
            self.loss / self.samples,
            self.forward,
            dict(kept.items()),
            None if None in self.marks else tuple(self.marks),
            None
            if self.counts is None
            else torch.tensor([len(range(f, units, self.folds)) for f in range(self.folds)]),
        )


def _features_of(pair: Pair) -> FeaturePair:
    """A pair of features; moments have keys of any kind."""
    x, y = pair
    assert isinstance(x, Feature)
    assert isinstance(y, Feature)
    return x, y


def _product_type(*dtypes: torch.dtype) -> torch.dtype:
    """The type that products are taken in: at least single precision."""
    return functools.reduce(torch.promote_types, dtypes, torch.float32)


def _checked_count(feature: Feature, batch: Batch) -> int:
    """The rows of a feature, which are as many for each sample."""
    count, n = feature.count(batch), batch.samples
    captures = [batch[edge] for edge in feature.edges]
    if count % n or any(capture.is_image and len(capture.inputs) % n for capture in captures):
        raise BatchError(f"a layer sees {count} rows for {n} samples; samples must be the first dimension.")
    return count


def _have_space(pair: FeaturePair, batch: Batch) -> bool:
    """Whether rows of a pair come from images."""
    return any(batch[edge].is_image for feature in pair for edge in feature.edges)


def _check_finite(x: Feature, y: Feature, entries: Sequence[Tensor]) -> None:
    """A number that is none shows in the first row or column, one that is too large on the diagonal."""
    if not all(bool(torch.isfinite(part).all()) for part in entries):
        raise LossError(
            f"what layers {', '.join(dict.fromkeys((*x.edges, *y.edges)))} read, or the gradients there, are not "
            "finite, or too large for their type when squared, although the loss is finite. Look for infinite "
            "inputs, for square roots and norms of zero in the loss, and scale large inputs."
        )
