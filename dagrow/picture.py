"""The dag and how it grew, laid out to be drawn."""

from collections.abc import Sequence
from dataclasses import dataclass

import networkx as nx

from dagrow.snapshots import Activation, Link, Snapshot

__all__ = ["Arrow", "Bar", "Picture", "picture"]


@dataclass(frozen=True)
class Bar:
    """An activation at its place.

    Attributes:
        x: how many layers lead to it at most.
        y: its lane; 0 is the middle.
        stages: the epochs after whose growth it had another width, and that width; None for the beginning.
    """

    label: str
    x: int
    y: float
    stages: tuple[tuple[int | None, int], ...]

    @property
    def width(self) -> int:
        """At the end."""
        return self.stages[-1][1]


@dataclass(frozen=True)
class Arrow:
    """A layer between two bars, by their numbers.

    Attributes:
        since: the epoch after whose growth it was there first, None for the beginning.
    """

    edge: str
    kind: str
    source: int
    target: int
    parameters: int
    since: int | None


@dataclass(frozen=True)
class Picture:
    """Bars and arrows, as they are at the end."""

    bars: tuple[Bar, ...]
    arrows: tuple[Arrow, ...]

    @property
    def columns(self) -> int:
        return 1 + max((bar.x for bar in self.bars), default=0)

    @property
    def lanes(self) -> float:
        return 1 + 2 * max((abs(bar.y) for bar in self.bars), default=0)

    @property
    def widest(self) -> int:
        return max((bar.width for bar in self.bars), default=1)


def picture(snapshots: Sequence[Snapshot]) -> Picture:
    """Of the last snapshot, with what the earlier ones tell of its past.

    Activations are known again by their axis, inputs and outputs by their names, and layers by their names.
    """
    last = snapshots[-1]
    places, at = _places(last), {one.name: number for number, one in enumerate(last.activations)}
    bars = [Bar(one.label, *places[one.name], _stages(one, snapshots)) for one in last.activations]
    arrows = [
        Arrow(link.edge, link.kind, at[link.source], at[link.target], link.parameters, _since(link, snapshots))
        for link in last.links
    ]  # fmt: skip
    return Picture(tuple(bars), tuple(arrows))


def _places(snapshot: Snapshot) -> dict[str, tuple[int, float]]:
    """Columns by the longest way from an input, lanes near those that lead to them."""
    graph = nx.DiGraph([(link.source, link.target) for link in snapshot.links])
    graph.add_nodes_from(one.name for one in snapshot.activations)
    places: dict[str, tuple[int, float]] = {}
    for x, column in enumerate(nx.topological_generations(graph)):
        before = {name: [places[source][1] for source in graph.predecessors(name)] for name in column}
        ordered = sorted(column, key=lambda name: sum(before[name]) / max(1, len(before[name])))
        places |= {name: (x, at - (len(ordered) - 1) / 2) for at, name in enumerate(ordered)}
    return places


def _known(one: Activation) -> str:
    return one.name if one.label in ("input", "output") else one.label


def _stages(one: Activation, snapshots: Sequence[Snapshot]) -> tuple[tuple[int | None, int], ...]:
    stages: list[tuple[int | None, int]] = []
    for snapshot in snapshots:
        widths = [other.width for other in snapshot.activations if _known(other) == _known(one)]
        if widths and (not stages or stages[-1][1] != widths[0]):
            stages.append((snapshot.epoch, widths[0]))
    return tuple(stages)


def _since(link: Link, snapshots: Sequence[Snapshot]) -> int | None:
    return next(s.epoch for s in snapshots if any(other.edge == link.edge for other in s.links))
