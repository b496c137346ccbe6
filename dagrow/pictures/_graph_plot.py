"""The dag and how it grew, laid out to be drawn."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import networkx as nx

from dagrow.pictures._figures import BAND, BEGINNING, blank, check_figure, colormap, short_name, write
from dagrow.pictures._records import Activation, Link, Snapshot


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
    ]
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


HALF = 0.07  #: of a bar's width
CROWDED = 16  #: columns of a dag from which there is no room for the names of layers


def draw_graph(snapshots: Sequence[Snapshot], path: Path) -> None:
    """The dag: a bar for each activation, a band or an arc for each layer, colours for when they were added.

    Raises:
        FigureError: matplotlib is not installed, or the file cannot be written.
    """
    check_figure(path)
    found = picture(snapshots)
    crowded = found.columns > CROWDED
    drawing = blank(
        min(40, max(7, (0.8 if crowded else 1.5) * found.columns + 1)), min(20, max(3.8, 1.8 * found.lanes + 2))
    )
    axes = drawing.subplots()
    colors = _Colors([snapshot.epoch for snapshot in snapshots if snapshot.epoch is not None])
    tops = [_top(found, bar) for bar in found.bars]
    for source, target in dict.fromkeys((arrow.source, arrow.target) for arrow in found.arrows):
        same = [arrow for arrow in found.arrows if (arrow.source, arrow.target) == (source, target)]
        tops.append(_draw_arrows(axes, found, same, colors))
    for bar in found.bars:
        _draw_bar(axes, found, bar, colors)
    colors.legend(drawing)
    axes.set_axis_off()
    axes.set(xlim=(-0.6, found.columns - 0.4), ylim=(min(2 * b.y - _top(found, b) for b in found.bars), max(tops)))
    write(drawing, path)


class _Colors:
    """Grey for what was there at the beginning, then from dark to light."""

    def __init__(self, epochs: Sequence[int]) -> None:
        self.epochs, self.map = epochs, colormap("plasma")

    def __call__(self, epoch: int | None) -> Any:
        if epoch is None:
            return BEGINNING
        first, last = self.epochs[0], self.epochs[-1]
        return self.map(0.1 + 0.75 * (epoch - first) / max(1, last - first))

    def legend(self, drawing: Any) -> None:
        from matplotlib.patches import Patch

        shown = self.epochs[:: max(1, -(-len(self.epochs) // 8))]
        patches = [Patch(color=BEGINNING, label="at first")]
        patches += [Patch(color=self(epoch), label=f"epoch {epoch}") for epoch in shown]
        drawing.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False, fontsize=8)


def _height(found: Picture, width: int) -> float:
    """Of a bar, so that areas of squares compare."""
    return 0.62 * (width / found.widest) ** 0.5


def _top(found: Picture, bar: Bar) -> float:
    return bar.y + _height(found, bar.width) / 2


def _draw_bar(axes: Any, found: Picture, bar: Bar, colors: _Colors) -> None:
    low, base = 0.0, bar.y - _height(found, bar.width) / 2
    for epoch, width in bar.stages:
        high = _height(found, width)
        axes.bar(bar.x, high - low, 2 * HALF, base + low, color=colors(epoch), edgecolor="white", linewidth=0.5)
        low = high
    text = " → ".join(map(str, dict.fromkeys([bar.stages[0][1], bar.width])))
    crowded = found.columns > CROWDED
    axes.annotate(
        f"{short_name(bar.label)}\n{text}",
        (bar.x, base),
        (0, -4),
        textcoords="offset points",
        ha="center",
        va="top",
        fontsize=7 if crowded else 8,
        rotation=90 if crowded else 0,
    )


def _draw_arrows(axes: Any, found: Picture, same: Sequence[Arrow], colors: _Colors) -> float:
    """Layers from one activation to another; returns how high it reaches."""
    source, target = found.bars[same[0].source], found.bars[same[0].target]
    since = same[0].since if all(arrow.since is not None for arrow in same) else None
    text = ", ".join(short_name(arrow.edge, 16) for arrow in same[:3]) + ", …" * (len(same) > 3)
    if target.x - source.x > 1:
        place = _draw_arc(axes, found, source, target, colors(since))
    else:
        ends, halves = [source.y, target.y], [_height(found, bar.width) / 2 for bar in (source, target)]
        low, high = ([y + sign * half for y, half in zip(ends, halves, strict=True)] for sign in (-1, 1))
        color = BAND if since is None else colors(since)
        axes.fill_between([source.x + HALF, target.x - HALF], low, high, color=color, alpha=0.6, linewidth=0)
        place = (source.x + target.x) / 2, sum(ends) / 2
        kinds = " and ".join(dict.fromkeys(arrow.kind for arrow in same))
        text += f"\n{kinds}\n{sum(arrow.parameters for arrow in same):,}"
    if found.columns <= CROWDED:
        axes.annotate(text, place, ha="center", va="center", fontsize=7, color="#444")
    return place[1] + 0.06


def _draw_arc(axes: Any, found: Picture, source: Bar, target: Bar, color: Any) -> tuple[float, float]:
    """Over the bars between two; returns the place for its name."""
    from matplotlib.patches import FancyArrowPatch
    from matplotlib.path import Path as Curve

    ends = [_top(found, source) + 0.01, _top(found, target) + 0.01]
    between = max(_top(found, bar) for bar in found.bars if source.x <= bar.x <= target.x)
    peak = between + 0.06 + 0.04 * (target.x - source.x)
    middle = (source.x + target.x) / 2
    corners = [(source.x, ends[0]), (middle, 2 * peak - sum(ends) / 2), (target.x, ends[1])]
    curve = Curve(corners, [Curve.MOVETO, Curve.CURVE3, Curve.CURVE3])
    axes.add_patch(FancyArrowPatch(path=curve, arrowstyle="-|>", mutation_scale=9, color=color, linewidth=1.3))
    return middle, peak + 0.04
