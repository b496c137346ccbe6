"""Sums of products of patches, without the patches.

Patches overlap, so they hold every entry of the image many times. At stride 1 the product of two taps depends on their
lag alone, but for thin strips at the borders, and the sums for all lags at once are the weight gradient of a
convolution of the image with itself. Sums may be taken for several groups of samples at once: each group then has
channels of its own, ``[n, G c, *space]``, as in a grouped convolution.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import gcd, prod

import torch
from einops import rearrange
from torch import Tensor

from dagrow.layers import Geometry, weight_gradient


@dataclass(frozen=True)
class Strip:
    """One position s along a dimension where the weight is not 1, and what meets there.

    Attributes:
        factor: the weight, minus 1.
        first, second: the offsets e and d for which the images have a line there.
        left, right: these lines, ``s - e`` and ``s + d``.
    """

    factor: float
    first: slice
    second: slice
    left: list[int]
    right: list[int]


@dataclass(frozen=True)
class Offsets:
    """One dimension of space in :func:`lagged`.

    Attributes:
        first, second: offsets e and d; both increase or decrease evenly, those of d increase.
        weights: ``w(s)`` for s from 0; it is 0 outside and should be 1 at most places.
        strides: m and n, by which the places s lie apart on the left and on the right image.
    """

    first: tuple[int, ...]
    second: tuple[int, ...]
    weights: tuple[float, ...]
    strides: tuple[int, int] = (1, 1)

    @property
    def step(self) -> int:
        """By how much the right image moves with a step of the left one."""
        return prod(self.strides)

    @cached_property
    def lags(self) -> range:
        """All lags ``n e + d``, by their common step."""
        sums = sorted({self.strides[1] * e + d for e in self.first for d in self.second})
        return range(sums[0], sums[-1] + 1, gcd(*(lag - sums[0] for lag in sums)) or 1)

    def window(self, i: int) -> slice:
        """Which of the lags belong to the i-th offset e and to all d, evenly spaced."""
        return _evenly([self.lags.index(self.strides[1] * self.first[i] + d) for d in self.second])

    def strips(self, left: int, right: int) -> list[Strip]:
        """Where the weight is not 1, for images of these sizes."""
        m, n = self.strides
        strips = []
        for s in range(min(self.first), m * (left - 1) + max(self.first) + 1):
            weight = self.weights[s] if 0 <= s < len(self.weights) else 0.0
            first = [i for i, e in enumerate(self.first) if (s - e) % m == 0 and 0 <= s - e < m * left]
            second = [j for j, d in enumerate(self.second) if 0 <= n * s + d < right]
            if weight != 1 and first and second:
                lines = [(s - self.first[i]) // m for i in first], [n * s + self.second[j] for j in second]
                strips.append(Strip(weight - 1, _evenly(first), _evenly(second), *lines))
        return strips


def _evenly(numbers: Sequence[int]) -> slice:
    """Numbers that increase evenly, as a slice."""
    return slice(numbers[0], numbers[-1] + 1, numbers[1] - numbers[0] if len(numbers) > 1 else 1)


def lagged(left: Tensor, right: Tensor, dims: Sequence[Offsets], groups: int, sums: Tensor) -> Tensor:
    """``sum over n and u of w(s) left(u) right(n s + d)^T``, ``s = m u + e``, for all offsets e and d.

    Images ``[n, G a, *space]`` are zero outside; weights are products over the dimensions; the strides m and n are 1 by
    default. Each weight is ``w(s) = 1 + (w(s) - 1)``. The product of these sums has a term for every choice, dimension
    by dimension, of the 1, where the sum over u depends on the lag ``n e + d`` alone, or of one strip s, where a line
    of each image is left.

    Example:
        A kernel of two taps slides over the entries 1, 2, 3: the patches are (1, 2) and (2, 3), and their products sum
        up to ``[[1 + 4, 2 + 6], [2 + 6, 4 + 9]]``.

        >>> image = torch.tensor([[[1.0, 2.0, 3.0]]])
        >>> taps = Offsets(first=(0, -1), second=(0, 1), weights=(1.0, 1.0))  # a patch at s = 0, one at s = 1

        At lag 0, where a tap meets itself, all entries give ``1 + 4 + 9 = 14``; at lags -1 and 1 neighbours give
        ``2 + 6 = 8``, which is right for the two taps already.

        >>> by_lag = _by_lag(image, image, [taps], 1)
        >>> list(taps.lags), by_lag.flatten().tolist()
        ([-1, 0, 1], [8.0, 14.0, 8.0])

        But no patch begins at s = -1 or s = 2: the second tap never reads the 1, nor the first tap the 3.

        >>> [(strip.factor, strip.left, strip.right) for strip in taps.strips(3, 3)]
        [(-1.0, [0], [0]), (-1.0, [2], [2])]
        >>> lagged(image, image, [taps], 1, torch.empty(1, 1, 2, 2, 1)).view(2, 2)  # 14 - 9 and 14 - 1 on the diagonal
        tensor([[ 5.,  8.],
                [ 8., 13.]])

    Args:
        left: images ``[n, G a, *space]``.
        right: others ``[n, G b, *space]``.
        dims: offsets, weights and strides, by dimension of space.
        groups: ``G``.
        sums: ``[G, b, *D, *E, a]``, written over; fastest where they lie in memory in this order.

    Returns:
        ``sums``.
    """
    strips = [[None, *o.strips(*lines)] for o, *lines in zip(dims, left.shape[2:], right.shape[2:], strict=True)]
    for term in itertools.product(*strips):  # the first one is that of all positions
        _add_term(sums, left, right, dims, term, groups)
    return sums


def axis_names(letter: str, dims: Iterable[int]) -> str:
    """A name for each dimension of space, as in ``e0 e1``."""
    return " ".join(f"{letter}{dim}" for dim in dims)


def _add_term(
    sums: Tensor, left: Tensor, right: Tensor, dims: Sequence[Offsets], term: Sequence[Strip | None], groups: int
) -> None:
    """Adds one term of :func:`lagged`, of a strip, or of all positions, in each dimension; that of all is written."""
    strips = {dim: strip for dim, strip in enumerate(term) if strip is not None}
    whole = [dim for dim, strip in enumerate(term) if strip is None]
    x = _lines_as_channels(left, {dim: strip.left for dim, strip in strips.items()}, groups)
    same = left is right and all(strip.left == strip.right for strip in strips.values())
    y = x if same else _lines_as_channels(right, {dim: strip.right for dim, strip in strips.items()}, groups)
    lines = {f"e{dim}": len(strip.left) for dim, strip in strips.items()}
    lines |= {f"d{dim}": len(strip.right) for dim, strip in strips.items()}
    e, d = axis_names("e", strips), axis_names("d", strips)
    by_lag = rearrange(
        _by_lag(x, y, [dims[dim] for dim in whole], groups),
        f"{axis_names('d', whole)} g ({e} a) ({d} b) -> g b {axis_names('d', range(len(dims)))} {e} a",
        **lines,
    ).contiguous()
    factor = prod(strip.factor for strip in strips.values())
    second = [slice(None) if strip is None else strip.second for strip in term]
    for taps in itertools.product(*(range(len(dims[dim].first)) for dim in whole)):
        tap = dict(zip(whole, taps, strict=True))
        first = [tap[dim] if strip is None else strip.first for dim, strip in enumerate(term)]
        windows = [dims[dim].window(tap[dim]) if dim in tap else slice(None) for dim in range(len(dims))]
        some, found = sums[(slice(None), slice(None), *second, *first)], by_lag[(slice(None), slice(None), *windows)]
        if strips:
            some.add_(found, alpha=factor)
        else:
            some.copy_(found)


def _lines_as_channels(image: Tensor, lines: Mapping[int, list[int]], groups: int) -> Tensor:
    """Some lines of some dimensions as channels: ``[n, G lines c, *others]``."""
    if not lines:
        return image
    for dim, chosen in lines.items():
        image = image.index_select(2 + dim, torch.tensor(chosen, device=image.device))
    space = range(image.ndim - 2)
    s, others = axis_names("s", space), axis_names("s", (dim for dim in space if dim not in lines))
    return rearrange(image, f"n (g c) {s} -> n (g {axis_names('s', lines)} c) {others}", g=groups)


def _by_lag(left: Tensor, right: Tensor, dims: Sequence[Offsets], groups: int) -> Tensor:
    """``sum over n, u of left(u) right(m n u + lag)^T`` ``[*lags, G, a, b]``; an image with itself by half of them."""
    if not dims:
        return rearrange(left, "n (g a) -> g a n", g=groups) @ rearrange(right, "n (g b) -> g n b", g=groups)
    lags, strides = [offsets.lags for offsets in dims], [offsets.step for offsets in dims]
    mirrored = left is right and all(line[0] == -line[-1] for line in lags) and set(strides) == {1}
    used = [lags[0][len(lags[0]) // 2 :], *lags[1:]] if mirrored else lags
    margins = [
        (-line[0], stride * (before - 1) + 1 + line[-1] - size)
        for line, stride, before, size in zip(used, strides, left.shape[2:], right.shape[2:], strict=True)
    ]
    kernel, gaps = [len(line) for line in used], [line.step for line in used]
    sums = weight_gradient(right, left, margins, kernel, gaps, groups, strides)
    sums = rearrange(sums, "(g a) b ... -> ... g a b", g=groups)
    if not mirrored:
        return sums
    return torch.cat([sums[1:].flip(tuple(range(len(dims)))).mT, sums])


def patch_gram(
    left: Tensor, right: Tensor, geometry: Geometry, weights: Sequence[Sequence[float]], groups: int = 1
) -> Tensor:
    """The weighted sum over samples and positions of products of two images' patches.

    Args:
        left: images ``[n, G c, *space]``.
        right: the same ones, or others of the same sizes ``[n, G c', *space]``.
        geometry: how patches are cut out, at stride 1.
        weights: for each dimension of the output; their products are the weights of positions.
        groups: of samples, each with channels of its own.

    Returns:
        The sums ``[G, c, *taps, c', *taps]``.
    """
    same = left is right
    left, plain = geometry.plain(left)
    right = left if same else geometry.plain(right)[0]  # of one image with itself, half of the lags are enough
    dims = []
    for dim, line in enumerate(weights):
        offsets = plain.offsets(dim)
        dims.append(Offsets(tuple(-offset for offset in offsets), offsets, tuple(line)))
    a, b = (image.shape[1] // groups for image in (left, right))
    sums = lagged(right, left, dims, groups, left.new_empty(groups, a, *geometry.kernel, *geometry.kernel, b))
    taps, others = range(2, 2 + len(dims)), range(2 + len(dims), 2 + 2 * len(dims))
    sums = sums if geometry.stuffing is None else sums.flip((*taps, *others))  # taps are counted from behind
    return sums.permute(0, 1, *taps, -1, *others)
