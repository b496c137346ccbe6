"""What has to change where when an axis widens: growing is relabelling, see :mod:`dagrow.relabelling`.

Every consumer and rider tells where the new channels landed. Where products are summed over the axis (the width of a
head in attention), some of the new rows start at zero, see :mod:`dagrow.zeroing`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor, fx

from dagrow.axes import Layout
from dagrow.labels import Rider
from dagrow.landings import Landing, MisfitError
from dagrow.placed import Placed
from dagrow.program import Program
from dagrow.relabelling import GrowthRunner
from dagrow.settling import Arguments, moved, settled
from dagrow.stated import Place
from dagrow.zeroing import zeros

__all__ = ["Widening", "disjoint", "widen"]

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Widening:
    """What changes where when an axis widens.

    Attributes:
        literals: node -> its arguments in the grown network.
        attributes: of modules that state a size.
        written: whether the forward must be written anew, with the literals in it; else the attributes change it.
        zeros: producer -> which slots of a new unit must start at zero ``[slots]``.
    """

    rows: Mapping[str, Landing]
    columns: Mapping[str, Landing]
    entries: Mapping[Rider, Landing]
    literals: Mapping[fx.Node, Arguments] = field(default_factory=dict)
    attributes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    written: bool = False
    zeros: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def touched(self) -> set[tuple[str, str]]:
        """The sides of layers, nodes and modules that change."""
        return {
            *(("read", name) for name in self.columns), *(("written", name) for name in self.rows),
            *(("rider", rider.name) for rider in self.entries), *(("literal", node.name) for node in self.literals),
            *(("module", name) for name in self.attributes),
        }  # fmt: skip


def disjoint(items: Sequence[T], widening: Callable[[T], Widening]) -> list[list[T]]:
    """Groups what widens axes so that no two of a group change the same side of a layer, or the same size."""
    groups: list[tuple[set[tuple[str, str]], list[T]]] = []
    for item in items:
        touched = widening(item).touched
        for taken, group in groups:
            if not taken & touched:
                taken |= touched
                group.append(item)
                break
        else:
            groups.append((touched, [item]))
    return [group for _, group in groups]


def widen(program: Program, layers: Mapping[fx.Node, Placed], layout: Layout, k: int) -> Widening:
    """Plans k new units on an axis. Raises :class:`MisfitError` with the reason if the model cannot take them."""
    if layout.reason:
        raise MisfitError(layout.reason)
    runner, before = _settled_run(program, layers, layout, k), layout.found
    columns = {
        edge: runner.landed(edge, runner.found.columns[edge], before.columns[edge], 1) for edge in layout.columns
    }
    entries = {
        r: runner.riders.get(r) or runner.landed(r.name, runner.found.entries[r], before.entries[r], 0)
        for r in layout.entries
    }
    literals, attributes, written = settled(
        program, runner.literals, runner.attributes, runner.resized(), runner.restated
    )
    return Widening(runner.landings, columns, entries, literals, attributes, written, zeros(runner))


def _settled_run(program: Program, layers: Mapping[fx.Node, Placed], layout: Layout, k: int) -> GrowthRunner:
    """A run in which a number that a module states changes wherever it is used, if there is one that fits; else one
    in which sizes change only where they must."""
    restated: dict[Place, int] = {}
    fitting, misfit = None, None
    while True:
        runner = GrowthRunner(program, layers, layout, k, restated)
        try:
            runner.run_reached()
            runner.check()
            runner.restate()
            fitting = runner
        except MisfitError as error:
            misfit = misfit or error
        more = moved(runner.literals)
        if more.keys() <= restated.keys():
            break
        restated = {**more, **restated}
    if fitting is None:
        assert misfit is not None
        raise misfit
    return fitting
