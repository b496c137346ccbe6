"""Second moments of features and goals, kept in folds of samples.

With ``E`` a mean over samples of sums over positions, and rows ``x [n s, dx]``, ``y [n s, dy]``, the moment of
``(x, y)`` is ``E x y^T [dx, dy]``. Moments add; they are kept in folds by sample, so that anything fitted on them
can be validated on samples that it has not seen, at no extra pass.
"""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from dagrow.solvers._linalg import Whitening, whitening
from dagrow.solvers._row_products import Product, RowProduct, Rows, dense

KEPT_RIDGES = 2  #: of each feature, whose factors are kept: they are as large as its Gram
Pair = tuple[Hashable, Hashable]  #: of features


def distinct(pairs: Iterable[Pair]) -> list[Pair]:
    """Each pair once, in one order only.

    Args:
        pairs: of features, in any order.

    Returns:
        The pairs in the order and the direction in which they came first.
    """
    unique: dict[Pair, None] = {}
    for x, y in pairs:
        if (y, x) not in unique:
            unique[x, y] = None
    return list(unique)


class MomentView(ABC):
    """Moments of some samples, and factors of them; each is computed when it is first asked for.

    Attributes:
        resolution: relative precision of the products that were summed.
    """

    resolution: float

    @property
    @abstractmethod
    def samples(self) -> int:
        """How many."""

    @abstractmethod
    def holds(self, pair: Pair) -> bool:
        """Whether the pair was measured, in this order."""

    @abstractmethod
    def mean(self, pair: Pair) -> Product:
        """``E x y^T`` ``[dx, dy]``, computed anew, of a pair that is held in this order."""

    @cached_property
    def _means(self) -> dict[Pair, Product]:
        return {}

    @cached_property
    def _whitenings(self) -> dict[Hashable, dict[float, Whitening]]:
        return {}

    def __contains__(self, pair: Pair) -> bool:
        return self.holds(pair) or self.holds(pair[::-1])

    def __getitem__(self, pair: Pair) -> Tensor:
        """``E x y^T`` ``[dx, dy]``."""
        return dense(self.product(*pair))

    def product(self, x: Hashable, y: Hashable) -> Product:
        """``E x y^T`` ``[dx, dy]``, by rows where these are few.

        Args:
            x: a feature.
            y: another, or the same.

        Returns:
            The same for every call.
        """
        if not self.holds((x, y)) and self.holds((y, x)):
            return self.product(y, x).T
        if (x, y) not in self._means:
            self._means[x, y] = self.mean((x, y))
        return self._means[x, y]

    def whitening(self, feature: Hashable, ridge: float = 0.0) -> Whitening:
        """A whitening of ``E x x^T``.

        Args:
            feature: x.
            ridge: relative to each feature's second moment.

        Returns:
            The same for every call with the ridge that it had last, or the one before.
        """
        by_ridge = self._whitenings.setdefault(feature, {})
        if ridge not in by_ridge:
            if len(by_ridge) == KEPT_RIDGES:
                del by_ridge[next(iter(by_ridge))]
            by_ridge[ridge] = whitening(self.product(feature, feature), ridge, self.resolution)
        return by_ridge[ridge]


