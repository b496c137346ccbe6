"""What the demo says: a line per growth, a table that compares the trainings, a figure."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from dagrow.pictures import draw_widths, empty_figure, log_scale, tidy, write
from dagrow.reporting._data import Dataset
from dagrow.reporting._demo import Config, Training

REACH = 0.9  #: the test accuracy whose epoch the table tells
WIDE = 100  #: columns from which the lines of growths tell more
STYLES = {"grown": ("#0b6e4f", "-"), "random neurons": ("#d1495b", "--"), "from scratch": ("#3d5a80", ":")}
Column = tuple[str, int, Callable[[Mapping[str, Any]], str]]  #: title, width, content
COLUMNS: tuple[Column, ...] = (
    ("#", 2, lambda row: f"{row['number']}"),
    ("ep", 2, lambda row: f"{row['epoch']}"),
    ("where", 7, lambda row: row["where"]),
    ("new", 3, lambda row: f"+{row['neurons']}"),
    ("gain", 7, lambda row: _small(row["gain"])),
    ("heldout", 7, lambda row: _small(row["heldout_gain"])),
    ("+/-", 7, lambda row: _small(row["heldout_error"])),
    ("gamma", 6, lambda row: f"{row['gamma']:.3g}"),
    ("loss at growth", 14, lambda row: f"{row['loss_before']:.4f}->{row['loss_after']:.4f}"),
    ("params", 6, lambda row: f"{row['parameters']}"),
    ("train", 11, lambda row: f"{row['train loss']:.3f} {100 * row['train accuracy']:5.1f}"),
    ("test", 11, lambda row: f"{row['test loss']:.3f} {100 * row['test accuracy']:5.1f}"),
)


def _small(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.5f}" if 1e-3 <= abs(value) < 10 else f"{value:.1e}"


def _columns(width: int) -> list[Column]:
    return [column for column in COLUMNS if width >= WIDE or column[0] not in ("+/-", "gamma")]


def growth_head(width: int) -> str:
    """Titles over :func:`growth_lines`."""
    return " ".join(f"{title:>{size}}" for title, size, _ in _columns(width))


def growth_lines(training: Training, width: int) -> list[str]:
    """A line for each growth after the last epoch."""
    record, growths = training.history[-1], training.history.growths()
    after = {**training.scores[-1], "parameters": record.parameters}
    rows = [{**growth, **after, "number": number} for number, growth in enumerate(growths, 1)]
    return [
        " ".join(f"{content(row):>{size}}" for _, size, content in _columns(width))
        for row in rows[len(rows) - len(record.grown) :]
    ]


def legend(width: int) -> str:
    """What the titles mean."""
    gamma = " gamma: the amplitude that the line search chose." if width >= WIDE else ""
    return (
        "ep: the epoch. gain: slope of the loss along the new neurons, predicted in closed form; heldout: what a "
        f"fan-out fitted on the other folds explains of each.{gamma} loss at growth: on the validation part, "
        "right before and right after. params, train, test: parameters, loss and accuracy in % right after the growths "
        "of the epoch."
    )


def ending(training: Training, config: Config) -> str:
    """Why the growth of a network ended."""
    last = max((record.epoch for record in training.history if record.added), default=0)
    asked = max((record.epoch for record in training.history if record.asked), default=0)
    if asked < last + config.patience:
        return f"Growth was still under way when it was cut off after epoch {asked}."
    return f"Growth ended by itself: for {config.patience} epochs after epoch {last} no neuron was worth adding."


def equal(data: Dataset, config: Config) -> str:
    """What is the same in all trainings, and what is not."""
    steps = -(-len(data.train) // config.batch)
    return (
        f"Equal in all runs: the split, {config.epochs} epochs of {steps} steps with batches of {config.batch} in the "
        f"same order, Adam at a learning rate of {config.lr:g}, the last architecture. The two that grow also start "
        "from the same weights and widen the same layers by as much at the same times, each growth at the amplitude "
        "that is best on the validation part. Nothing was chosen on the test part. Not equal: the run from scratch has "
        "its full size from the first epoch, and the last architecture was told to it by the run that grew."
    )


def refusals(training: Training) -> str | None:
    """A line on the growths that no amplitude made worth it."""
    if not training.refused:
        return None
    return (
        f"{training.refused} of the {len(training.falls)} growths of {training.name} lowered the validation loss at no "
        "amplitude; those neurons came in with zero fan-out."
    )


def comparison(trainings: Sequence[Training], data: Dataset) -> Table:
    """One column per training; the test accuracy comes with its standard error."""
    table = Table("", *(training.name for training in trainings), title="After equal training", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    work = max(training.work for training in trainings)
    rows: dict[str, Callable[[Training], str]] = {
        "hidden widths, start": lambda t: f"{[*t.history.snapshots[0].widths.values()]}",
        "hidden widths, end": lambda t: f"{[*t.widths]}",
        "parameters": lambda t: f"{t.parameters[-1]:,}",
        "loss fall at growths": lambda t: f"{sum(t.falls):.3f}" if t.falls else "-",
        "train loss": lambda t: f"{t.scores[-1]['train loss']:.4f}",
        "train accuracy": lambda t: f"{t.scores[-1]['train accuracy']:.1%}",
        "test loss": lambda t: f"{t.scores[-1]['test loss']:.4f}",
        "test accuracy": lambda t: _with_error(t.scores[-1]["test accuracy"], len(data.test)),
        f"epochs to {REACH:.0%} on test": lambda t: str(t.reached(REACH) or "never"),
        "operations of training": lambda t: f"{t.work / work:.0%}",
        "seconds, all included": lambda t: f"{t.seconds:.1f}",
    }
    for title, content in rows.items():
        table.add_row(title, *map(content, trainings))
    return table


def _with_error(accuracy: float, samples: int) -> str:
    return f"{accuracy:.1%} +/- {(accuracy * (1 - accuracy) / samples) ** 0.5:.1%}"


def figure(trainings: Sequence[Training], data: Dataset, path: Path) -> None:
    """Test loss and accuracy of all trainings over epochs, and the widths of the one that grew.

    Raises:
        FigureError: matplotlib is not installed, or the file cannot be written.
    """
    drawing = empty_figure(13, 4.2)
    loss, accuracy, widths = drawing.subplots(1, 3)
    for training in trainings:
        color, line = STYLES[training.name]
        style = {"color": color, "linestyle": line, "linewidth": 2, "label": training.name}
        loss.plot([score["test loss"] for score in training.scores], **style)
        accuracy.plot([100 * score["test accuracy"] for score in training.scores], **style)
    grown = trainings[0].history
    first = grown.snapshots[0].widths
    draw_widths(widths, [(0, first), *((record.epoch, record.widths) for record in grown)])
    loss.set(title="Test loss", ylabel="cross-entropy")
    log_scale(loss)
    accuracy.set(title="Test accuracy", ylabel="%")
    loss.legend()
    accuracy.legend(loc="lower right")
    for axes in (loss, accuracy, widths):
        tidy(axes)
    drawing.suptitle(f"{data.name}: from {[*first.values()]} to {[*trainings[0].widths]}")
    write(drawing, path)
