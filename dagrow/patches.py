"""What a convolution reads at each position of its output, and sums of products of such patches.

A patch is one row of features: for every input channel the entries of the image under the kernel's taps. Patches
overlap, so they hold every entry of the image many times. Sums of their products are therefore not taken from
patches: at stride 1 the product of two taps depends on their lag alone, but for thin strips at the borders, and the
sums for all lags at once are the weight gradient of a convolution of the image with itself.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import gcd, prod

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["Geometry", "Offsets", "lagged", "patch_gram"]


@dataclass(frozen=True)
class Geometry:
    """How a kernel slides over an image.

    Attributes:
        kernel, stride, dilation: by dimension of space.
        margins: entries added (or, if negative, cut) before and behind each dimension.
        mode: what is added: "zeros", "reflect", "replicate" or "circular".
        stuffing: zeros are put between the entries of the image, so that it is spread by so much, before anything
            else, and taps are counted from behind: that is what a transposed convolution reads.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    margins: tuple[tuple[int, int], ...]
    mode: str = "zeros"
    stuffing: tuple[int, ...] | None = None

    @property
    def space(self) -> int:
        return len(self.kernel)

    def plain(self, image: Tensor) -> tuple[Tensor, "Geometry"]:
        """The same patches from an image with nothing but zeros around it, and nothing in between."""
        spread = image if self.stuffing is None else stuffed(image, self.stuffing)
        if self.mode == "zeros":
            return spread, replace(self, stuffing=None)
        flat = [margin for sides in reversed(self.margins) for margin in sides]
        padded = functional.pad(spread, flat, mode=self.mode)
        return padded, replace(self, margins=((0, 0),) * self.space, mode="zeros", stuffing=None)

    def patches(self, image: Tensor) -> Tensor:
        """``[n, c, *space]`` to ``[n, positions, c taps]``."""
        spread, plain = self.plain(image)
        found = plain.padded(spread)
        for dim in range(self.space):
            span = self.dilation[dim] * (self.kernel[dim] - 1) + 1
            found = found.unfold(2 + dim, span, self.stride[dim])[..., :: self.dilation[dim]]
        if self.stuffing is not None:
            found = found.flip(tuple(range(2 + self.space, found.ndim)))
        found = found.movedim(1, 1 + self.space)
        return found.reshape(len(image), found.shape[1 : 1 + self.space].numel(), -1)

    @property
    def trivial(self) -> bool:
        """Whether each position reads itself alone."""
        ones = (1,) * self.space
        return self.kernel == self.stride == ones and not any(map(any, self.margins)) and self.stuffing in (None, ones)

    @property
    def dense(self) -> bool:
        """Whether every position of the image is the first of a patch, so that patches differ by lags alone."""
        return all(step == 1 for step in self.stride) and prod(self.kernel) > 1

    def offsets(self, dim: int) -> tuple[int, ...]:
        """Where each tap reads, relative to the output position, at stride 1."""
        return tuple(tap * self.dilation[dim] - self.margins[dim][0] for tap in range(self.kernel[dim]))

    def convolved(self, image: Tensor, weight: Tensor) -> Tensor:
        """``W b`` at every position: ``weight [o, c taps]``."""
        spread, plain = self.plain(image)
        kernel = weight.view(len(weight), image.shape[1], *self.kernel)
        kernel = kernel if self.stuffing is None else kernel.flip(tuple(range(2, kernel.ndim)))
        convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[self.space - 1]
        if any(before != behind or before < 0 for before, behind in plain.margins):
            spread, margins = plain.padded(spread), [0] * self.space
        else:
            margins = [before for before, _ in plain.margins]
        return convolve(spread, kernel, stride=self.stride, padding=margins, dilation=self.dilation)

    def crossed(self, image: Tensor, goals: Tensor) -> Tensor:
        """The sum over samples and positions of patches times goals ``[n, o, *out]``: ``[c taps, o]``.

        That is a convolution's weight gradient.
        """
        spread, plain = self.plain(image)
        sums = _weight_gradient(spread, goals, plain.margins, self.kernel, self.dilation, self.stride)
        sums = sums if self.stuffing is None else sums.flip(tuple(range(2, sums.ndim)))
        return sums.flatten(1).T

    def padded(self, image: Tensor) -> Tensor:
        """The image with its margins of zeros."""
        return functional.pad(image, [margin for sides in reversed(self.margins) for margin in sides])

    def tables(self, sizes: Sequence[int]) -> list[Tensor]:
        """Which entry of the image each tap reads, by dimension of space: ``[out, kernel]``, -1 where there is none."""
        found = []
        for d, size in enumerate(sizes):
            line = replace(
                self, kernel=self.kernel[d : d + 1], stride=self.stride[d : d + 1], dilation=self.dilation[d : d + 1],
                margins=self.margins[d : d + 1], stuffing=self.stuffing and self.stuffing[d : d + 1],
            )  # fmt: skip
            entries = torch.arange(1, size + 1, dtype=torch.float64).view(1, 1, -1)
            found.append(line.patches(entries)[0].long() - 1)
        return found

    def sizes(self, image: Sequence[int]) -> list[int]:
        """The output's size for an image's, by dimension of space."""
        stuffing = self.stuffing or (1,) * self.space
        return [
            (stuffing[d] * (size - 1) + 1 + sum(self.margins[d]) - self.dilation[d] * (self.kernel[d] - 1) - 1)
            // self.stride[d] + 1
            for d, size in enumerate(image)
        ]  # fmt: skip


