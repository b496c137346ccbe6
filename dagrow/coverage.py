"""How much of a model can grow, and why the rest cannot."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table
from torch import Tensor, nn

from dagrow.edges import Axis, Edge
from dagrow.tables import render

__all__ = ["Coverage", "coverage_of"]


@dataclass(frozen=True)
class Coverage:
    """Layers and parameters that can grow, and those that cannot.

    Attributes:
        growable: layer that writes, reads or carries an axis that can widen -> its parameters.
        frozen: edge that does not -> its parameters.
        reasons: why not, with the operation and the user's line -> the edges that it freezes, most parameters first.
        other: all other parameters of the model: norms, embeddings, biases used directly, layers that do not run.
    """

    growable: Mapping[str, int]
    frozen: Mapping[str, int]
    reasons: Mapping[str, tuple[str, ...]]
    other: int

    @property
    def parameters(self) -> int:
        """Of the whole model."""
        return sum(self.growable.values()) + sum(self.frozen.values()) + self.other

    @property
    def share(self) -> float:
        """The part of all parameters that lies in layers that can grow."""
        return sum(self.growable.values()) / max(1, self.parameters)

    def __str__(self) -> str:
        title = f"{self.share:.1%} of {self.parameters} parameters lie in layers that can grow"
        table = Table("", "layers", "parameters", title=title, title_justify="left")
        table.add_row("can grow", str(len(self.growable)), str(sum(self.growable.values())))
        table.add_row("cannot grow", str(len(self.frozen)), str(sum(self.frozen.values())))
        table.add_row("other", "", str(self.other))
        why = Table("why not", "layers", "parameters")
        for reason, edges in self.reasons.items():
            why.add_row(reason, ", ".join(edges), str(sum(self.frozen[edge] for edge in edges)))
        return render(table, why) if self.reasons else render(table)


def coverage_of(edges: Sequence[Edge], axes: Sequence[Axis], model: nn.Module) -> Coverage:
    """Counts each parameter once."""
    counted: set[int] = set()

    def own(parameters: Iterable[Tensor | None]) -> int:
        fresh = {id(p): p for p in parameters if isinstance(p, nn.Parameter) and id(p) not in counted}
        counted.update(fresh)
        return sum(parameter.numel() for parameter in fresh.values())

    growable = {edge.name: own(edge.parameters().values()) for edge in edges if edge.growable}
    for rider in {rider.name: rider for axis in axes if axis.growable for rider in axis.riders}.values():
        if rider.module is not None:
            growable[rider.name] = own(getattr(rider.module, entry) for entry, _ in rider.paths)
    frozen = {edge.name: own(edge.parameters().values()) for edge in edges if not edge.growable}
    reasons: dict[str, tuple[str, ...]] = {}
    for edge in sorted(edges, key=lambda edge: -frozen.get(edge.name, 0)):
        if edge.reason is not None:
            reasons[edge.reason] = (*reasons.get(edge.reason, ()), edge.name)
    ordered = dict(sorted(reasons.items(), key=lambda item: -sum(frozen[name] for name in item[1])))
    other = sum(p.numel() for p in model.parameters() if id(p) not in counted)
    return Coverage(growable, frozen, ordered, other)