@dataclass(eq=False)
class Moments(MomentView):
    """Sums over samples of ``x y^T``, per fold.

    Attributes:
        counts: samples in each fold ``[F]``.
        sums: pair of features -> sums ``[F, dx, dy]``.
        rows: pair of features -> their rows, where these are fewer than entries.
        positions: feature -> rows per sample.
        resolution: relative precision of the products that were summed.
        loss: mean over samples of the loss.
        forward: whether the model's own forward ran on every batch.
        mark: by which the samples and their order are known again; None if they cannot be.
        groups: of samples in each fold ``[F]``; None where each sample is independent of all others.
    """

    counts: Tensor
    sums: dict[Pair, Tensor]
    positions: dict[Hashable, float]
    resolution: float
    loss: float = 0.0
    forward: bool = True
    rows: dict[Pair, tuple[Rows, Rows]] = field(default_factory=dict)
    mark: Hashable = None
    groups: Tensor | None = None

    @property
    def folds(self) -> int:
        return len(self.counts)

    @property
    def samples(self) -> int:
        return int(self.counts.sum())

    def holds(self, pair: Pair) -> bool:
        return pair in self.sums or pair in self.rows

    def mean(self, pair: Pair) -> Product:
        if pair in self.rows:
            return self.by_rows(pair, range(self.folds), torch.float64, self.samples)
        return self.sums[pair].sum(0, dtype=torch.float64).div_(self.samples)

    def by_rows(self, pair: Pair, folds: Sequence[int], dtype: torch.dtype, samples: int) -> RowProduct:
        """The product of a pair whose rows were kept, in some folds."""
        x, y = self.rows[pair]
        joined = x.joined(folds, dtype)
        return RowProduct(joined, joined if y is x else y.joined(folds, dtype), samples)

    def __add__(self, other: "Moments") -> "Moments":
        rows = {pair: self._rows_with(other, pair) for pair in self.rows if pair in other.rows}
        sums = {pair: self.by_fold(pair) + other.by_fold(pair) for pair in (*self.sums, *self.rows) if pair not in rows}
        share = self.samples / (self.samples + other.samples)
        positions = {f: share * count + (1 - share) * other.positions[f] for f, count in self.positions.items()}
        loss = share * self.loss + (1 - share) * other.loss
        resolution, forward = max(self.resolution, other.resolution), self.forward and other.forward
        groups = None if self.groups is None or other.groups is None else self.groups + other.groups
        return Moments(self.counts + other.counts, sums, positions, resolution, loss, forward, rows, groups=groups)

    def _rows_with(self, other: "Moments", pair: Pair) -> tuple[Rows, Rows]:
        x, y = (mine + theirs for mine, theirs in zip(self.rows[pair], other.rows[pair], strict=True))
        return (x, x) if pair[0] == pair[1] else (x, y)

    def by_fold(self, pair: Pair) -> Tensor:
        """The sums over samples of each fold.

        Args:
            pair: of features, in the order in which they were measured.

        Returns:
            ``[F, dx, dy]``.
        """
        return self.sums[pair] if pair in self.sums else torch.stack(self.rows[pair][0].products(self.rows[pair][1]))

    def joined(self, other: "Moments") -> "Moments":
        """These moments and others of the same samples.

        Args:
            other: with the same counts.

        Returns:
            All pairs of both.
        """
        positions = {**self.positions, **other.positions}
        sums, forward = {**self.sums, **other.sums}, self.forward and other.forward
        resolution, rows = max(self.resolution, other.resolution), {**self.rows, **other.rows}
        return replace(self, sums=sums, positions=positions, resolution=resolution, forward=forward, rows=rows)

    def only(self, pairs: Iterable[Pair]) -> "Moments":
        """These moments of some pairs.

        Args:
            pairs: in the order in which they were measured, or in the other one.

        Returns:
            All of them that there are.
        """
        wanted = {ordered for x, y in pairs for ordered in ((x, y), (y, x))}
        sums = {pair: sums for pair, sums in self.sums.items() if pair in wanted}
        rows = {pair: rows for pair, rows in self.rows.items() if pair in wanted}
        features = {feature for pair in (*sums, *rows) for feature in pair}
        positions = {feature: count for feature, count in self.positions.items() if feature in features}
        return replace(self, sums=sums, positions=positions, rows=rows)

    @cached_property
    def rounded(self) -> "FoldView":
        """All samples, no more precise than the activations were: for fits with a ridge, at a fifth of the expense."""
        return FoldView(self, None, True, self.resolution)

    def split(self) -> "FoldSplit":
        """For each fold the moments of all others and its own, no more precise than the activations were.

        Returns:
            Pairs of views ``(others, own)``; nothing is summed before it is asked for.
        """
        return [
            (FoldView(self, fold, True, self.resolution), FoldView(self, fold, False, self.resolution))
            for fold in range(self.folds)
        ]


@dataclass(eq=False)
class FoldView(MomentView):
    """Moments of one fold, or of all others.

    Attributes:
        whole: the moments of all folds.
        fold: its index; None for no fold.
        others: whether the view is of all folds but this one.
    """

    whole: Moments
    fold: int | None
    others: bool
    resolution: float

    @cached_property
    def samples(self) -> int:
        own = 0 if self.fold is None else int(self.whole.counts[self.fold])
        return self.whole.samples - own if self.others else own

    @property
    def units(self) -> int:
        """How many independent ones: groups of samples, or samples."""
        counts = self.whole.counts if self.whole.groups is None else self.whole.groups
        own = 0 if self.fold is None else int(counts[self.fold])
        return int(counts.sum()) - own if self.others else own

    def holds(self, pair: Pair) -> bool:
        return self.whole.holds(pair)

    def mean(self, pair: Pair) -> Product:
        dtype = torch.float32 if self.resolution > torch.finfo(torch.float64).eps else torch.float64
        if pair in self.whole.rows:
            folds = [fold for fold in range(self.whole.folds) if (fold != self.fold) == self.others]
            return self.whole.by_rows(pair, folds, dtype, self.samples)
        sums = self.whole.sums[pair]
        if not self.others and self.fold is not None:
            return (sums[self.fold] / self.samples).to(dtype)
        first, *rest = [total for fold, total in enumerate(sums) if fold != self.fold]
        total = first / self.samples
        for other in rest:  # what is zero in all of them stays so, as it would not if the fold were subtracted
            total.add_(other, alpha=1 / self.samples)
        return total.to(dtype)


FoldSplit = list[tuple[FoldView, FoldView]]  #: for each fold the moments of all others and its own