def stuffed(image: Tensor, stuffing: Sequence[int]) -> Tensor:
    """An image with zeros between its entries."""
    if all(step == 1 for step in stuffing):
        return image
    for dim, step in enumerate(stuffing, start=2):
        spread = torch.stack([image, *[torch.zeros_like(image)] * (step - 1)], dim + 1).flatten(dim, dim + 1)
        image = spread.narrow(dim, 0, spread.shape[dim] - step + 1)
    return image


def _weight_gradient(
    image: Tensor, goals: Tensor, margins: Sequence[tuple[int, int]], kernel: Sequence[int], dilation: Sequence[int],
    stride: Sequence[int] | None = None,
) -> Tensor:  # fmt: skip
    """``sum over n and t of goals(t) image(t stride + k dilation - margin)^T``: ``[o, c, *kernel]``."""
    common = [max(0, min(sides)) for sides in margins]  # what the convolution adds by itself need not be copied
    rest = [side - shared for sides, shared in reversed(list(zip(margins, common, strict=True))) for side in sides]
    image = functional.pad(image, rest) if any(rest) else image
    weight, ones = image.new_empty(goals.shape[1], image.shape[1], *kernel), [1] * len(kernel)
    mask = [False, True, False]
    return torch.ops.aten.convolution_backward(
        goals, image, weight, None, stride or ones, common, dilation, False, [0] * len(kernel), 1, mask
    )[1]  # fmt: skip


@dataclass(frozen=True)
class Offsets:
    """One dimension of space in :func:`lagged`.

    Attributes:
        first, second: offsets e and d.
        weights: ``w(s)`` for s from 0; it is 0 outside and should be 1 at most places.
    """

    first: tuple[int, ...]
    second: tuple[int, ...]
    weights: tuple[float, ...]

    @property
    def lags(self) -> range:
        """All lags ``e + d``, by their common step."""
        sums = sorted({e + d for e in self.first for d in self.second})
        return range(sums[0], sums[-1] + 1, gcd(*(lag - sums[0] for lag in sums)) or 1)

    def table(self) -> Tensor:
        """Which of the lags belongs to e and d ``[E, D]``."""
        lags = self.lags
        return torch.tensor([[lags.index(e + d) for d in self.second] for e in self.first])

    def strips(self, left: int, right: int) -> "list[_Strip]":
        """Where the weight is not 1, for images of these sizes."""
        found = []
        for s in range(min(self.first) - 1 - left, len(self.weights) + left + max(self.first) + 1):
            weight = self.weights[s] if 0 <= s < len(self.weights) else 0.0
            rows = [i for i, e in enumerate(self.first) if 0 <= s - e < left]
            columns = [j for j, d in enumerate(self.second) if 0 <= s + d < right]
            if weight != 1 and rows and columns:
                found.append(_Strip(
                    weight - 1, rows, columns, [s - self.first[i] for i in rows], [s + self.second[j] for j in columns]
                ))  # fmt: skip
        return found


@dataclass(frozen=True)
class _Strip:
    """One s: the offsets e and d for which both images have a line there, and these lines."""

    factor: float
    first: list[int]
    second: list[int]
    left: list[int]
    right: list[int]


