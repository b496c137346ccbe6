"""What an operator is: it names candidates, and the steps of a candidate turn moments into a growth.

An operator is a small frozen value. It never touches hooks or parameters: each candidate is a generator that yields
what it needs measured, is sent the moments, and returns what is to be inserted.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from dagrow.axes import WideningPlan
from dagrow.errors import GrowthError, check_real, check_whole
from dagrow.graph import Axis, Dag
from dagrow.solvers import Moments, Pair, Verdict
from dagrow.statistics import Feature, Objective, SampleScores
from dagrow.surgery import Growth


@dataclass(frozen=True, eq=False)
class Preview:
    """New channels of an axis, as they are while moments are measured, to see what they really compute.

    Their fan-out is zero, so that the function does not change.

    Attributes:
        axis: the axis that is wider.
        widening: what changes where, of :meth:`dagrow.Dag.widening`.
        fan_in: producer -> what the new channels read there ``[k, channels, i]``, the constant last if it has a bias.
        shared: whether others of the axis, with other producers, may be in the model meanwhile: features then name
            these, as in ``NewChannels(edge, writers=preview.writers)``.
    """

    axis: Axis
    widening: WideningPlan
    fan_in: Mapping[str, Tensor]
    shared: bool = False

    @property
    def writers(self) -> tuple[str, ...]:
        """The producers that write the new channels."""
        return tuple(self.fan_in)


@dataclass(frozen=True, eq=False)
class Needs:
    """What a candidate needs measured next. Those of all candidates are measured together, in as few passes as can be.

    Attributes:
        pairs: pairs of features, whose second moments are sent back.
        preview: new channels that have to be in the model meanwhile, if any.
        later: features that it needs after that, of the network as it is; what they are made of is kept if it is small.
    """

    pairs: Sequence[Pair]
    preview: Preview | None = None
    later: Sequence[Feature] = ()


#: what a candidate does: ``moments = yield Needs(pairs)`` as often as it has to, then ``return growth``; or None if
#: there is nothing to add; or, where it stands for many places, the candidates that are worth going on with
Steps = Generator[Needs, Moments, Growth | Sequence["Candidate"] | None]


@dataclass(frozen=True, eq=False)
class Candidate:
    """One place where an operator could grow.

    Attributes:
        where: the place: the name of an axis or an edge, or what a path leads from and to.
        steps: starts the generator, given the loss and the batches that growths are measured on.
        tests: how often it looks for something that may be chance, for the correction of p-values: once; many times if
            it stands for many places; not at all if it does not ask.
    """

    where: str
    steps: Callable[[Objective], Steps]
    tests: int = 1


def scored(
    growth: Growth, scores: SampleScores, z: float | None = None, tested: bool = True, preview: Preview | None = None
) -> Steps:
    """One more pass, which tells what fits on the other folds explain of each sample.

    Args:
        growth: fitted, but for its held-out gain.
        scores: those of all that is fitted.
        z: as it was found before, where the fits that are scored depend on all samples.
        tested: whether chance is asked about.
        preview: new channels that the scores are of, if any.

    Yields:
        The scores of each sample.

    Returns:
        The growth with its held-out gain.
    """
    moments = yield Needs([(scores, scores)], preview)
    verdict = Verdict.of(moments.sums[scores, scores].sum(0))
    return growth.judged(verdict, verdict.z if z is None else z, tested)


class Operator(ABC):
    """A way to grow. Subclass it as a frozen dataclass and hand it to ``dagrow.propose`` or ``dagrow.grow``."""

    #: samples go into this many folds; 1 measures without held-out gains
    folds: int = 4

    @property
    def least_neurons(self) -> int | None:
        """How many neurons each of its growths adds, at least; less than 0 if some go; None if there are no others."""
        return 0

    def check_regularisation(self, ridge: float | None) -> None:
        """Checks that folds and ridge are numbers that make sense.

        Raises:
            GrowthError: they are not.
        """
        check_whole(type(self).__name__, 1, folds=self.folds)
        check_real(type(self).__name__, 0, none="the one that cross-validation finds", ridge=ridge)

    @abstractmethod
    def candidates(self, dag: Dag) -> Sequence[Candidate]:
        """Every place where it could grow, if any.

        Raises:
            GrowthError: a place was asked for that cannot grow.
        """


def check_names(operator: Operator, field: str) -> None:
    """Raises GrowthError unless a field holds names, or None for all."""
    names = getattr(operator, field)
    if names is None:
        return
    if not isinstance(names, (tuple, list)) or not names or not all(isinstance(name, str) for name in names):
        raise GrowthError(
            f"{type(operator).__name__}({field}={names!r}): give a tuple of names, {field}=('fc1',), or None for all."
        )
