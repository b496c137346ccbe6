"""What the demo says: a table, who is ahead, a figure that names its lines, and a page with all of it."""

import base64
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from statistics import median
from string import Template
from typing import Any

from rich.table import Table

from dagrow.pictures import empty_figure, rendered, write_bytes
from dagrow.reporting._data import Dataset
from dagrow.reporting._demo import ARMS, CONTINUED, COPIES, ENLARGED, RANDOM, SCRATCH, Config, Run

COLORS = {ENLARGED: "#0b6e4f", SCRATCH: "#d1495b", RANDOM: "#c77d0a", COPIES: "#7b4fa3", CONTINUED: "#6b7280"}
NAMES = {
    ENLARGED: "dagrow.enlarge",
    SCRATCH: "from scratch",
    RANDOM: "random neurons",
    COPIES: "Net2Net copies",
    CONTINUED: "small, goes on",
}
TICKS = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 1.5, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 40, 50, 70, 100)  #: of errors
TOP, GAP = 1.3, 0.058  #: of what is drawn, over the small network's error; between labels, in parts of the height


def errors(runs: Sequence[Run], arm: str, budget: int) -> list[float]:
    """Of all seeds, after a budget by its number from 1, or at once, 0."""
    return [run.arms[arm].errors[budget] for run in runs]


def found(run: Run) -> str:
    """A line on a seed."""
    small, arms = run.arms[CONTINUED].errors[0], run.arms
    listed = ", ".join(f"{arm} {arms[arm].errors[-1]:.1f}" for arm in ARMS)
    return f"seed {run.seed}: stopped improving after {run.steps:,} steps at {small:.1f} %; in the end {listed}"


def _titles(config: Config) -> list[str]:
    return ["at once", *(f"{100 * budget:g} %" for budget in config.budgets)]


def _cells(runs: Sequence[Run], arm: str, config: Config) -> list[tuple[str, str]]:
    """Median, and range if there are several seeds."""
    cells = []
    for budget in range(len(config.budgets) + 1):
        values = errors(runs, arm, budget)
        spread = f"{min(values):.1f}-{max(values):.1f}" if len(values) > 1 else ""
        cells.append((f"{median(values):.1f}", spread))
    return cells


def comparison(runs: Sequence[Run], config: Config) -> Table:
    """A row for each arm."""
    title = f"Test error in %, after further steps in % of those of the small network{_seeds(runs)}"
    table = Table("", *_titles(config), title=title, title_justify="left", show_lines=len(runs) > 1)
    for column in table.columns[1:]:
        column.justify = "right"
    for arm in ARMS:
        table.add_row(NAMES[arm], *("\n".join(filter(None, cell)) for cell in _cells(runs, arm, config)))
    return table


def _seeds(runs: Sequence[Run]) -> str:
    return f"; median and range of {len(runs)} seeds" if len(runs) > 1 else f"; seed {runs[0].seed}"


def ahead(runs: Sequence[Run], config: Config) -> str:
    """On how many seeds dagrow has the least error, budget by budget, and on how many at every budget."""
    numbers = range(1, len(config.budgets) + 1)
    counts = [sum(run.is_ahead(ENLARGED, number) for run in runs) for number in numbers]
    everywhere = sum(all(run.is_ahead(ENLARGED, number) for number in numbers) for run in runs)
    listed = ", ".join(f"{count} at {title}" for count, title in zip(counts, _titles(config)[1:], strict=True))
    return (
        f"{NAMES[ENLARGED]} has the lowest test error of all on so many of {len(runs)} "
        f"{'seed' if len(runs) == 1 else 'seeds'}: {listed}; at every budget on {everywhere}."
    )


def cost(runs: Sequence[Run]) -> str:
    """How long it took to make the networks larger, in seconds and in steps."""
    parts = []
    for arm in (ENLARGED, RANDOM, COPIES):
        seconds = median(run.arms[arm].seconds for run in runs)
        steps = [run.arms[arm].seconds / run.arms[arm].step for run in runs]
        share = median(count / run.steps for count, run in zip(steps, runs, strict=True))
        parts.append(f"{NAMES[arm]} {seconds:.2f} s, as long as {median(steps):.0f} steps ({100 * share:.0f} %)")
    return f"Steps do not count what it took to make the network larger: {'; '.join(parts)}."


def equal(config: Config) -> str:
    """What is the same in all arms, and what is not."""
    return (
        f"Equal in all arms: the split, batches of {config.batch} in the same order, Adam, and for each budget a "
        f"training of its own, with the rate held for {100 * config.held:.0f} % of it and then falling to zero along "
        "half a cosine. Not equal: the rates, which were tuned for each arm and budget on other seeds. Copies get some "
        "noise, without which equal neurons stay equal. Nothing was chosen on the test part. With more time than "
        "this, training from scratch catches up."
    )


def _sizes(data: Dataset, config: Config) -> list[str]:
    """Of the small network and the large one."""
    return ["-".join(map(str, (data.features, *w, data.classes))) for w in (config.widths, config.large)]


def setting(data: Dataset, config: Config) -> str:
    """What is done, in short."""
    small, large = _sizes(data, config)
    return (
        f"{data.name}: {len(data.train):,} images to train on, {len(data.validation):,} to validate, "
        f"{len(data.test):,} to test. A network {small} is trained until its validation loss stops falling. There "
        "is time for a few more steps, not for starting over: train it on, train a large one "
        f"({large}) from scratch, or make it as large as that with new neurons and train on?"
    )


