"""A figure of the dag and of how it grew."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dagrow.pictures._figures import BAND, BEGINNING, check_figure, colormap, empty_figure, short_name, write
from dagrow.pictures._graph_layout import Arrow, Bar, Layout, graph_layout
from dagrow.pictures._records import Snapshot

HALF = 0.07  #: of a bar's width
CROWDED = 16  #: columns of a dag from which there is no room for the names of layers


def draw_graph(snapshots: Sequence[Snapshot], path: Path) -> None:
    """The dag: a bar for each activation, a band or an arc for each layer, colours for when they were added.

    Args:
        snapshots: of the dag, oldest first, at least one.
        path: of the figure; its ending is its format.

    Raises:
        FigureError: matplotlib is not installed, or the file cannot be written.
    """
    check_figure(path)
    layout = graph_layout(snapshots)
    crowded = layout.columns > CROWDED
    drawing = empty_figure(
        min(40, max(7, (0.8 if crowded else 1.5) * layout.columns + 1)), min(20, max(3.8, 1.8 * layout.lanes + 2))
    )
    axes = drawing.subplots()
    colors = _Colors([snapshot.epoch for snapshot in snapshots if snapshot.epoch is not None])
    for ends in dict.fromkeys((arrow.source, arrow.target) for arrow in layout.arrows):
        arrows = [arrow for arrow in layout.arrows if (arrow.source, arrow.target) == ends]
        _draw_arrows(axes, arrows, layout, colors)
    for bar in layout.bars:
        _draw_bar(axes, bar, crowded, colors)
    colors.legend(drawing)
    axes.set_axis_off()
    axes.set(xlim=(-0.6, layout.columns - 0.4), ylim=(layout.bottom, layout.top))
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

        labelled = self.epochs[:: max(1, -(-len(self.epochs) // 8))]
        patches = [Patch(color=BEGINNING, label="at first")]
        patches += [Patch(color=self(epoch), label=f"epoch {epoch}") for epoch in labelled]
        columns = min(len(patches), 5)
        drawing.legend(handles=patches, loc="outside lower center", ncols=columns, frameon=False, fontsize=8)


def _draw_bar(axes: Any, bar: Bar, crowded: bool, colors: _Colors) -> None:
    low, base = 0.0, 2 * bar.y - bar.top
    for (epoch, _), high in zip(bar.stages, bar.heights, strict=True):
        axes.bar(bar.x, high - low, 2 * HALF, base + low, color=colors(epoch), edgecolor="white", linewidth=0.5)
        low = high
    widths = " → ".join(map(str, dict.fromkeys([bar.stages[0][1], bar.width])))
    axes.annotate(
        f"{short_name(bar.label)}\n{widths}",
        (bar.x, base),
        (0, -4),
        textcoords="offset points",
        ha="center",
        va="top",
        fontsize=7 if crowded else 8,
        rotation=90 if crowded else 0,
    )


def _draw_arrows(axes: Any, arrows: Sequence[Arrow], layout: Layout, colors: _Colors) -> None:
    """Layers from one activation to another."""
    source, target = layout.bars[arrows[0].source], layout.bars[arrows[0].target]
    since = arrows[0].since if all(arrow.since is not None for arrow in arrows) else None
    text = ", ".join(short_name(arrow.edge, 16) for arrow in arrows[:3]) + ", …" * (len(arrows) > 3)
    middle, peak = (source.x + target.x) / 2, arrows[0].peak
    if peak is not None:
        _draw_arc(axes, source, target, peak, colors(since))
        y = peak + 0.04
    else:
        color = BAND if since is None else colors(since)
        low, high = [2 * source.y - source.top, 2 * target.y - target.top], [source.top, target.top]
        axes.fill_between([source.x + HALF, target.x - HALF], low, high, color=color, alpha=0.6, linewidth=0)
        y = (source.y + target.y) / 2
        kinds = " and ".join(dict.fromkeys(arrow.kind for arrow in arrows))
        text += f"\n{kinds}\n{sum(arrow.parameters for arrow in arrows):,}"
    if layout.columns <= CROWDED:
        axes.annotate(text, (middle, y), ha="center", va="center", fontsize=7, color="#444")


def _draw_arc(axes: Any, source: Bar, target: Bar, peak: float, color: Any) -> None:
    """Over the bars between two."""
    from matplotlib.patches import FancyArrowPatch
    from matplotlib.path import Path as Curve

    ends, middle = [source.top + 0.01, target.top + 0.01], (source.x + target.x) / 2
    corners = [(source.x, ends[0]), (middle, 2 * peak - sum(ends) / 2), (target.x, ends[1])]
    curve = Curve(corners, [Curve.MOVETO, Curve.CURVE3, Curve.CURVE3])
    axes.add_patch(FancyArrowPatch(path=curve, arrowstyle="-|>", mutation_scale=9, color=color, linewidth=1.3))
