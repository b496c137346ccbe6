"""What the demo prints, draws and writes."""

import base64
import re
from itertools import pairwise

import numpy as np
import pytest
from demo_runs import TINY
from matplotlib.text import Text
from rich.console import Console

from dagrow.errors import FigureError
from dagrow.pictures import check_figure, write
from dagrow.reporting._demo import ARMS, CONTINUED, DIGITS, ENLARGED, SCRATCH, Outcome, Run
from dagrow.reporting._demo_report import (
    COLORS,
    GAP,
    NAMES,
    ahead,
    apart,
    comparison,
    cost,
    drawn,
    equal,
    found,
    setting,
    write_page,
)


def invented(seed, **changed):
    """A run with errors of 9, 5 and 4 % of dagrow and one more of all others."""
    arms = {arm: Outcome(0.5, 0.001, [10.0, 6.0, 5.0]) for arm in ARMS}
    arms[ENLARGED] = Outcome(0.5, 0.001, [9.0, 5.0, 4.0])
    return Run(seed, 1000, {**arms, **changed})


def shown(table):
    console = Console(width=80, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_the_table_says_what_the_runs_hold_in_80_columns(runs):
    text = shown(comparison(runs, TINY))
    assert max(map(len, text.splitlines())) <= 80
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    rows = {line[0]: (line[1:], below[1:]) for line, below in pairwise(lines) if line[0]}
    assert set(rows) == set(NAMES.values())
    for arm in ARMS:
        both = [sorted(run.arms[arm].errors[budget] for run in runs) for budget in range(3)]
        assert rows[NAMES[arm]][0] == [f"{sum(pair) / 2:.1f}" for pair in both]
        assert rows[NAMES[arm]][1] == [f"{low:.1f}-{high:.1f}" for low, high in both]


def test_one_seed_has_no_range(runs):
    text = shown(comparison(runs[:1], TINY))
    assert "seed 0" in text
    assert "-" not in text


def test_the_table_of_the_defaults_does_not_wrap_in_80_columns():
    several = [invented(seed) for seed in (0, 1)]
    for invention in several:
        for outcome in invention.arms.values():
            outcome.errors = [89.1 + invention.seed, 42.7, 31.5 + invention.seed, 26.2, 21.4]
    lines = shown(comparison(several, DIGITS)).splitlines()
    assert sum(line.startswith("│") for line in lines) == 2 * len(ARMS)
    assert any("89.1-90.1" in line for line in lines)


def test_who_is_ahead_is_counted_whoever_it_is():
    better = {SCRATCH: Outcome(0.0, 0.001, [90.0, 6.0, 4.0])}  # as good as dagrow is not behind it
    assert ahead([invented(0)], TINY).endswith("all on so many of 1 seed: 1 at 10 %, 1 at 30 %; at every budget on 1.")
    assert "of 3 seeds: 3 at 10 %, 1 at 30 %; at every budget on 1." in ahead(
        [invented(0), invented(1, **better), invented(2, **better)], TINY
    )


def test_what_growing_took_is_told_in_steps():
    text = cost([invented(0)])
    assert f"{NAMES[ENLARGED]} 0.50 s, as long as 500 steps (50 %)" in text


def test_the_text_tells_what_is_done_and_equal(data):
    text = setting(data, TINY)
    assert "A network 64-4-5-10" in text
    assert "(64-10-13-10)" in text
    assert "10,359 images to train on" in text
    assert "batches of 100" in equal(TINY)
    assert "held for 40 %" in equal(TINY)
    assert "stopped improving after 1,000 steps at 10.0 %; in the end dagrow 4.0, " in found(invented(3))


def labels(drawing):
    return [text for text in drawing.axes[0].texts if text.get_text()]


def test_each_line_is_named_at_its_end_and_labels_lie_apart(runs, data):
    for some in (runs, runs[:1], [invented(0)]):  # of the last, four lines end at one point
        drawing = drawn(some, data, TINY)
        drawing.draw_without_rendering()
        texts = labels(drawing)
        assert {text.get_text().split("  ")[0] for text in texts} == set(NAMES.values())
        assert {text.get_color() for text in texts} == set(COLORS.values())
        boxes = sorted((Text.get_window_extent(text) for text in texts), key=lambda box: box.y0)
        assert all(low.y1 <= high.y0 for low, high in pairwise(boxes))
        assert max(box.x1 for box in boxes) <= drawing.bbox.x1
        assert min(box.y0 for box in boxes) >= drawing.bbox.y0


def test_the_lines_are_the_medians_and_axes_have_units(runs, data):
    drawing = drawn(runs, data, TINY)
    (axes,) = drawing.axes
    lines = {line.get_color(): line.get_ydata() for line in axes.lines}
    for arm in ARMS:
        both = [[run.arms[arm].errors[budget] for run in runs] for budget in range(3)]
        assert lines[COLORS[arm]] == pytest.approx([sum(pair) / 2 for pair in both])
    assert list(axes.lines[0].get_xdata()) == pytest.approx([0, 10, 30])
    assert "test error, %" in axes.get_ylabel()
    assert "further training steps, in % of the" in axes.get_xlabel()
    assert axes.get_ylim()[1] > max(run.arms[CONTINUED].errors[0] for run in runs)


def test_errors_of_zero_can_be_drawn(data):
    perfect = {arm: Outcome(0.5, 0.001, [0.0, 0.0, 0.0]) for arm in ARMS}
    drawing = drawn([invented(0, **perfect)], data, TINY)
    drawing.draw_without_rendering()
    assert len(labels(drawing)) == len(ARMS)


def test_labels_keep_their_order_and_stay_inside():
    heights = {"a": 0.99, "b": 0.98, "c": 0.5, "d": 0.0, "e": 0.01}
    placed = apart(heights)
    assert sorted(placed, key=placed.__getitem__) == sorted(heights, key=heights.__getitem__)
    values = np.sort([*placed.values()])
    assert np.diff(values).min() >= GAP - 1e-12
    assert values.min() >= 0
    assert values.max() <= 1
    assert placed["c"] == 0.5


def test_the_page_holds_figure_table_and_text_and_loads_nothing(runs, data, tmp_path):
    path = tmp_path / "page.html"
    write_page(runs, data, TINY, drawn(runs, data, TINY), path)
    page = path.read_text(encoding="utf-8")
    image = re.search(r"data:image/svg\+xml;base64,([^\"]+)", page)
    assert image
    assert b"<svg" in base64.b64decode(image[1])
    assert page.count("<tr") == 1 + len(ARMS)
    assert ahead(runs, TINY) in page
    assert "$" not in page.replace(image[1], "")
    assert not re.search(r"(src|href)=\"(?!data:)", page)


@pytest.mark.parametrize(("ending", "magic"), [("png", b"\x89PNG\r\n\x1a\n"), ("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_the_figure_is_a_file_of_its_ending(runs, data, tmp_path, ending, magic):
    path = tmp_path / f"figure.{ending}"
    check_figure(path)
    write(drawn(runs, data, TINY), path)
    content = path.read_bytes()
    assert content.startswith(magic)
    assert len(content) > 5000


def test_a_figure_that_cannot_be_written_is_found_out(runs, data, tmp_path):
    for path, says in (
        (tmp_path / "figure.txt", "must end in one of"),
        (tmp_path / "figure", "must end in one of"),
        (tmp_path / "no" / "figure.png", "there is no folder"),
    ):
        with pytest.raises(FigureError, match=says):
            check_figure(path)
    (tmp_path / "taken.png").mkdir()
    with pytest.raises(FigureError, match="is a folder"):
        check_figure(tmp_path / "taken.png")
    with pytest.raises(FigureError, match="cannot be written"):
        write(drawn(runs, data, TINY), tmp_path / "taken.png")
