"""What the demo prints and draws."""

from dataclasses import replace

import numpy as np
import pytest
from demo_runs import TINY
from rich.console import Console

from dagrow.errors import FigureError
from dagrow.pictures import check_figure
from dagrow.reporting._demo import compare
from dagrow.reporting._demo_report import comparison, ending, equal, figure, growth_head, growth_lines


@pytest.mark.parametrize("width", [80, 120])
def test_lines_fit_the_terminal_and_hold_the_numbers(data, width):
    head, lines = growth_head(width), []
    assert len(head) <= width

    def trained(training):
        record, scores = training.history[-1], training.scores[-1]
        for grown, line in zip(record.grown, growth_lines(training, width), strict=True):
            lines.append(line)
            assert len(line) <= width
            assert len(line) == len(head)
            falls = f"{grown.loss_before:.4f}->{grown.loss_after:.4f}"
            for part in (grown.where, f"+{grown.neurons}", falls, str(record.parameters)):
                assert part in line
            for part in ("train", "test"):
                assert f"{scores[f'{part} loss']:.3f} {100 * scores[f'{part} accuracy']:5.1f}" in line

    compare(data, TINY, trained=trained)
    assert [int(line.split()[0]) for line in lines] == list(range(1, len(lines) + 1))


def test_the_table_says_what_the_runs_hold(runs, data):
    console = Console(width=80, color_system=None)
    with console.capture() as capture:
        console.print(comparison(runs, data))
    text = capture.get()
    assert max(map(len, text.splitlines())) <= 80
    rows = {line.split("│")[1].strip(): line.split("│")[2:5] for line in text.splitlines() if "│" in line}
    last = [run.scores[-1] for run in runs]
    assert [cell.strip() for cell in rows["test loss"]] == [f"{scores['test loss']:.4f}" for scores in last]
    assert [cell.split()[0] for cell in rows["test accuracy"]] == [f"{scores['test accuracy']:.1%}" for scores in last]
    assert [cell.strip() for cell in rows["parameters"]] == [f"{run.parameters[-1]:,}" for run in runs]
    assert rows["operations of training"][2].strip() == "100%"


def test_the_text_says_how_growth_ended(runs):
    grown = runs[0]
    assert "cut off after epoch 2" in ending(grown, TINY)
    idle = [replace(grown.history[-1], epoch=epoch, asked=True, grown=()) for epoch in (3, 4)]
    patient = replace(grown, history=replace(grown.history, steps=(*grown.history[:2], *idle)))
    assert "ended by itself: for 2 epochs after epoch 2" in ending(patient, TINY)


def test_what_is_equal_is_told(runs, data):
    text = equal(data, TINY)
    assert "3 epochs of 36 steps with batches of 32" in text


@pytest.mark.parametrize(("ending", "magic"), [("png", b"\x89PNG\r\n\x1a\n"), ("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_the_figure_is_a_file_of_its_ending(runs, data, tmp_path, ending, magic):
    path = tmp_path / f"figure.{ending}"
    check_figure(path)
    figure(runs, data, path)
    content = path.read_bytes()
    assert content.startswith(magic)
    assert len(content) > 5000


def test_the_figure_shows_the_runs(runs, data, tmp_path):
    from matplotlib.image import imread

    path = tmp_path / "figure.png"
    figure(runs, data, path)
    image = imread(path)
    assert image.shape[1] > 1000
    for red, green, blue in ((0x0B, 0x6E, 0x4F), (0xD1, 0x49, 0x5B), (0x3D, 0x5A, 0x80)):
        near = np.abs(image[..., :3] * 255 - [red, green, blue]).max(-1) < 3
        assert near.sum() > 100


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
        figure(runs, data, tmp_path / "taken.png")
