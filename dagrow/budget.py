"""How much may be added in all."""

from dataclasses import dataclass, fields
from math import inf

from dagrow.errors import check_whole
from dagrow.growth import Growth

__all__ = ["Budget"]


@dataclass(frozen=True)
class Budget:
    """What growths may add together. None is no limit.

    Args:
        parameters: entries of parameters.
        flops: floating point operations of one sample's forward pass, as :attr:`Growth.cost` counts them.
        neurons: new units.
        growths: applied growths. Moves of weights, which add nothing, do not count.

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
        given = [(field.name, getattr(self, field.name)) for field in fields(self)]
        return [(name, limit) for name, limit in given if limit is not None]

    def holds(self, growth: Growth) -> bool:
        """Whether the growth fits."""
        cost = _costs(growth)
        return all(cost[name] <= limit for name, limit in self._limits())

    def less(self, growth: Growth) -> "Budget":
        """What is left once the growth, which fits, is paid."""
        cost = _costs(growth)
        return Budget(**{name: limit - cost[name] for name, limit in self._limits()})

    def within(self, other: "Budget") -> "Budget":
        """The narrower of two limits, each."""
        limits = [*self._limits(), *other._limits()]
        return Budget(**{name: min(limit for n, limit in limits if n == name) for name, _ in limits})

    def spent(self, neurons: int) -> bool:
        """Whether nothing fits any more that adds parameters, with their operations, and so many neurons."""
        left = inf if self.neurons is None else self.neurons
        return 0 in (self.parameters, self.flops, self.growths) or left < neurons


def _costs(growth: Growth) -> dict[str, int]:
    cost = growth.cost
    return {
        "parameters": cost.parameters, "flops": cost.flops, "neurons": growth.neurons,
        "growths": int(cost.parameters > 0),
    }  # fmt: skip
