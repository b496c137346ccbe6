"""Figures of a history: losses, widths and bottleneck over time, and the dag as it grew."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dagrow.figures import blank, check_figure, tidy, write
from dagrow.picture import Arrow, Bar, Picture, picture
from dagrow.records import Record
from dagrow.snapshots import Snapshot

__all__ = ["draw_graph", "draw_plot"]

TRAIN, HELD, SHARE, BEGINNING, BAND = "#3d5a80", "#d1495b", "#0b6e4f", "#b8bec7", "#dfe4ea"
NAMED = 8  #: so many axes have names in a legend, the widest
HALF = 0.07  #: of a bar's width
CROWDED = 16  #: columns of a dag from which there is no room for the names of layers


def draw_plot(records: Sequence[Record], first: Mapping[str, int], path: Path) -> None:
    """Losses, the width of each axis, and the part of the goals that is out of reach, over epochs.

    Args:
        first: widths at the beginning.

    Raises:
        FigureError: matplotlib is not installed, or the file cannot be written.
    """
    check_figure(path)
    drawing = blank(13, 4.2)
    loss, widths, share = drawing.subplots(1, 3)
    _draw_losses(loss, records)
    _draw_widths(widths, records, first)
    _draw_share(share, records)
    for axes in (loss, widths, share):
        tidy(axes)
        axes.xaxis.get_major_locator().set_params(integer=True)
    write(drawing, path)


def _draw_losses(axes: Any, records: Sequence[Record]) -> None:
    epochs = [record.epoch for record in records]
    axes.plot(epochs, [record.train_loss for record in records], color=TRAIN, linewidth=2, label="training")
    held = [(record.epoch, record.validation_loss) for record in records if record.validation_loss is not None]
    if held:
        axes.plot(*zip(*held, strict=True), color=HELD, linewidth=2, label="validation")
    grew = [record for record in records if record.added]
    axes.plot(
        [record.epoch for record in grew], [record.loss for record in grew], "o", color="black", markersize=5,
        markerfacecolor="white", label="grows", linestyle="none",
    )  # fmt: skip
    positive = all(record.train_loss > 0 and record.loss > 0 for record in records)
    axes.set(title="Loss, before growing", yscale="log" if positive else "linear")
    if positive:
        for formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "1235" else "")
    axes.legend()


def _draw_widths(axes: Any, records: Sequence[Record], first: Mapping[str, int]) -> None:
    names = list(dict.fromkeys(name for record in records for name in record.widths))
    last = records[-1].widths if records else {}
    named = sorted(names, key=lambda name: -last.get(name, 0))[:NAMED]
    colors = [_colormap("viridis")(0.9 * number / max(1, len(names) - 1)) for number in range(len(names))]
    for number, name in enumerate(names):
        had = [(record.epoch, record.widths[name]) for record in records if name in record.widths]
        had = [(had[0][0], first[name]), *had] if name in first else had
        label = f"{_short(name)}: {first.get(name, '-')} → {had[-1][1]}" if name in named else None
        axes.step(*zip(*had, strict=True), where="post", color=colors[number], linewidth=2, label=label)
    axes.set(title="Width of each axis, after growing", ylim=(0, None))
    axes.yaxis.get_major_locator().set_params(integer=True)
    if named:
        axes.legend(fontsize=8)


def _draw_share(axes: Any, records: Sequence[Record]) -> None:
    found = [(record.epoch, 100 * record.share) for record in records if record.share is not None]
    if found:
        axes.plot(*zip(*found, strict=True), "o-", color=SHARE, linewidth=2, markersize=4, label="bottleneck")
    axes.set(title="Bottleneck (green) and parameters (grey)", ylabel="% of the goals out of reach")
    parameters = axes.twinx()
    epochs = [record.epoch for record in records]
    parameters.step(epochs, [record.parameters for record in records], where="post", color=BEGINNING, linewidth=2)
    parameters.set(ylabel="parameters", ylim=(0, None))
    parameters.yaxis.label.set_color("gray")
    parameters.tick_params(colors="gray")
    parameters.spines[["top"]].set_visible(False)
    axes.set_zorder(1)
    axes.patch.set_visible(False)


def _colormap(name: str) -> Any:
    from matplotlib import colormaps

    return colormaps[name]


def _short(name: str, most: int = 22) -> str:
    """The end tells names of modules apart."""
    return name if len(name) <= most else f"…{name[1 - most :]}"


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
        self.epochs, self.map = epochs, _colormap("plasma")

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
        f"{_short(bar.label)}\n{text}", (bar.x, base), (0, -4), textcoords="offset points", ha="center", va="top",
        fontsize=7 if crowded else 8, rotation=90 if crowded else 0,
    )  # fmt: skip


def _draw_arrows(axes: Any, found: Picture, same: Sequence[Arrow], colors: _Colors) -> float:
    """Layers from one activation to another; returns how high it reaches."""
    source, target = found.bars[same[0].source], found.bars[same[0].target]
    since = same[0].since if all(arrow.since is not None for arrow in same) else None
    text = ", ".join(_short(arrow.edge, 16) for arrow in same[:3]) + ", …" * (len(same) > 3)
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
