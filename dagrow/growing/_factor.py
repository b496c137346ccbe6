"""By which factor all widths may grow under a budget, and how many neurons that makes at each axis."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import floor, prod

from dagrow.errors import GrowthError
from dagrow.graph import Axis, Dag, weight_uses
from dagrow.growing._planning import Budget
from dagrow.surgery import Cost, Draft, cost_of

FACTOR, LARGEST = 2.0, 1000.0  #: where neither a factor nor a budget is given; at most
STEPS = 60  #: of the bisection


def new_neurons(dag: Dag, factor: float | None, budget: Budget) -> dict[str, int]:
    """New neurons by axis, for the largest factor that a budget holds.

    Args:
        dag: of the model.
        factor: the largest that is wanted; None for what the budget holds, or 2 if that has no limit.
        budget: what all may add together.

    Returns:
        For each axis that can grow, in the order of the model.

    Raises:
        GrowthError: nothing can grow, or not by one neuron.
    """
    widths = {axis.name: axis.width for axis in dag.axes if axis.growable}
    if not widths:
        raise GrowthError(f"no axis can grow:\n{dag}")
    sizes = _Sizes.of(dag)

    def neurons(factor: float) -> dict[str, int]:
        new = {name: floor((factor - 1) * width + 0.5) for name, width in widths.items()}
        return {name: k for name, k in new.items() if k}

    def fits(factor: float) -> bool:
        new = neurons(factor)
        cost = sizes.cost(new)
        return budget.allows(parameters=cost.parameters, flops=cost.flops, neurons=sum(new.values()), growths=len(new))

    is_bounded = any(limit is not None for limit in (budget.parameters, budget.flops, budget.neurons))
    factor = factor or (LARGEST if is_bounded else FACTOR)
    wanted = neurons(_largest(fits, factor))
    if not wanted:
        what = f"factor={factor:g} adds" if budget == Budget() else f"{budget!r} allows"
        listed = ", ".join(f"{width} ({name})" for name, width in widths.items())
        raise GrowthError(f"enlarge: {what} not one neuron to widths of {listed}; give a larger one.")
    return wanted


def affordable(dag: Dag, name: str, k: int, budget: Budget) -> int:
    """How many of some neurons a budget holds at an axis, in the model as it is now.

    Args:
        dag: of the model.
        name: of the axis.
        k: the neurons that are wanted.
        budget: what is left.

    Returns:
        At most k; where the axis cannot grow by so many, these, so that growing it tells why.
    """

    def fits(k: int) -> bool | None:
        try:
            change = Draft(dag, [(dag.axis(name), dag.widening(dag.axis(name), k))]).change()
        except GrowthError:  # not by so many
            return None
        cost = cost_of(dag, change)
        return budget.allows(parameters=cost.parameters, flops=cost.flops, neurons=k, growths=1)

    if budget == Budget() or fits(k) is not False:
        return k
    low, high = 0, k
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _largest(fits: Callable[[float], bool], factor: float) -> float:
    """The largest factor that fits, up to one."""
    if fits(factor):
        return factor
    low, high = 1.0, factor
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


@dataclass(frozen=True)
class _Sizes:
    """Of parameters, and what a new neuron adds to them.

    Attributes:
        shapes: parameter -> its shape.
        added: parameter -> dimension -> axis -> entries of a neuron.
        uses: parameter -> how often an entry is used in a sample's forward pass.
    """

    shapes: Mapping[str, tuple[int, ...]]
    added: Mapping[str, Mapping[int, Mapping[str, int]]]
    uses: Mapping[str, int]

    @classmethod
    def of(cls, dag: Dag) -> "_Sizes":
        shapes = {name: tuple(parameter.shape) for name, parameter in dag.model.named_parameters()}
        added: dict[str, dict[int, dict[str, int]]] = defaultdict(lambda: defaultdict(dict))
        for axis in dag.axes:
            for name, dims in _added(dag, axis).items():
                for dim, entries in dims.items() if name in shapes else ():
                    added[name][dim][axis.name] = entries
        return cls(shapes, added, weight_uses(dag.program.graph, dag.layers))

    def cost(self, new: Mapping[str, int]) -> Cost:
        """Of widening several axes, at most: those that widen one dimension, as heads and their size do, multiply."""
        parameters = flops = 0
        for name, dims in self.added.items():
            shape = list(self.shapes[name])
            entries = prod(shape)
            for dim, axes in dims.items():
                for axis, entries_of_one in axes.items():
                    size, k = self.shapes[name][dim], new.get(axis, 0)
                    shape[dim] = -(-shape[dim] * (size + k * entries_of_one) // size)
            parameters += prod(shape) - entries
            flops += 2 * (prod(shape) - entries) * self.uses.get(name, 0) * (len(shape) > 1)
        return Cost(parameters, flops)


def _added(dag: Dag, axis: Axis) -> Mapping[str, Mapping[int, int]]:
    """Entries of one new neuron, by parameter or buffer and dimension; none where the axis cannot grow by one."""
    try:
        maps = Draft(dag, [(axis, dag.widening(axis, 1))]).change().index_maps if axis.growable else {}
    except GrowthError:
        return {}
    return {name: {at.dim: at.size - len(at.old) for at in found} for name, found in maps.items()}