def lagged(left: Tensor, right: Tensor, dims: Sequence[Offsets]) -> Tensor:
    """``sum over n and u of w(u + e) left(u) right(u + e + d)^T``, ``[a, *E, b, *D]``, for images ``[n, a, *space]``.

    Images are zero outside; weights are products over the dimensions. Where all weights are 1 the sum depends on the
    lag ``e + d`` alone; strips ``s = u + e`` make up for the rest, dimension by dimension.
    """
    space, (a, b) = len(dims), (left.shape[1], right.shape[1])
    total = left.new_zeros(*(size for o in dims for size in (len(o.first), len(o.second))), a, b)
    strips = [[None, *o.strips(*sizes)] for o, *sizes in zip(dims, left.shape[2:], right.shape[2:], strict=True)]
    for chosen in itertools.product(*strips):
        lines = [(d, strip) for d, strip in enumerate(chosen) if strip is not None]
        kept = [d for d, strip in enumerate(chosen) if strip is None]
        x = _lines_first(left, [(d, strip.left) for d, strip in lines], kept)
        same = left is right and all(strip.left == strip.right for _, strip in lines)
        y = x if same else _lines_first(right, [(d, strip.right) for d, strip in lines], kept)
        sums = _by_offsets(_by_lag(x, y, [dims[d] for d in kept]), [dims[d] for d in kept])
        firsts, seconds = [len(strip.first) for _, strip in lines], [len(strip.second) for _, strip in lines]
        sums = sums.reshape(*sums.shape[:-2], *firsts, a, *seconds, b)
        start, count = 2 * len(kept), len(lines)  # dimensions: E, D of those kept; E of lines; a; D of lines; b
        where = {d: (2 * i, 2 * i + 1) for i, d in enumerate(kept)}
        where |= {d: (start + i, start + count + 1 + i) for i, (d, _) in enumerate(lines)}
        order = [*(at for d in range(space) for at in where[d]), start + count, sums.ndim - 1]
        index = [slice(None)] * (2 * space)
        for d, strip in lines:
            index[2 * d] = slice(strip.first[0], strip.first[-1] + 1)
            index[2 * d + 1] = slice(strip.second[0], strip.second[-1] + 1)
        total[tuple(index)].add_(sums.permute(order), alpha=prod(strip.factor for _, strip in lines))
    evens, odds = range(0, 2 * space, 2), range(1, 2 * space, 2)
    return total.permute(2 * space, *evens, 2 * space + 1, *odds)


def _lines_first(image: Tensor, lines: Sequence[tuple[int, list[int]]], kept: Sequence[int]) -> Tensor:
    """Some lines of some dimensions as channels: ``[n, lines c, *kept]``."""
    for d, chosen in lines:
        image = image.index_select(2 + d, torch.tensor(chosen, device=image.device))
    order = (0, *(2 + d for d, _ in lines), 1, *(2 + d for d in kept))
    return image.permute(order).flatten(1, 1 + len(lines)) if lines else image


def _by_offsets(sums: Tensor, dims: Sequence[Offsets]) -> Tensor:
    """``[*lags, a, b]`` to ``[E, D, ..., a, b]``."""
    for at, offsets in enumerate(dims):
        table = offsets.table()
        sums = sums.index_select(2 * at, table.flatten()).unflatten(2 * at, table.shape)
    return sums


def _by_lag(left: Tensor, right: Tensor, dims: Sequence[Offsets]) -> Tensor:
    """``sum over n and u of left(u) right(u + lag)^T`` ``[*lags, a, b]``; of an image with itself, half of the lags."""
    if not dims:
        return left.T @ right
    lags = [offsets.lags for offsets in dims]
    mirrored = left is right and all(line[0] == -line[-1] for line in lags)
    used = [lags[0][len(lags[0]) // 2 :], *lags[1:]] if mirrored else lags
    sides = [(-line[0], before + line[-1] - size)
             for line, before, size in zip(used, left.shape[2:], right.shape[2:], strict=True)]  # fmt: skip
    sums = _weight_gradient(right, left, sides, [len(line) for line in used], [line.step for line in used])
    sums = sums.movedim((0, 1), (-2, -1))
    if not mirrored:
        return sums
    return torch.cat([sums[1:].flip(tuple(range(len(dims)))).mT, sums])


def patch_gram(left: Tensor, right: Tensor, geometry: Geometry, weights: Sequence[Sequence[float]]) -> Tensor:
    """The weighted sum over samples and positions of products of two images' patches ``[c taps, c' taps]``.

    Weights are products over the dimensions of the output.
    """
    same = left is right
    left, plain = geometry.plain(left)
    right = left if same else geometry.plain(right)[0]  # of one image with itself, half of the lags are enough
    dims = []
    for d, line in enumerate(weights):
        offsets = plain.offsets(d)
        dims.append(Offsets(tuple(-offset for offset in offsets), offsets, tuple(line)))
    sums = lagged(left, right, dims)
    if geometry.stuffing is not None:
        space = geometry.space
        sums = sums.flip((*range(1, 1 + space), *range(2 + space, 2 + 2 * space)))
    return sums.flatten(1 + geometry.space).flatten(0, geometry.space)
