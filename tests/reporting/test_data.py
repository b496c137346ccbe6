"""The data of the demo: IDX files, MNIST and digits."""

import gzip
import itertools
import re

import numpy as np
import pytest
import torch
from idx_files import CODES, idx, write_mnist

from dagrow.errors import DataError
from dagrow.reporting._data import NAMES, mnist, read_idx


def test_the_parts_of_the_digits_share_no_sample(data):
    parts = [data.train, data.validation, data.test]
    assert sum(map(len, parts)) == 9 * 1797
    for one, other in itertools.combinations(parts, 2):
        both = torch.cat([one.inputs.unique(dim=0), other.inputs.unique(dim=0)])
        assert len(both.unique(dim=0)) == len(both)


def test_digits_are_shown_at_nine_places(data):
    images = data.test.inputs.view(9, -1, 8, 8)
    assert len(data.test.target.view(9, -1).unique(dim=0)) == 1
    middle, dark = images[4], images.min()
    for place in range(9):
        down, right = 1 - place // 3, 1 - place % 3
        moved = torch.roll(images[place], (-down, -right), (1, 2))
        assert torch.equal(moved[:, 1:-1, 1:-1], middle[:, 1:-1, 1:-1])
    assert torch.equal(images[0, :, 0], torch.full_like(images[0, :, 0], float(dark)))


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
