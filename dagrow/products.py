"""Sums of products of features over a batch: from rows, or for convolutions at a fraction of that expense.

Rows of a convolution are patches, which repeat every entry of an image for every tap. Where all layers involved slide
over the same grid, the sums are taken from images instead: weight gradients and sums by lag, see
:mod:`dagrow.patches`. Everything else goes by rows, a few samples at a time.
"""

from dataclasses import dataclass
from math import prod

import torch
from einops import rearrange
from torch import Tensor

from dagrow.features import Arriving, Batch, Feature, Pulled, Reads, Sliding
from dagrow.linalg import add_gram, complete
from dagrow.patches import Geometry, Offsets, lagged, patch_gram

__all__ = ["product"]

ENTRIES = 2**20  #: of rows that are held at once


def product(x: Feature, y: Feature, batch: Batch) -> Tensor:
    """The sum over samples and positions of ``x y^T`` ``[dx, dy]``."""
    for first, second, turned in ((x, y, False), (y, x, True)):
        found = _from_images(first, second, batch)
        if found is not None:
            return found.T if turned else found
    return _from_rows(x, y, batch)


def _from_rows(x: Feature, y: Feature, batch: Batch) -> Tensor:
    total, start, step = None, 0, 1
    while start < batch.samples:
        part = batch.part(slice(start, start + step))
        rows = _exact(x.rows(part))
        others = rows if x == y else _exact(y.rows(part))
        kind = torch.promote_types(rows.dtype, others.dtype)
        total = rows.new_zeros(rows.shape[1], others.shape[1], dtype=kind) if total is None else total
        if x == y:
            add_gram(total, rows)
        else:
            total += rows.to(kind).T @ others.to(kind)
        start += part.samples
        step = max(1, ENTRIES * part.samples // max(1, rows.numel() + others.numel()))
    assert total is not None
    if x == y:
        complete(total)
    return total


def _exact(values: Tensor) -> Tensor:
    """At least single precision."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _from_images(x: Feature, y: Feature, batch: Batch) -> Tensor | None:
    """None where images are of no help."""
    if isinstance(x, Arriving):
        if isinstance(y, Arriving):
            return _weighted_gram(x, batch) if x is y else None
        return _pulled_by_lag(x, y, batch) if isinstance(y, Pulled) and x.arrival is y.arrival else None
    patches = _Patches.of(x, batch)
    if patches is None:
        return None
    others = patches if x == y else _Patches.of(y, batch)
    if others is not None and others.edge == patches.edge:
        return patches.with_patches(others)
    picture = y.picture(batch)
    return None if picture is None else patches.with_picture(_exact(picture), isinstance(y, Reads) and y.bias)


@dataclass(frozen=True)
class _Patches:
    """What a convolution reads of an image, with the constant 1 or without."""

    edge: str
    geometry: Geometry
    image: Tensor
    bias: bool

    @classmethod
    def of(cls, x: Feature, batch: Batch) -> "_Patches | None":
        if isinstance(x, Sliding):
            edge, image, bias = x.consumer, x.image(batch), False
        elif isinstance(x, Reads):
            edge, image, bias = x.edge, x.image(batch), x.bias
        else:
            return None
        geometry = batch[edge].geometry
        return None if geometry is None or image is None else cls(edge, geometry, _exact(image), bias)

    @property
    def lines(self) -> list[list[float]]:
        """The weight 1 for every position of the output."""
        return [[1.0] * size for size in self.geometry.sizes(self.image.shape[2:])]

    def with_patches(self, other: "_Patches") -> Tensor | None:
        """By lag."""
        if not self.geometry.dense:
            return None
        core = patch_gram(self.image, other.image, self.geometry, self.lines)
        return self._bordered(core, _sums(other.image, self.geometry, self.lines), other.bias)

    def with_picture(self, picture: Tensor, bias: bool) -> Tensor | None:
        """A weight gradient, where the picture lies on the grid that the layer writes."""
        if list(picture.shape[2:]) != self.geometry.sizes(self.image.shape[2:]):
            return None
        core = self.geometry.crossed(self.image, picture.to(self.image))
        return self._bordered(core, picture.sum((0, *range(2, picture.ndim))).to(core), bias)

    def _bordered(self, core: Tensor, right: Tensor, bias: bool) -> Tensor:
        left = _sums(self.image, self.geometry, self.lines)
        found = _bordered(core, left, right, _count(self.image, self.lines))
        return found[: len(core) + self.bias, : core.shape[1] + bias]


def _weighted_gram(x: Arriving, batch: Batch) -> Tensor | None:
    """``E w p p^T`` of a convolution whose output another one reads as it is."""
    source, arrival = x.source, x.arrival
    if not isinstance(source, Reads) or arrival.image is None:
        return None
    geometry = batch[source.edge].geometry
    lines = _lines(arrival.weights.view(arrival.image))
    if geometry is None or not geometry.dense or lines is None:
        return None
    image = _exact(source.image(batch))
    core, left = patch_gram(image, image, geometry, lines), _sums(image, geometry, lines)
    return _bordered(core, left, left, _count(image, lines))[: len(core) + source.bias, : len(core) + source.bias]


def _pulled_by_lag(x: Arriving, y: Pulled, batch: Batch) -> Tensor | None:
    """``sum over t of p(t + e) v(t)^T``, for every tap e of a convolution that reads what another one writes."""
    source, consumer = x.source, batch[y.goal.edges[0]].geometry
    goals = y.goal.picture(batch)
    if not isinstance(source, Reads) or x.arrival.image is None or goals is None or consumer is None:
        return None
    producer = batch[source.edge].geometry
    if producer is None or any(step != 1 for step in (*producer.stride, *consumer.stride)) or consumer.mode != "zeros":
        return None
    if consumer.stuffing is not None:
        return None
    image, plain = producer.plain(_exact(source.image(batch)))
    goals = _exact(goals).to(image)
    dims = [Offsets(consumer.offsets(d), plain.offsets(d), (1.0,) * size) for d, size in enumerate(x.arrival.image)]
    core = lagged(goals, image, dims)
    if producer.stuffing is not None:
        core = core.flip(tuple(range(core.ndim - plain.space, core.ndim)))
    core = rearrange(core.flatten(1, plain.space).flatten(3), "o e c d -> (c d) (e o)")
    if not source.bias:
        return core
    total = goals.sum(0).flatten(1)
    last = torch.stack([total[:, read >= 0].sum(1) for read in x.arrival.index.T])
    return torch.cat([core, last.flatten()[None]])


def _bordered(core: Tensor, left: Tensor, right: Tensor, count: float) -> Tensor:
    """Sums of products with a constant 1 added on both sides."""
    return torch.cat([
        torch.cat([core, left[:, None]], 1), torch.cat([right[None], right.new_full((1, 1), count)], 1),
    ])  # fmt: skip


def _count(image: Tensor, lines: list[list[float]]) -> float:
    return len(image) * prod(map(sum, lines))


def _sums(image: Tensor, geometry: Geometry, lines: list[list[float]]) -> Tensor:
    """Weighted sums of patches over samples and positions ``[c taps]``."""
    return _outer(lines).to(image).flatten() @ geometry.patches(image.sum(0, keepdim=True))[0]


def _outer(lines: list[list[float]]) -> Tensor:
    found = torch.ones((), dtype=torch.float64)
    for line in lines:
        found = found[..., None] * torch.tensor(line, dtype=torch.float64)
    return found


def _lines(weights: Tensor) -> list[list[float]] | None:
    """Weights as products over the dimensions; None if they are not, or if few of them are 1."""
    middle = [size // 2 for size in weights.shape]
    lines = []
    for d in range(weights.ndim):
        at = tuple(slice(None) if d == other else middle[other] for other in range(weights.ndim))
        lines.append(weights[at].tolist())
    usual = all(2 * sum(weight == 1 for weight in line) > len(line) for line in lines)
    return lines if usual and torch.allclose(_outer(lines), weights.double(), rtol=1e-6) else None
