"""What the demo says: a line per growth, a table that compares the runs, a figure."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from dagrow.pictures import blank, tidy, write
from dagrow.reporting._data import Dataset
from dagrow.reporting._demo import HIDDEN, Config, Run, Scores, Step

REACH = 0.9  #: the test accuracy whose epoch the table tells
WIDE = 100  #: columns from which the lines of growths tell more
STYLES = {"grown": ("#0b6e4f", "-"), "random neurons": ("#d1495b", "--"), "from scratch": ("#3d5a80", ":")}
#: title, width, content, whether only a wide terminal shows it
Column = tuple[str, int, Callable[[Step], str], bool]
COLUMNS: tuple[Column, ...] = (
    ("#", 2, lambda s: str(s.number), False),
    ("ep", 2, lambda s: str(s.epoch), False),
    ("where", 7, lambda s: s.where, False),
    ("new", 3, lambda s: f"+{s.neurons}", False),
    ("gain", 7, lambda s: _small(s.gain), False),
    ("heldout", 7, lambda s: _small(s.heldout), False),
    ("+/-", 7, lambda s: _small(s.error), True),
    ("gamma", 6, lambda s: f"{s.gamma:.3g}", True),
    ("loss at growth", 14, lambda s: f"{s.before:.4f}->{s.after:.4f}", False),
    ("params", 6, lambda s: f"{s.parameters}", False),
    ("train", 11, lambda s: _both(s.train), False),
    ("test", 11, lambda s: _both(s.test), False),
)


def _small(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.5f}" if abs(value) < 10 and abs(value) >= 1e-3 else f"{value:.1e}"


def _both(scores: Scores) -> str:
    return f"{scores.loss:.3f} {100 * scores.accuracy:5.1f}"


def _columns(width: int) -> list[Column]:
    return [column for column in COLUMNS if width >= WIDE or not column[3]]


def step_head(width: int) -> str:
    """Titles over :func:`step_line`."""
    return " ".join(f"{title:>{size}}" for title, size, _, _ in _columns(width))


def step_line(step: Step, width: int) -> str:
    """One growth, and the network right after it."""
    return " ".join(f"{content(step):>{size}}" for _, size, content, _ in _columns(width))


def legend(width: int) -> str:
    """What the titles mean."""
    gamma = " gamma: the amplitude that the line search chose." if width >= WIDE else ""
    return (
        "ep: the epoch. gain: slope of the loss along the new neurons, predicted in closed form; heldout: what a "
        f"fan-out fitted on the other folds explains of each.{gamma} loss at growth: on the validation part, "
        "right before and right after. train, test: loss and accuracy in % right after."
    )


def ending(run: Run, config: Config) -> str:
    """Why the growth of a run ended."""
    last = run.steps[-1].epoch if run.steps else 0
    if last + config.patience > min(config.growing, config.epochs):
        return f"Growth was still under way when it was cut off after epoch {min(config.growing, config.epochs)}."
    return f"Growth ended by itself: for {config.patience} epochs after epoch {last} no neuron was worth adding."


def equal(data: Dataset, config: Config) -> str:
    """What is the same in all runs, and what is not."""
    steps = -(-len(data.train) // config.batch)
    return (
        f"Equal in all runs: the split, {config.epochs} epochs of {steps} steps with batches of {config.batch} in the "
        f"same order, Adam at a learning rate of {config.lr:g}, the last architecture. The two that grow also start "
        "from the same weights and widen the same layers by as much at the same times, each growth at the amplitude "
        "that is best on the validation part. Nothing was chosen on the test part. Not equal: the run from scratch has "
        "its full size from the first epoch, and the last architecture was told to it by the run that grew."
    )


def refusals(run: Run) -> str | None:
    """A line on the growths that no amplitude made worth it."""
    refused = sum(step.refused for step in run.steps)
    if not refused:
        return None
    return (
        f"{refused} of the {len(run.steps)} growths of {run.name} lowered the validation loss at no amplitude; "
        "those neurons came in with zero fan-out."
    )


def comparison(runs: Sequence[Run], data: Dataset) -> Table:
    """One column per run; the test accuracy comes with its standard error."""
    table = Table("", *(run.name for run in runs), title="After equal training", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    work = max(run.work for run in runs)
    rows: list[tuple[str, Callable[[Run], str]]] = [
        ("hidden widths, start", lambda r: _widths(r.points[0].widths)),
        ("hidden widths, end", lambda r: _widths(r.last.widths)),
        ("parameters", lambda r: f"{r.last.parameters:,}"),
        ("loss fall at growths", lambda r: f"{r.fall:.3f}" if r.steps else "-"),
        ("train loss", lambda r: f"{r.train.loss:.4f}"),
        ("train accuracy", lambda r: f"{r.train.accuracy:.1%}"),
        ("test loss", lambda r: f"{r.last.test.loss:.4f}"),
        ("test accuracy", lambda r: f"{r.last.test.accuracy:.1%} +/- {_error(r, data):.1%}"),
        (f"epochs to {REACH:.0%} on test", lambda r: str(r.reached(REACH) or "never")),
        ("operations of training", lambda r: f"{r.work / work:.0%}" if work else "-"),
        ("seconds, all included", lambda r: f"{r.seconds:.1f}"),
    ]
    for title, content in rows:
        table.add_row(title, *map(content, runs))
    return table


def _error(run: Run, data: Dataset) -> float:
    accuracy = run.last.test.accuracy
    return (accuracy * (1 - accuracy) / len(data.test)) ** 0.5


def _widths(widths: Sequence[int]) -> str:
    return f"[{', '.join(map(str, widths))}]"


def figure(runs: Sequence[Run], data: Dataset, path: Path) -> None:
    """Test loss and accuracy of all runs over epochs, and the widths of the one that grew.

    Raises:
        FigureError: matplotlib is not installed, or the file cannot be written.
    """
    drawing = blank(13, 4.2)
    loss, accuracy, widths = drawing.subplots(1, 3)
    for run in runs:
        color, line = STYLES.get(run.name, (None, "-"))
        style = {"color": color, "linestyle": line, "linewidth": 2, "label": run.name}
        epochs = [point.epoch for point in run.points]
        loss.plot(epochs, [point.test.loss for point in run.points], **style)
        accuracy.plot(epochs, [100 * point.test.accuracy for point in run.points], **style)
    _draw_widths(widths, runs[0])
    loss.set(title="Test loss", ylabel="cross-entropy", yscale="log")
    for axis in (loss.yaxis.set_major_formatter, loss.yaxis.set_minor_formatter):
        axis(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "1235" else "")
    accuracy.set(title="Test accuracy", ylabel="%")
    loss.legend()
    accuracy.legend(loc="lower right")
    for axes in (loss, accuracy, widths):
        tidy(axes)
    drawing.suptitle(f"{data.name}: from {_widths(runs[0].points[0].widths)} to {_widths(runs[0].last.widths)}")
    write(drawing, path)


def _draw_widths(axes: Any, run: Run) -> None:
    epochs = [point.epoch for point in run.points]
    for index, name in enumerate(HIDDEN):
        sizes = [point.widths[index] for point in run.points]
        color = ("#0b6e4f", "#e09f3e")[index]
        axes.step(epochs, sizes, where="post", color=color, linewidth=2, label=f"{name}: {sizes[-1]}")
    axes.set(title="Width of each hidden layer", ylabel="neurons", ylim=(0, None))
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.legend(loc="lower right")
