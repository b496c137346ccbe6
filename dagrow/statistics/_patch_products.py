"""Sums of products of patches, without the patches.

Patches overlap, so they hold every entry of the image many times. At stride 1 the product of two taps depends on their
lag alone, but for thin strips at the borders, and the sums for all lags at once are the weight gradient of a
convolution of the image with itself. Sums may be taken for several groups of samples at once: each group then has
channels of its own, ``[n, G c, *space]``, as in a grouped convolution.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd, prod

import torch
from einops import rearrange
from torch import Tensor

from dagrow.layers import Geometry, weight_gradient


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
                found.append(
                    _Strip(
                        weight - 1,
                        rows,
                        columns,
                        [s - self.first[i] for i in rows],
                        [s + self.second[j] for j in columns],
                    )
                )
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
    sides = [
        (-line[0], before + line[-1] - size)
        for line, before, size in zip(used, left.shape[2:], right.shape[2:], strict=True)
    ]
    sums = weight_gradient(right, left, sides, [len(line) for line in used], [line.step for line in used], groups)
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
