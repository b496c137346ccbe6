"""What the places of an axis have in common: moments of what its consumers read and want, and moves fitted to these."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

from torch import Tensor

from dagrow.graph import Axis, Edge
from dagrow.solvers import FoldSplit, Moments, MomentView, Pair, Regression, with_cross_validated_ridge
from dagrow.statistics import InputFeatures, OutputGoal, ResidualGoal


def reads_of(consumer: Edge) -> InputFeatures | None:
    """What a consumer's own weights can use: nothing if they are frozen."""
    return InputFeatures(consumer.name, consumer.bias) if consumer.trainable else None


def own_pairs(consumer: Edge) -> list[Pair]:
    """What the move of a consumer's own weights is fitted to, if they are not frozen."""
    reads = reads_of(consumer)
    return [] if reads is None else [(reads, reads), (reads, OutputGoal(consumer.name))]


@dataclass(eq=False)
class AxisMoments:
    """Moments that the places of an axis were sent, with factors of them and fits to them.

    Attributes:
        axis: the axis.
        m: the moments.
        project: whether what consumers' own weights can follow is left out.
    """

    axis: Axis
    m: Moments
    project: bool
    _ridges: dict[str, float] = field(default_factory=dict)
    _residuals: dict[tuple[str, float], ResidualGoal] = field(default_factory=dict)

    def view(self, ridge: float, *, cancels: bool) -> MomentView:
        """All samples; rounded where that does not matter: all that is solved has a ridge, and nothing cancels.

        Args:
            ridge: of what is solved; what consumers read has one too, where there are several folds.
            cancels: whether differences of large numbers are taken.

        Returns:
            The moments.
        """
        return self.m.rounded if ridge and self.m.folds > 1 and not cancels else self.m

    @cached_property
    def split(self) -> FoldSplit:
        """For each fold the moments of all others and its own."""
        return self.m.split()

    @cached_property
    def known(self) -> Moments:
        """Those of what consumers read and want, as far as they were measured."""
        return self.m.only([pair for consumer in self.axis.consumers for pair in own_pairs(consumer)])

    def ridge(self, consumer: Edge) -> float:
        """That of the regression on what a consumer reads."""
        if consumer.name not in self._ridges:
            reads = reads_of(consumer)
            own = Regression(reads, reads, OutputGoal(consumer.name), project=self.project)
            self._ridges[consumer.name] = with_cross_validated_ridge(self.split, own).ridge
        return self._ridges[consumer.name]

    def taken(self, consumer: Edge, ridge: float, fits: Sequence[Tensor]) -> list[Tensor]:
        """What moves that were fitted on the other folds take out of combinations of goals.

        Args:
            consumer: with weights that train.
            ridge: of the fits.
            fits: for each fold the combinations ``X [o, k]``.

        Returns:
            For each fold ``dW^T X [i, k]``, at less expense than dW where k is small.
        """
        reads, goal = reads_of(consumer), OutputGoal(consumer.name)
        trains = [train for train, _ in self.split]
        return [
            view.whitening(reads, ridge).solve(view.product(reads, goal) @ x.to(view.product(reads, reads).diagonal()))
            for view, x in zip(trains, fits, strict=True)
        ]

    def residual(self, consumer: Edge, ridge: float) -> OutputGoal | ResidualGoal:
        """What is to be explained at a consumer: what a move leaves that was fitted on the other folds."""
        reads, goal, key = reads_of(consumer), OutputGoal(consumer.name), (consumer.name, ridge)
        if not self.project or reads is None:
            return goal
        if key not in self._residuals:
            views = [self.m] if self.m.folds == 1 else [train for train, _ in self.split]
            moves = [view.whitening(reads, ridge).solve(view[reads, goal]).T for view in views]
            self._residuals[key] = ResidualGoal(goal, reads, moves)
        return self._residuals[key]


#: from an axis, moments, and others of the same samples that were known before
ByAxis = Callable[[Axis, Moments, Moments | None], AxisMoments]


def by_axis(*, project: bool) -> ByAxis:
    """Moments as the places of an axis use them, who go on one after the other: those of the last are the next one's.

    Factors are large, so that they are held of one axis at a time.

    Args:
        project: whether what consumers' own weights can follow is left out.

    Returns:
        A function that gives the same for the same arguments as last time.
    """

    @lru_cache(maxsize=1)
    def shared(axis: Axis, m: Moments, known: Moments | None) -> AxisMoments:
        return AxisMoments(axis, m if known is None else known.joined(m), project)

    return shared
