"""The demo: its data files, its claims, its lines and its figure."""

import gzip
import re
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console

from dagrow.errors import DataError, FigureError
from dagrow.pictures import check_figure
from dagrow.reporting._data import NAMES, Dataset, digits, mnist, read_idx
from dagrow.reporting._demo import HIDDEN, Config, Training, compare, twin_of
from dagrow.reporting._demo_report import comparison, ending, equal, figure, growth_head, growth_lines, refusals

TINY = Config(epochs=3, growing=2, batch=32)
CODES = {"u1": 8, "i1": 9, "i2": 11, "i4": 12, "f4": 13, "f8": 14}


def idx(array: np.ndarray) -> bytes:
    """An array as an IDX file."""
    head = struct.pack(f">BBBB{array.ndim}I", 0, 0, CODES[array.dtype.str[1:]], array.ndim, *array.shape)
    return head + array.astype(array.dtype.newbyteorder(">")).tobytes()


def write_mnist(folder, *, zipped: bool = False, train: int = 200, test: int = 50, classes: int = 3) -> None:
    """Four small files whose classes can be told apart by where the image is bright."""
    rng = np.random.default_rng(0)
    for (images, labels), n in zip((NAMES[:2], NAMES[2:]), (train, test), strict=True):
        target = np.arange(n, dtype=np.uint8) % classes
        pixels = rng.integers(0, 120, (n, 4, 4), dtype=np.uint8)
        pixels[np.arange(n), target] += 100
        for name, array in ((images, pixels), (labels, target)):
            content = idx(array)
            path = folder / (f"{name}.gz" if zipped else name)
            path.write_bytes(gzip.compress(content, mtime=0) if zipped else content)


@pytest.fixture(scope="module")
def data() -> Dataset:
    return digits(0)


@pytest.fixture(scope="module")
def runs(data) -> list[Training]:
    return compare(data, TINY)


