"""Figures of a history: losses, widths and bottleneck over time, and the dag as it grew."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dagrow.pictures._figures import (
    BEGINNING,
    SHARE,
    TRAIN,
    VALIDATION,
    check_figure,
    colormap,
    empty_figure,
    short_name,
    tidy,
    write,
)
from dagrow.pictures._records import Record

NAMED = 8  #: so many axes have names in a legend, the widest


def draw_plot(records: Sequence[Record], first: Mapping[str, int], path: Path) -> None:
    """Losses, the width of each axis, and the part of the goals that is out of reach, over epochs.

    Args:
        records: oldest first.
        first: widths at the beginning.
        path: of the figure; its ending is its format.

    Raises:
        FigureError: matplotlib is not installed, or the file cannot be written.
    """
    check_figure(path)
    drawing = empty_figure(13, 4.2)
    loss, widths, share = drawing.subplots(1, 3)
    _draw_losses(loss, records)
    _draw_widths(widths, [(records[0].epoch, first), *((r.epoch, r.widths) for r in records)] if records else [])
    _draw_share(share, records)
    for axes in (loss, widths, share):
        tidy(axes)
        axes.xaxis.get_major_locator().set_params(integer=True)
    write(drawing, path)


def _draw_losses(axes: Any, records: Sequence[Record]) -> None:
    epochs = [record.epoch for record in records]
    axes.plot(epochs, [record.train_loss for record in records], color=TRAIN, linewidth=2, label="training")
    validation = [(record.epoch, record.validation_loss) for record in records if record.validation_loss is not None]
    if validation:
        axes.plot(*zip(*validation, strict=True), color=VALIDATION, linewidth=2, label="validation")
    growing = [record for record in records if record.added]
    axes.plot(
        [record.epoch for record in growing],
        [record.loss for record in growing],
        "o",
        color="black",
        markersize=5,
        markerfacecolor="white",
        label="grows",
        linestyle="none",
    )
    axes.set_title("Loss, before growing")
    if all(record.train_loss > 0 and record.loss > 0 for record in records):
        _log_scale(axes)
    axes.legend()


def _log_scale(axes: Any) -> None:
    """Makes the y axis logarithmic, with plain numbers at round ticks.

    Args:
        axes: of matplotlib.
    """
    axes.set_yscale("log")
    for formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "1235" else "")


def _draw_widths(axes: Any, widths: Sequence[tuple[int, Mapping[str, int]]]) -> None:
    """The width of each axis over epochs.

    Args:
        axes: of matplotlib.
        widths: epochs, oldest first, and the widths of axes in each.
    """
    names = list(dict.fromkeys(name for _, sizes in widths for name in sizes))
    first, last = (widths[0][1], widths[-1][1]) if widths else ({}, {})
    named = sorted(names, key=lambda name: -last.get(name, 0))[:NAMED]
    for number, name in enumerate(names):
        points = [(epoch, sizes[name]) for epoch, sizes in widths if name in sizes]
        label = f"{short_name(name)}: {first.get(name, '-')} → {points[-1][1]}" if name in named else None
        color = colormap("viridis")(0.9 * number / max(1, len(names) - 1))
        axes.step(*zip(*points, strict=True), where="post", color=color, linewidth=2, label=label)
    axes.set(title="Width of each axis, after growing", ylim=(0, None))
    axes.yaxis.get_major_locator().set_params(integer=True)
    if named:
        axes.legend(fontsize=8)


def _draw_share(axes: Any, records: Sequence[Record]) -> None:
    shares = [(record.epoch, 100 * record.share) for record in records if record.share is not None]
    if shares:
        axes.plot(*zip(*shares, strict=True), "o-", color=SHARE, linewidth=2, markersize=4, label="bottleneck")
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