def drawn(runs: Sequence[Run], data: Dataset, config: Config) -> Any:
    """A line for each arm: test error over further steps, named at its end."""
    drawing = empty_figure(9.2, 5.6)
    from matplotlib.ticker import NullLocator

    axes = drawing.subplots()
    places = [100 * budget for budget in (0.0, *config.budgets)]
    ends = {}
    for arm in reversed(ARMS):
        columns = [errors(runs, arm, budget) for budget in range(len(places))]
        middle, first = [max(median(column), 0.01) for column in columns], arm == ENLARGED
        style = {"color": COLORS[arm], "linewidth": 3 if first else 1.8, "zorder": 4 if first else 3}
        axes.plot(places, middle, "o-", markersize=5, **style)
        axes.fill_between(
            places,
            [*map(min, columns)],
            [*map(max, columns)],
            color=COLORS[arm],
            alpha=0.16 if first else 0.06,
            linewidth=0,
        )
        ends[arm] = middle[-1]
    lows = [min(errors(runs, arm, budget)) for arm in ARMS for budget in range(len(places))]
    bottom, top = max(0.8 * min(lows), 0.02), TOP * max(max(errors(runs, CONTINUED, 0)), 0.1)
    axes.set(yscale="log", ylim=(bottom, top), xlim=(-0.02 * places[-1], 1.01 * places[-1]))
    axes.set_xticks(places, [f"{place:g}" for place in places])
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_yticks(*zip(*[(tick, f"{tick:g}") for tick in TICKS if bottom <= tick <= top], strict=True))
    axes.set_xlabel(f"further training steps, in % of the {_steps(runs)} that the small network took")
    axes.set_ylabel("test error, % (logarithmic)")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    _name_lines(axes, ends)
    drawing.suptitle("A trained network has stopped improving: what lowers its error in little time?", fontsize=13)
    axes.set_title(_subtitle(runs, data, config), fontsize=9, color="#52606d", loc="left")
    return drawing


def _steps(runs: Sequence[Run]) -> str:
    least, most = min(run.steps for run in runs), max(run.steps for run in runs)
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"


def _subtitle(runs: Sequence[Run], data: Dataset, config: Config) -> str:
    small, large = _sizes(data, config)
    seeds = f"median of {len(runs)} seeds, shaded: their range" if len(runs) > 1 else f"seed {runs[0].seed}"
    return f"{data.name}\n{small} (small), {large} (large); {seeds}"


def _name_lines(axes: Any, ends: dict[str, float]) -> None:
    """A label at the right of each line, moved apart where lines end close together."""
    to_part = axes.transAxes.inverted().transform
    heights = {arm: to_part(axes.transData.transform((0, end)))[1] for arm, end in ends.items()}
    for arm, at in apart(heights).items():
        axes.annotate(
            f"{NAMES[arm]}  {ends[arm]:.1f} %",
            (1.0, heights[arm]),
            (1.035, at),
            xycoords="axes fraction",
            textcoords="axes fraction",
            color=COLORS[arm],
            va="center",
            fontsize=10,
            fontweight="bold" if arm == ENLARGED else "normal",
            arrowprops={
                "arrowstyle": "-",
                "color": COLORS[arm],
                "linewidth": 0.8,
                "shrinkA": 0,
                "shrinkB": 2,
                "relpos": (0, 0.5),
            },
            annotation_clip=False,
        )


def apart(heights: dict[str, float]) -> dict[str, float]:
    """Places for labels, in their order and at least ``GAP`` from each other, near those that they name."""
    names = sorted(heights, key=lambda name: heights[name])
    placed: list[float] = []
    for name in names:
        placed.append(max(heights[name], placed[-1] + GAP if placed else 0.0))
    for number in reversed(range(len(placed))):
        placed[number] = min(placed[number], 1.0 - GAP * (len(placed) - 1 - number))
    return dict(zip(names, placed, strict=True))


def write_page(runs: Sequence[Run], data: Dataset, config: Config, drawing: Any, path: Path) -> None:
    """The figure, the table and the text as one HTML file that loads nothing.

    Raises:
        FigureError: it cannot be written.
    """
    head = "".join(f"<th>{escape(title)}</th>" for title in ("", *_titles(config)))
    rows = "".join(
        f'<tr style="color:{COLORS[arm]}"><td>{escape(NAMES[arm])}</td>'
        + "".join(f"<td>{middle}<small>{spread}</small></td>" for middle, spread in _cells(runs, arm, config))
        + "</tr>"
        for arm in ARMS
    )
    template = Template(files("dagrow.reporting").joinpath("page.html").read_text(encoding="utf-8"))
    text = template.substitute(
        setting=escape(setting(data, config)),
        figure=base64.b64encode(rendered(drawing, "svg")).decode(),
        caption=escape(f"Test error in %, after further steps in % of those of the small network{_seeds(runs)}"),
        head=head,
        rows=rows,
        ahead=escape(ahead(runs, config)),
        cost=escape(cost(runs)),
        equal=escape(equal(config)),
    )
    write_bytes(text.encode(), path)