@pytest.mark.parametrize("kind", CODES)
def test_idx_files_give_back_what_was_written(tmp_path, kind):
    array = np.arange(24).reshape(2, 3, 4).astype(kind)
    for name, content in (("plain", idx(array)), ("zipped.gz", gzip.compress(idx(array), mtime=0))):
        (tmp_path / name).write_bytes(content)
        np.testing.assert_array_equal(read_idx(tmp_path / name), array)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "not an IDX file: it starts with nothing"),
        (b"PK\x03\x04 a zip", "not an IDX file: it starts with 50 4b 03 04"),
        (b"\0\0\x07\x01" + bytes(8), "not an IDX file"),
        (b"\0\0\x08\x03\0\0", "ends within its header"),
        (idx(np.zeros((3, 2), np.uint8))[:-1], "truncated: its header announces 18 bytes, it holds 17"),
        (idx(np.zeros((3, 2), np.uint8)) + b"\0", "too long"),
        (b"\0\0\x08\x03" + b"\xff" * 12, "truncated"),
        (gzip.compress(idx(np.zeros((30, 20), np.uint8)), mtime=0)[:-9], "damaged or truncated"),
        (b"\x1f\x8b\x08\0" + b"not gzip at all", "damaged or truncated"),
    ],
)
def test_what_is_no_complete_idx_file_is_refused(tmp_path, content, says):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(DataError, match=re.escape(says)) as caught:
        read_idx(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("zipped", [False, True])
def test_mnist_files_become_three_disjoint_parts(tmp_path, zipped):
    write_mnist(tmp_path, zipped=zipped)
    data = mnist(tmp_path)
    assert (len(data.train), len(data.validation), len(data.test)) == (180, 20, 50)
    assert (data.features, data.classes) == (16, 3)
    assert abs(float(data.train.inputs.mean())) < 1e-5
    assert float(data.train.inputs.std()) == pytest.approx(1, abs=1e-5)
    rows = torch.cat([data.train.inputs, data.validation.inputs])
    assert len(rows.unique(dim=0)) == 200


def test_mnist_is_found_where_torchvision_puts_it(tmp_path):
    (tmp_path / "MNIST" / "raw").mkdir(parents=True)
    write_mnist(tmp_path / "MNIST" / "raw")
    assert len(mnist(tmp_path).test) == 50


@pytest.mark.parametrize(
    ("name", "array", "says"),
    [
        (NAMES[1], np.zeros(7, np.uint8), "200 images, but .* 7 labels"),
        (NAMES[0], np.zeros((200, 16), np.uint8), "images have 3, labels 1"),
        (NAMES[2], np.zeros((50, 5, 5), np.uint8), "images of 16 pixels, .* of 25"),
        (NAMES[3], np.full(50, 9, np.uint8), "holds class 9"),
        (NAMES[1], np.full(200, -1, np.int8), "not whole numbers from 0"),
        (NAMES[0], np.zeros((200, 4, 4), np.uint8), "all training pixels are the same"),
        (NAMES[0], np.zeros((200, 0, 4), np.uint8), "no pixels"),
    ],
)
def test_files_that_do_not_fit_each_other_are_refused(tmp_path, name, array, says):
    write_mnist(tmp_path)
    (tmp_path / name).write_bytes(idx(array))
    with pytest.raises(DataError, match=says):
        mnist(tmp_path)


def test_missing_files_are_all_named(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / NAMES[0]).unlink()
    (tmp_path / NAMES[3]).unlink()
    with pytest.raises(DataError, match=f"lacks {NAMES[0]}, {NAMES[3]}"):
        mnist(tmp_path)
    with pytest.raises(DataError, match="is not a folder"):
        mnist(tmp_path / "nowhere")


def test_the_parts_of_the_digits_share_no_sample(data):
    parts = [data.train, data.validation, data.test]
    assert sum(map(len, parts)) == 1797
    assert len(torch.cat([part.inputs for part in parts]).unique(dim=0)) == 1797


def test_the_loss_falls_at_every_growth_and_neurons_are_worth_it(runs):
    grown = runs[0]
    growths = grown.history.growths()
    assert len(growths) >= 3
    assert all(fall > 0 for fall in grown.falls)
    assert grown.falls == [growth["loss_before"] - growth["loss_after"] for growth in growths]
    for growth in growths:
        assert growth["gain"] > 0
        assert growth["heldout_gain"] > 0


def test_widths_and_parameters_are_those_of_the_growths(runs, data):
    grown, random, scratch = runs
    added = {name: sum(g["neurons"] for g in grown.history.growths() if g["where"] == name) for name in HIDDEN}
    assert grown.widths == tuple(1 + added[name] for name in HIDDEN)
    first, second = grown.widths
    expected = (data.features + 1) * first + (first + 1) * second + (second + 1) * data.classes
    assert [run.parameters[-1] for run in runs] == [expected] * 3
    assert tuple(scratch.history.snapshots[0].widths.values()) == random.widths == grown.widths


def test_the_random_twin_has_the_same_start_and_schedule(runs):
    grown, random, scratch = runs
    assert random.scores[0] == grown.scores[0]
    assert random.history.snapshots[0] == grown.history.snapshots[0]
    assert [record.widths for record in random.history] == [record.widths for record in grown.history]
    assert len(random.falls) == len(grown.falls)
    assert all(fall >= -1e-6 for fall in random.falls)
    assert not scratch.falls
    assert scratch.work > grown.work


def test_a_seed_repeats_the_run_and_leaves_the_global_one_alone(runs, data):
    state = torch.random.get_rng_state()
    again = compare(data, TINY)
    assert torch.equal(state, torch.random.get_rng_state())
    for one, other in zip(runs, again, strict=True):
        assert (one.scores, one.falls, one.refused) == (other.scores, other.falls, other.refused)
        assert one.history.growths() == other.history.growths()


def test_listeners_hear_of_every_epoch_and_its_growths(data):
    names, growths, epochs = [], [], []
    config = replace(TINY, epochs=1, growing=1)

    def trained(training):
        epochs.append(len(training.history))
        growths.extend(training.history[-1].grown)

    found = compare(data, config, lambda training: names.append(training.name), trained)
    assert names == [run.name for run in found]
    assert growths == list(found[0].history[0].grown)
    assert epochs == 3 * [1]


def test_random_neurons_that_no_amplitude_helps_come_in_all_the_same(runs, data, monkeypatch):
    first = runs[0].history[0]
    monkeypatch.setattr("dagrow.growing._line_search.line_search", lambda loss, before, *args, **kwargs: (0.0, before))
    twin = twin_of(runs[0], data, replace(TINY, epochs=1))
    assert twin.history[0].widths == first.widths
    assert twin.refused == len(twin.falls) == len(first.grown) > 0
    assert all(abs(fall) < 1e-6 for fall in twin.falls)
    assert f"{len(twin.falls)} of the {len(twin.falls)} growths" in refusals(twin)
    assert refusals(runs[0]) is None


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


def test_an_accuracy_that_is_not_reached_is_never(runs):
    assert runs[0].reached(0.0) == 0
    assert runs[0].reached(1.1) is None
