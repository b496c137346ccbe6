"""Which growth first: a policy gives every growth a value."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isnan

from dagrow.errors import GrowthError
from dagrow.growth import Growth
from dagrow.objective import Objective
from dagrow.search import best_amplitude

__all__ = ["ByGain", "ByGainPerFlop", "ByGainPerParameter", "ByLineSearch", "Policy", "RoundRobin", "valued", "worth"]


def worth(growth: Growth) -> float:
    """What a growth is expected to bring: its held-out gain, or its gain where there are no folds."""
    return growth.gain if growth.heldout_gain is None else growth.heldout_gain


class Policy(ABC):
    """How growths compare. Subclass it as a frozen dataclass and hand it to ``dagrow.plan`` or ``dagrow.Grower``."""

    @abstractmethod
    def values(self, growths: Sequence[Growth], judge: Objective, past: Sequence[str]) -> Sequence[float]:
        """One number for each growth: the largest is taken first, one below 0 never. It must not change the model.

        Args:
            growths: of one dag, all measured on the model as it is.
            judge: the loss on the batches that choose: those for validation, if there are any.
            past: where was grown before, oldest first.
        """


def valued(growths: Sequence[Growth], policy: Policy, judge: Objective, past: Sequence[str]) -> dict[Growth, float]:
    """Each growth with its value. Raises GrowthError if the policy does not give one number for each."""
    given = policy.values(growths, judge, past)
    try:
        values = [float(value) for value in given]
    except (TypeError, ValueError):
        values = []
    if len(values) != len(growths) or any(map(isnan, values)):
        raise GrowthError(f"{policy!r} gave the values {given} for {len(growths)} growths; give one number for each.")
    return dict(zip(growths, values, strict=True))


@dataclass(frozen=True)
class ByGain(Policy):
    """The largest gain first."""

    def values(self, growths: Sequence[Growth], judge: Objective, past: Sequence[str]) -> list[float]:
        return [worth(growth) for growth in growths]


@dataclass(frozen=True)
class ByGainPerParameter(Policy):
    """The largest gain per parameter first. What adds no parameters is free."""

    def values(self, growths: Sequence[Growth], judge: Objective, past: Sequence[str]) -> list[float]:
        return [_per(worth(growth), growth.cost.parameters) for growth in growths]


@dataclass(frozen=True)
class ByGainPerFlop(Policy):
    """The largest gain per floating point operation first. What adds none is free."""

    def values(self, growths: Sequence[Growth], judge: Objective, past: Sequence[str]) -> list[float]:
        return [_per(worth(growth), growth.cost.flops) for growth in growths]


def _per(gain: float, cost: int) -> float:
    if cost:
        return gain / cost
    return inf if gain > 0 else gain


@dataclass(frozen=True)
class RoundRobin(Policy):
    """The place first that was grown longest ago; among places that never grew, the one with the largest gain."""

    def values(self, growths: Sequence[Growth], judge: Objective, past: Sequence[str]) -> list[float]:
        last = {where: turn for turn, where in enumerate(past)}
        return [float(len(past) - last.get(growth.where, -1)) for growth in growths]


@dataclass(frozen=True)
class ByLineSearch(Policy):
    """What lowers the loss most at once, at the amplitude that a line search finds, first.

    A gain is a slope, by how much the loss falls per unit of amplitude, and units differ between places: where the loss
    depends little on an activation, the best amplitude is large. The fall of the loss at that amplitude has one unit
    everywhere. It costs up to 16 evaluations of the loss for each growth on the batches that choose.

    What lowers it at no amplitude is never chosen, what leaves the function as it is comes last.
    """

    def values(self, growths: Sequence[Growth], judge: Objective, past: Sequence[str]) -> list[float]:
        before = judge.mean()
        return [0.0 if growth.preserving else self._fall(growth, judge, before) for growth in growths]

    @staticmethod
    def _fall(growth: Growth, judge: Objective, before: float) -> float:
        gamma, after = best_amplitude(growth, judge, before)
        return before - after if gamma else -inf
