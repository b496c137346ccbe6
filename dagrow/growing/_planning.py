"""A set of growths under a budget."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from math import inf

from dagrow.errors import GrowthError, check_whole, listed
from dagrow.growing._policies import ByLineSearch, Policy, expected_gain, with_values
from dagrow.statistics import Objective
from dagrow.surgery import Growth


@dataclass(frozen=True)
class Budget:
    """What growths may add together. None is no limit. What units that go take with them can be spent again.

    Args:
        parameters: entries of parameters.
        flops: floating point operations of one sample's forward pass, as :attr:`Growth.cost` counts them.
        neurons: new units.
        growths: applied growths, those by which units go among them. Moves of weights, which add nothing, do not count.

    Raises:
        GrowthError: a limit is no whole number, or negative.
    """

    parameters: int | None = None
    flops: int | None = None
    neurons: int | None = None
    growths: int | None = None

    def __post_init__(self) -> None:
        check_whole("Budget", 0, none="no limit", **vars(self))

    def _limits(self) -> list[tuple[str, int]]:
        limits = [(field.name, getattr(self, field.name)) for field in fields(self)]
        return [(name, limit) for name, limit in limits if limit is not None]

    def holds(self, growth: Growth) -> bool:
        """Whether a growth fits.

        Args:
            growth: what it adds counts.

        Returns:
            True if it is within every limit.
        """
        return self.allows(**_costs(growth))

    def allows(self, **amounts: int) -> bool:
        """Whether amounts fit.

        Args:
            amounts: by the names of limits; those that are not named are none.

        Returns:
            True if they are within every limit.
        """
        return all(amounts.get(name, 0) <= limit for name, limit in self._limits())

    def minus(self, growth: Growth) -> "Budget":
        """What is left once a growth is paid.

        Args:
            growth: one that fits.

        Returns:
            A budget with the same limits, lowered.
        """
        cost = _costs(growth)
        return Budget(**{name: limit - cost[name] for name, limit in self._limits()})

    def intersect(self, other: "Budget") -> "Budget":
        """The narrower of two budgets.

        Args:
            other: the second.

        Returns:
            A budget that holds what both hold.
        """
        limits = [*self._limits(), *other._limits()]
        return Budget(**{name: min(limit for n, limit in limits if n == name) for name, _ in limits})

    def is_spent(self, neurons: int) -> bool:
        """Whether nothing fits any more that adds parameters, with their operations, and some neurons.

        Args:
            neurons: the fewest that would be added; less than 0 if some go, which takes a growth alone.

        Returns:
            True if nothing fits.
        """
        if neurons < 0:
            return self.growths == 0
        most = inf if self.neurons is None else self.neurons
        return 0 in (self.parameters, self.flops, self.growths) or most < neurons


def _costs(growth: Growth) -> dict[str, int]:
    cost = growth.cost
    return {
        "parameters": cost.parameters,
        "flops": cost.flops,
        "neurons": growth.neurons,
        "growths": int(cost.parameters != 0),
    }


NEW = 1e-6  #: a part of what a growth brings that is none beside those chosen before it


def applicable(growths: Sequence[Growth]) -> list[Growth]:
    """Those that are more than chance and lower the loss, those that preserve the function, and units that go.

    Args:
        growths: of one call of :func:`dagrow.propose`.

    Returns:
        The ones that may be applied, in the same order.
    """
    return [growth for growth in growths if growth.is_whole or (growth.significant and growth.gain > 0)]


def plan(growths: Sequence[Growth], budget: Budget | None = None, policy: Policy | None = None) -> list[Growth]:
    """Picks the growths that together are worth most under a budget, greedily, best first. Applies nothing.

    Growths that feed the same target explain overlapping parts of its goal, so their gains do not add. Of a growth
    only that counts which exceeds, target by target, the most that one chosen before it explains:

        f(chosen) = sum over targets of max over chosen of gain_from[target]

    No set explains less than that, as a fit on several features explains at least what the best of them does. f is
    submodular, so that under a limit on the number of growths alone greedy choice by gain comes to at least
    1 - 1/e of the best set (Nemhauser, Wolsey and Fisher 1978). The policy's value of a growth falls in proportion.
    Moves of weights explain another part of the goal than what is new, and overlap with nothing. Growths of one
    operator at one place are alternatives, of which one is chosen.

    Args:
        growths: of one dag, what :func:`dagrow.propose` returned.
        budget: what they may add together; by default there is no limit. One that does not fit is skipped.
        policy: how they compare; by default by :class:`ByLineSearch`, on the batches that were measured.

    Returns:
        The chosen ones. Once one is applied the others are stale: to apply them, measure again, as
        :class:`dagrow.Grower` does.

    Raises:
        GrowthError: an argument does not fit, the policy's values do not fit the growths, or it runs the model, as the
            default does, and the growths are stale.
    """
    budget, policy = Budget() if budget is None else budget, ByLineSearch() if policy is None else policy
    check_kinds(budget=(budget, Budget), policy=(policy, Policy))
    candidates = applicable(listed("growths", growths, Growth, "dagrow.propose returns"))
    return greedy_plan(candidates, budget, policy, candidates[0].objective, ()) if candidates else []


def check_kinds(**arguments: tuple[object, type]) -> None:
    """Raises GrowthError for an argument that is not of its kind."""
    for name, (value, kind) in arguments.items():
        if not isinstance(value, kind):
            raise GrowthError(f"{name}={value!r} is a {type(value).__name__}; give a dagrow.{kind.__name__}.")


def greedy_plan(
    growths: Sequence[Growth], budget: Budget, policy: Policy, judge: Objective, past: Sequence[str]
) -> list[Growth]:
    """The plan for growths that are worth applying."""
    fitting = [growth for growth in growths if budget.holds(growth)]
    values = with_values(fitting, policy, judge, past) if fitting else {}
    candidates, plan = [growth for growth in fitting if values[growth] >= 0 or growth.removes], list[Growth]()
    explained: dict[str, float] = {}
    while True:
        shares = {growth: _share(growth, explained) for growth in candidates if budget.holds(growth)}
        candidates = [growth for growth, share in shares.items() if share > NEW]
        if not candidates:
            return plan
        best = max(
            candidates, key=lambda growth: (values[growth] * shares[growth], expected_gain(growth) * shares[growth])
        )
        plan.append(best)
        candidates = [growth for growth in candidates if place(growth) != place(best)]
        budget = budget.minus(best)
        if best.cost.parameters and not best.removes:
            explained |= {to: max(part, explained.get(to, 0.0)) for to, part in _parts(best).items()}


def place(growth: Growth) -> tuple[str, str]:
    """Growths of one operator at one place are alternatives."""
    return repr(growth.operator), growth.where


def _parts(growth: Growth) -> dict[str, float]:
    """Target -> its part of what the growth is expected to bring."""
    scale = expected_gain(growth) / growth.gain if growth.gain > 0 else 0.0
    return {to: scale * part for to, part in growth.gain_from.items()}


def _share(growth: Growth, explained: Mapping[str, float]) -> float:
    """The part of what a growth brings that those chosen before it do not bring, 0 to 1."""
    parts = _parts(growth)
    if not growth.cost.parameters or growth.removes or not sum(parts.values()) > 0:
        return 1.0
    new = sum(part if part < 0 else max(0.0, part - explained.get(to, 0.0)) for to, part in parts.items())
    return new / sum(parts.values())
