"""Data of the demo: the digits that come with scikit-learn, or MNIST as IDX files."""

import gzip
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dagrow.errors import DataError

#: the type code in an IDX file's magic number -> numpy type (big endian)
TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


@dataclass(frozen=True, eq=False)
class Samples:
    """Inputs ``[n, i]`` and their classes ``[n]``."""

    inputs: Tensor
    target: Tensor

    def __len__(self) -> int:
        return len(self.target)

    def split(self, first: int) -> tuple["Samples", "Samples"]:
        """The first samples, and the others."""
        return Samples(self.inputs[:first], self.target[:first]), Samples(self.inputs[first:], self.target[first:])

    def shuffled(self, seed: int) -> "Samples":
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return Samples(self.inputs[order], self.target[order])


@dataclass(frozen=True, eq=False)
class Dataset:
    """Three disjoint parts: to train on, to choose amplitudes on, to report on."""

    name: str
    train: Samples
    validation: Samples
    test: Samples
    classes: int

    @property
    def features(self) -> int:
        return self.train.inputs.shape[1]


def digits(seed: int = 0) -> Dataset:
    """Images of 8 x 8 pixels, bundled with scikit-learn, each at the nine places up to a pixel away from its own.

    Args:
        seed: of the split.

    Returns:
        Of the 1797, a fifth to test and a fifth of the rest to validate; no image is in two parts, shifted or not.

    Raises:
        DataError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(f'the digits come with scikit-learn ({error}): pip install "dagrow[demo]"') from error
    pixels, labels = load_digits(return_X_y=True)
    samples = Samples(torch.as_tensor(pixels, dtype=torch.float32), torch.as_tensor(labels).long()).shuffled(seed)
    test, rest = samples.split(len(samples) // 5)
    data = _standardized("digits of scikit-learn, shifted by up to one pixel", rest, test, 5)
    parts = [_shifted(part, 8) for part in (data.train, data.validation, data.test)]
    return Dataset(data.name, parts[0], parts[1], parts[2], data.classes)


def _shifted(samples: Samples, side: int) -> Samples:
    """Square images at nine places, with the darkest pixel where nothing is known."""
    images = samples.inputs.view(-1, side, side)
    wide = nn.functional.pad(images, (1, 1, 1, 1), value=float(images.min()))
    shifted = [wide[:, i : i + side, j : j + side] for i in range(3) for j in range(3)]
    return Samples(torch.cat(shifted).flatten(1), samples.target.repeat(9))


def mnist(folder: str | Path, seed: int = 0) -> Dataset:
    """MNIST or a data set in its files' format: a tenth of the training images to validate, t10k to test.

    Args:
        folder: where the four IDX files are, gzipped or not; torchvision's ``MNIST/raw`` below it does as well.
        seed: of the split.

    Returns:
        Its three parts, standardized by what is trained on.

    Raises:
        DataError: a file is missing, damaged, or does not fit the others.
    """
    folder = Path(folder)
    files = _idx_files(folder)
    train, test = _images(files[0], files[1]), _images(files[2], files[3])
    if train.inputs.shape[1] != test.inputs.shape[1]:
        raise DataError(
            f"{files[0]} holds images of {train.inputs.shape[1]} pixels, {files[2]} of {test.inputs.shape[1]}."
        )
    if int(test.target.max()) > int(train.target.max()):
        raise DataError(f"{files[3]} holds class {int(test.target.max())}, which {files[1]} does not.")
    return _standardized(f"IDX files in {folder.resolve().name}", train.shuffled(seed), test, 10)


def _standardized(name: str, rest: Samples, test: Samples, part: int) -> Dataset:
    """One ``part``-th of the rest is held out to validate; one mean and one scale, those of what is trained on."""
    validation, train = rest.split(len(rest) // part)
    if not len(validation):
        raise DataError(f"{name}: {len(rest)} training images are too few, {part} is the least.")
    mean, scale = train.inputs.mean(), train.inputs.std()
    if not scale > 0:
        raise DataError(f"{name}: all training pixels are the same.")
    parts = [Samples((samples.inputs - mean) / scale, samples.target) for samples in (train, validation, test)]
    return Dataset(name, parts[0], parts[1], parts[2], int(rest.target.max()) + 1)


def _idx_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; give the one with MNIST's IDX files.")
    places = (folder / "MNIST" / "raw", folder)
    candidates = [(name, place / file) for place in places for name in NAMES for file in (f"{name}.gz", name)]
    files = {name: path for name, path in candidates if path.is_file()}  # of several the last, the plain one
    missing = [name for name in NAMES if name not in files]
    if missing:
        raise DataError(f"{folder} lacks {', '.join(missing)} (each may end in .gz).")
    return [files[name] for name in NAMES]


def _images(images: Path, labels: Path) -> Samples:
    pixels, target = read_idx(images), read_idx(labels)
    if pixels.ndim != 3 or target.ndim != 1:
        raise DataError(
            f"{images} and {labels} hold {pixels.ndim} and {target.ndim} dimensions; images have 3, labels 1."
        )
    if len(pixels) != len(target):
        raise DataError(f"{images} holds {len(pixels)} images, but {labels} {len(target)} labels.")
    if not pixels.size:
        raise DataError(f"{images} holds no pixels.")
    if target.dtype.kind not in "iu" or target.min() < 0:
        raise DataError(f"{labels} holds labels that are not whole numbers from 0.")
    inputs = torch.from_numpy(pixels.astype(np.float32)).flatten(1)
    return Samples(inputs, torch.from_numpy(target.astype(np.int64)))


def read_idx(path: str | Path) -> np.ndarray:
    """The array in an IDX file: two zero bytes, a type code, the number of dimensions, their sizes, the entries."""
    content = _unzipped(Path(path))
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in TYPES or not content[3]:
        raise DataError(f"{path} is not an IDX file: it starts with {content[:4].hex(' ') or 'nothing'}.")
    start = 4 + 4 * content[3]
    if len(content) < start:
        raise DataError(f"{path} is truncated: it ends within its header.")
    shape, kind = np.frombuffer(content, ">u4", content[3], 4).tolist(), np.dtype(TYPES[content[2]])
    expected = start + math.prod(shape) * kind.itemsize
    if len(content) != expected:
        state = "truncated" if len(content) < expected else "too long"
        raise DataError(f"{path} is {state}: its header announces {expected} bytes, it holds {len(content)}.")
    return np.frombuffer(content, kind, offset=start).reshape(shape)


def _unzipped(path: Path) -> bytes:
    """The file's content, unpacked if it is gzipped, whatever its name says."""
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is damaged or truncated: it does not unpack ({error}).") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
