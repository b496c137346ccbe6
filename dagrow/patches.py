"""What a convolution reads at each position of its output, and sums of products of such patches.

A patch is one row of features: for every input channel the entries of the image under the kernel's taps. Patches
overlap, so they hold every entry of the image many times. Sums of their products are therefore not taken from
patches: at stride 1 the product of two taps depends on their lag alone, but for thin strips at the borders, and the
sums for all lags at once are the weight gradient of a convolution of the image with itself.

Sums may be taken for several groups of samples at once: each group then has channels of its own, ``[n, G c, *space]``,
as in a grouped convolution.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import gcd, prod

import torch
from einops import rearrange
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

    def convolved(self, image: Tensor, weight: Tensor, groups: int = 1) -> Tensor:
        """``W b`` at every position: ``weight [G o, c taps]``."""
        spread, plain = self.plain(image)
        kernel = weight.view(len(weight), image.shape[1] // groups, *self.kernel)
        kernel = kernel if self.stuffing is None else kernel.flip(tuple(range(2, kernel.ndim)))
        convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[self.space - 1]
        if any(before != behind or before < 0 for before, behind in plain.margins):
            spread, margins = plain.padded(spread), [0] * self.space
        else:
            margins = [before for before, _ in plain.margins]
        return convolve(spread, kernel, stride=self.stride, padding=margins, dilation=self.dilation, groups=groups)

    def crossed(self, image: Tensor, goals: Tensor, groups: int = 1) -> Tensor:
        """The sum over samples and positions of patches times goals ``[n, G o, *out]``: ``[G, c taps, o]``.

        That is a convolution's weight gradient.
        """
        spread, plain = self.plain(image)
        sums = _weight_gradient(spread, goals, plain.margins, self.kernel, self.dilation, groups, self.stride)
        sums = sums if self.stuffing is None else sums.flip(tuple(range(2, sums.ndim)))
        return sums.unflatten(0, (groups, -1)).flatten(2).mT

    def summed(self, image: Tensor, weights: Sequence[Sequence[float]]) -> Tensor:
        """Weighted sums of patches over positions: ``[..., *space]`` to ``[..., taps]``."""
        first = image.ndim - self.space
        for table, line in zip(self.tables(image.shape[first:]), weights, strict=True):
            read = functional.one_hot(table + 1, image.shape[first] + 1)[..., 1:].to(image)
            image = torch.tensordot(image, torch.tensordot(image.new_tensor(line), read, 1), ([first], [1]))
        return image.flatten(first)

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
    groups: int, stride: Sequence[int] | None = None,
) -> Tensor:  # fmt: skip
    """``sum over n and t of goals(t) image(t stride + k dilation - margin)^T``: ``[G o, c, *kernel]``."""
    common = [max(0, min(sides)) for sides in margins]  # what the convolution adds by itself need not be copied
    rest = [side - shared for sides, shared in reversed(list(zip(margins, common, strict=True))) for side in sides]
    image = functional.pad(image, rest) if any(rest) else image
    weight, ones = image.new_empty(goals.shape[1], image.shape[1] // groups, *kernel), [1] * len(kernel)
    mask = [False, True, False]
    return torch.ops.aten.convolution_backward(
        goals, image, weight, None, stride or ones, common, dilation, False, [0] * len(kernel), groups, mask
    )[1]  # fmt: skip


@dataclass(frozen=True)
class Offsets:
    """One dimension of space in :func:`lagged`.

    Attributes:
        first, second: offsets e and d; those of d increase evenly.
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

    def window(self, i: int) -> slice:
        """Which of the lags belong to the i-th offset e and to all d, evenly spaced."""
        lags = self.lags
        at = [lags.index(self.first[i] + d) for d in self.second]
        return slice(at[0], at[-1] + 1, at[1] - at[0] if len(at) > 1 else 1)

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


