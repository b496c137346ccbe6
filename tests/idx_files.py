"""IDX files as MNIST has them, but small."""

import gzip
import struct

import numpy as np

from dagrow.reporting._data import NAMES

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
