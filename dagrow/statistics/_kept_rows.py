"""Rows of features that have more entries than there are rows so far: kept as they are, not multiplied.

The products of n rows with d entries are ``d^2`` numbers, of which rows tell all with ``n d``. As soon as a feature has
more rows than entries, its products are summed; of images, whose products take less, or with several folds, as soon as
it has more than half as many.
"""

from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor

from dagrow.solvers import Rows
from dagrow.statistics._captures import Batch
from dagrow.statistics._features import Feature
from dagrow.statistics._heldout_scores import SampleScores

NARROW = 256  #: entries up to which products are summed, however few rows there are
FeaturePair = tuple[Feature, Feature]


class KeptRows:
    """Rows by feature and fold, for the pairs both of whose features have few.

    Args:
        pairs: of features.
        folds: how many.
        batches: how many will come, if that is known; the last may be small.
    """

    def __init__(self, pairs: Iterable[FeaturePair], folds: int, batches: int | None = None) -> None:
        self.pairs, self.folds, self.batches = list(pairs), folds, batches or 1
        self._parts: dict[Feature, list[list[Tensor]]] = {}
        self._room: dict[Feature, int] = {}  #: how many more rows of a feature may be kept

    def count(self, batch: Batch) -> list[FeaturePair]:
        """Counts the rows of a batch, which comes next.

        Args:
            batch: what was left there.

        Returns:
            The pairs that have too many rows with these.
        """
        for feature in dict.fromkeys(feature for pair in self.pairs for feature in pair):
            if feature not in self._room:
                self._room[feature] = _room(feature, batch, self.folds)
                if self._room[feature] < (self.batches - 1) * feature.count(batch):  # too many in the end
                    self._room[feature] = 0
            self._room[feature] -= feature.count(batch)
        return [pair for pair in self.pairs if min(self._room[feature] for feature in pair) < 0]

    def release(self, pairs: Collection[FeaturePair]) -> dict[FeaturePair, tuple[Rows, Rows]]:
        """Keeps rows of pairs no longer.

        Args:
            pairs: that are kept.

        Returns:
            The rows that there are.
        """
        released = self._of(pairs)
        self.pairs = [pair for pair in self.pairs if pair not in pairs]
        needed = {feature for pair in self.pairs for feature in pair}
        self._parts = {feature: parts for feature, parts in self._parts.items() if feature in needed}
        return released

    def take(self, batch: Batch) -> None:
        """Keeps the rows of a batch."""
        for feature in dict.fromkeys(feature for pair in self.pairs for feature in pair):
            parts = self._parts.setdefault(feature, [[] for _ in range(self.folds)])
            rows = feature.rows(batch)
            rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
            by_sample = rows.view(batch.samples, -1, rows.shape[1])
            for fold, samples in batch.fold_slices:
                parts[fold].append(by_sample[samples].flatten(0, 1).clone())

    def rows(self) -> dict[FeaturePair, tuple[Rows, Rows]]:
        """The rows of all pairs that are kept."""
        return self._of(self.pairs)

    def _of(self, pairs: Collection[FeaturePair]) -> dict[FeaturePair, tuple[Rows, Rows]]:
        features = {feature for pair in pairs for feature in pair} & self._parts.keys()
        rows = {f: Rows([_joined(parts, self._parts[f]) for parts in self._parts[f]]) for f in features}
        return {(x, y): (rows[x], rows[y]) for x, y in pairs if x in rows}


def _room(feature: Feature, batch: Batch, folds: int) -> int:
    """How many rows of a feature may be kept."""
    if isinstance(feature, SampleScores):
        return 0
    is_cheap = folds > 1 or any(batch[edge].is_image for edge in feature.edges)
    return most_rows(feature.entries(batch.subset(slice(0, 1))), is_cheap)


def most_rows(entries: int, is_cheap: bool) -> int:
    """Up to how many rows products are dearer than rows.

    Args:
        entries: of a row.
        is_cheap: whether products take less: of images, or where those of all other folds are sums, while each fold
            takes a Gram of rows of its own.

    Returns:
        As many as there are entries, or half of that, or none of a narrow feature.
    """
    return entries // (1 + is_cheap) if entries > NARROW else 0


def _joined(parts: Sequence[Tensor], folds: Sequence[Sequence[Tensor]]) -> Tensor:
    """The rows of a fold, which may have none."""
    first = next(part for other in folds for part in other)
    return torch.cat([*parts]) if parts else first.new_empty(0, first.shape[1])