def lagged(left: Tensor, right: Tensor, dims: Sequence[Offsets], groups: int = 1) -> Tensor:
    """``sum over n and u of w(u + e) left(u) right(u + e + d)^T``, ``[G, a, *E, b, *D]``, of ``[n, G a, *space]``.

    Images are zero outside; weights are products over the dimensions. Where all weights are 1 the sum depends on the
    lag ``e + d`` alone; strips ``s = u + e`` make up for the rest, dimension by dimension.
    """
    offsets = [*(len(o.first) for o in dims), *(len(o.second) for o in dims)]
    total = left.new_zeros(*offsets, groups, left.shape[1] // groups, right.shape[1] // groups)
    strips = [[None, *o.strips(*sizes)] for o, *sizes in zip(dims, left.shape[2:], right.shape[2:], strict=True)]
    for chosen in itertools.product(*strips):
        lines = [(d, strip) for d, strip in enumerate(chosen) if strip is not None]
        kept = [d for d, strip in enumerate(chosen) if strip is None]
        x = _lines_first(left, [(d, strip.left) for d, strip in lines], kept, groups)
        same = left is right and all(strip.left == strip.right for _, strip in lines)
        y = x if same else _lines_first(right, [(d, strip.right) for d, strip in lines], kept, groups)
        sums = _by_lag(x, y, [dims[d] for d in kept], groups)
        sums = sums.unflatten(-1, (*(len(strip.second) for _, strip in lines), -1))
        sums = sums.unflatten(1 + len(kept), (*(len(strip.first) for _, strip in lines), -1))
        _add(total, sums, dims, chosen)
    space = len(dims)
    return total.permute(2 * space, 2 * space + 1, *range(space), 2 * space + 2, *range(space, 2 * space))


def _add(total: Tensor, sums: Tensor, dims: Sequence[Offsets], chosen: "Sequence[_Strip | None]") -> None:
    """Adds sums ``[*lags, G, *E of strips, a, *D of strips, b]`` to those by offset ``[*E, *D, G, a, b]``."""
    kept, count = sum(strip is None for strip in chosen), sum(strip is not None for strip in chosen)
    by_lag, by_strip = iter(range(kept)), iter(range(kept + 2 + count, sums.ndim - 1))
    columns = [next(by_lag if strip is None else by_strip) for strip in chosen]
    order = [*range(kept + 1, kept + 1 + count), *columns, kept, kept + 1 + count, sums.ndim - 1]
    factor = prod(strip.factor for strip in chosen if strip is not None)
    second = [slice(None) if strip is None else _span(strip.second) for strip in chosen]
    firsts: list[Sequence[int | _Strip]] = [
        range(len(o.first)) if strip is None else [strip] for o, strip in zip(dims, chosen, strict=True)
    ]
    for first in itertools.product(*firsts):
        rows = [_span(e.first) if isinstance(e, _Strip) else e for e in first]
        windows = [o.window(e) for o, e in zip(dims, first, strict=True) if isinstance(e, int)]
        total[(*rows, *second)].add_(sums[tuple(windows)].permute(order), alpha=factor)


def _span(taps: Sequence[int]) -> slice:
    return slice(taps[0], taps[-1] + 1)


def _lines_first(image: Tensor, lines: Sequence[tuple[int, list[int]]], kept: Sequence[int], groups: int) -> Tensor:
    """Some lines of some dimensions as channels: ``[n, G lines c, *kept]``."""
    if not lines:
        return image
    for d, chosen in lines:
        image = image.index_select(2 + d, torch.tensor(chosen, device=image.device))
    image = image.unflatten(1, (groups, -1))
    return image.permute(0, 1, *(3 + d for d, _ in lines), 2, *(3 + d for d in kept)).flatten(1, 2 + len(lines))


def _by_lag(left: Tensor, right: Tensor, dims: Sequence[Offsets], groups: int) -> Tensor:
    """``sum over n, u of left(u) right(u + lag)^T`` ``[*lags, G, a, b]``; of an image with itself, half of the lags."""
    if not dims:
        return rearrange(left, "n (g a) -> g a n", g=groups) @ rearrange(right, "n (g b) -> g n b", g=groups)
    lags = [offsets.lags for offsets in dims]
    mirrored = left is right and all(line[0] == -line[-1] for line in lags)
    used = [lags[0][len(lags[0]) // 2 :], *lags[1:]] if mirrored else lags
    sides = [(-line[0], before + line[-1] - size)
             for line, before, size in zip(used, left.shape[2:], right.shape[2:], strict=True)]  # fmt: skip
    sums = _weight_gradient(right, left, sides, [len(line) for line in used], [line.step for line in used], groups)
    sums = sums.unflatten(0, (groups, -1)).movedim((0, 1, 2), (-3, -2, -1))
    if not mirrored:
        return sums
    return torch.cat([sums[1:].flip(tuple(range(len(dims)))).mT, sums])


def patch_gram(
    left: Tensor, right: Tensor, geometry: Geometry, weights: Sequence[Sequence[float]], groups: int = 1
) -> Tensor:
    """The weighted sum over samples and positions of products of two images' patches ``[G, c, *taps, c', *taps]``.

    Args:
        weights: for each dimension of the output; their products are the weights of positions.
    """
    same = left is right
    left, plain = geometry.plain(left)
    right = left if same else geometry.plain(right)[0]  # of one image with itself, half of the lags are enough
    dims = []
    for d, line in enumerate(weights):
        offsets = plain.offsets(d)
        dims.append(Offsets(tuple(-offset for offset in offsets), offsets, tuple(line)))
    sums, space = lagged(left, right, dims, groups), geometry.space
    if geometry.stuffing is None:
        return sums
    return sums.flip((*range(2, 2 + space), *range(3 + space, 3 + 2 * space)))  # taps are counted from behind
