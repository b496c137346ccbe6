"""Where each part of a dag is drawn, and when it came: one layout, which the figure and the page both draw."""

from collections.abc import Sequence
from dataclasses import dataclass

import networkx as nx

from dagrow.pictures._records import Activation, Link, Snapshot

HIGHEST = 0.62  #: of the widest bar, in lanes


@dataclass(frozen=True)
class Bar:
    """An activation. Areas of squares as high as bars compare as their widths.

    Attributes:
        x: its column, how many layers lead to it at most.
        y: its lane, upwards; 0 is the middle.
        stages: the epochs after whose growth it had another width, and that width; None for the beginning.
        heights: in lanes, at each stage.
    """

    label: str
    x: int
    y: float
    stages: tuple[tuple[int | None, int], ...]
    heights: tuple[float, ...]

    @property
    def width(self) -> int:
        """At the end."""
        return self.stages[-1][1]

    @property
    def top(self) -> float:
        """At the end."""
        return self.y + self.heights[-1] / 2


@dataclass(frozen=True)
class Arrow:
    """A layer between two bars, by their numbers.

    Attributes:
        since: the epoch after whose growth it was there first, None for the beginning.
        peak: how high its arc goes; None of a band between neighbouring columns.
    """

    edge: str
    kind: str
    source: int
    target: int
    parameters: int
    since: int | None
    peak: float | None


@dataclass(frozen=True)
class Layout:
    """Bars and arrows, as they are at the end.

    Attributes:
        columns: how many there are.
        lanes: how many lie on each other.
        top, bottom: between which all is drawn.
    """

    bars: tuple[Bar, ...]
    arrows: tuple[Arrow, ...]
    columns: int
    lanes: float
    top: float
    bottom: float


def graph_layout(snapshots: Sequence[Snapshot]) -> Layout:
    """Of the last snapshot, with what the earlier ones tell of its past.

    Activations are known again by their axis, inputs and outputs by their names, and layers by their names.

    Args:
        snapshots: of one dag, oldest first, at least one.

    Returns:
        Places in columns and lanes, which whoever draws scales.
    """
    last = snapshots[-1]
    places, numbers = _places(last), {node.name: number for number, node in enumerate(last.activations)}
    stages = [_stages(node, snapshots) for node in last.activations]
    widest = max((widths[-1][1] for widths in stages), default=1)
    bars = tuple(
        Bar(node.label, *places[node.name], widths, tuple(HIGHEST * (width / widest) ** 0.5 for _, width in widths))
        for node, widths in zip(last.activations, stages, strict=True)
    )
    arrows = tuple(_arrow(link, numbers[link.source], numbers[link.target], bars, snapshots) for link in last.links)
    columns, lanes = 1 + max((bar.x for bar in bars), default=0), 1 + 2 * max((abs(bar.y) for bar in bars), default=0)
    tops = [bar.top for bar in bars] + [arrow.peak + 0.1 for arrow in arrows if arrow.peak is not None]
    bottom = min((2 * bar.y - bar.top for bar in bars), default=0.0)
    return Layout(bars, arrows, columns, lanes, max(tops, default=0.0), bottom)


def _places(snapshot: Snapshot) -> dict[str, tuple[int, float]]:
    """Columns by the longest way from an input, lanes near those that lead to them."""
    graph = nx.DiGraph([(link.source, link.target) for link in snapshot.links])
    graph.add_nodes_from(node.name for node in snapshot.activations)
    lanes: dict[str, float] = {}
    places: dict[str, tuple[int, float]] = {}
    for x, column in enumerate(nx.topological_generations(graph)):
        sources = {name: [lanes[source] for source in graph.predecessors(name)] for name in column}
        ordered = sorted(column, key=lambda name: sum(sources[name]) / max(1, len(sources[name])))
        lanes |= {name: number - (len(ordered) - 1) / 2 for number, name in enumerate(ordered)}
        places |= {name: (x, lanes[name]) for name in ordered}
    return places


def _arrow(link: Link, source: int, target: int, bars: Sequence[Bar], snapshots: Sequence[Snapshot]) -> Arrow:
    since = next(s.epoch for s in snapshots if any(other.edge == link.edge for other in s.links))
    first, last, peak = bars[source].x, bars[target].x, None
    if last - first > 1:
        peak = max(bar.top for bar in bars if first <= bar.x <= last) + 0.06 + 0.04 * (last - first)
    return Arrow(link.edge, link.kind, source, target, link.parameters, since, peak)


def _stages(node: Activation, snapshots: Sequence[Snapshot]) -> tuple[tuple[int | None, int], ...]:
    stages: list[tuple[int | None, int]] = []
    for snapshot in snapshots:
        widths = [other.width for other in snapshot.activations if _identity(other) == _identity(node)]
        if widths and (not stages or stages[-1][1] != widths[0]):
            stages.append((snapshot.epoch, widths[0]))
    return tuple(stages)


def _identity(node: Activation) -> str:
    return node.name if node.label in ("input", "output") else node.label
