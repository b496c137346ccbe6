"""What an operator is: it names candidates, and a candidate turns moments into a growth.

An operator is a small frozen value. It never touches hooks or parameters: a candidate says which moments it needs,
gets them measured, and returns what is to be inserted.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dagrow.axes import WideningPlan
from dagrow.errors import GrowthError, check_real, check_whole
from dagrow.graph import Axis, Dag
from dagrow.solvers import Moments, Pair, Verdict
from dagrow.statistics import Objective, SampleScores
from dagrow.surgery import Draft, Growth


class Candidate(ABC):
    """One place where an operator could grow."""

    @property
    def tests(self) -> int:
        """How often it looks for something that may be chance, for the correction of p-values: once; many times if it
        stands for many places; not at all if it does not ask."""
        return 1

    @abstractmethod
    def pairs(self) -> Iterable[Pair]:
        """The moments that it needs."""

    @abstractmethod
    def solve(self, moments: Moments, objective: Objective) -> "Growth | Candidate | Sequence[Candidate] | None":
        """A growth, further candidates or stages that need moments of their own, or None if there is nothing to add."""


@dataclass(frozen=True, eq=False)
class Judged(Candidate):
    """A fitted growth, of which one more pass tells what fits on the other folds explain of each sample.

    Attributes:
        growth: but for its held-out gain.
        scores: those of all that is fitted.
        z: as it was found before, where the fits that are scored depend on all samples.
        tested: whether chance is asked about.
    """

    growth: Growth
    scores: SampleScores
    z: float | None = None
    tested: bool = True

    def pairs(self) -> list[Pair]:
        return [(self.scores, self.scores)]

    def solve(self, moments: Moments, objective: Objective) -> Growth:
        verdict = Verdict.of(moments.sums[self.scores, self.scores].sum(0))
        return self.growth.judged(verdict, verdict.z if self.z is None else self.z, self.tested)


class Stage(Candidate):
    """A candidate that has new channels put into a preview of the network, to measure what they really compute."""

    axis: Axis
    widening: WideningPlan

    @abstractmethod
    def fill(self, draft: Draft) -> None:
        """Writes the new channels' fan-in. Their fan-out stays zero, so that the function does not change."""


class Operator(ABC):
    """A way to grow. Subclass it as a frozen dataclass and hand it to ``dagrow.propose`` or ``dagrow.grow``."""

    #: samples go into this many folds; 1 measures without held-out gains
    folds: int = 4

    @property
    def least_neurons(self) -> int | None:
        """How many neurons each of its growths adds, at least; None if it adds no parameters at all."""
        return 0

    def check_regularisation(self, ridge: float | None) -> None:
        """Raises GrowthError unless folds and ridge are numbers that make sense."""
        check_whole(type(self).__name__, 1, folds=self.folds)
        check_real(type(self).__name__, 0, none="the one that cross-validation finds", ridge=ridge)

    @abstractmethod
    def candidates(self, dag: Dag) -> Sequence[Candidate]:
        """Every place where it could grow, if any. Raises GrowthError for a place that was asked for and cannot."""


def check_names(operator: Operator, field: str) -> None:
    """Raises GrowthError unless a field holds names, or None for all."""
    names = getattr(operator, field)
    if names is None:
        return
    if not isinstance(names, (tuple, list)) or not names or not all(isinstance(name, str) for name in names):
        raise GrowthError(
            f"{type(operator).__name__}({field}={names!r}): give a tuple of names, {field}=('fc1',), or None for all."
        )
