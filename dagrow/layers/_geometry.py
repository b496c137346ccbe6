"""What a convolution reads at each position of its output.

A patch is one row of features: for every input channel the entries of the image under the kernel's taps. Images are
``[n, c, *space]``, outputs ``[n, o, *positions]``, kernels ``[o, c, *taps]``; of each there are one, two or three
dimensions, those of space.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional


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
        """How many dimensions space has."""
        return len(self.kernel)

    @property
    def _space_dims(self) -> tuple[int, ...]:
        """The last dimensions of a tensor."""
        return tuple(range(-self.space, 0))

    def plain(self, image: Tensor) -> tuple[Tensor, "Geometry"]:
        """The same patches from an image with nothing but zeros around it, and nothing in between.

        Args:
            image: ``[n, c, *space]``.

        Returns:
            Such an image, and the geometry of its patches.
        """
        image = image if self.stuffing is None else stuffed(image, self.stuffing)
        if self.mode == "zeros":
            return image, replace(self, stuffing=None)
        padded = functional.pad(image, _flat(self.margins), mode=self.mode)
        return padded, replace(self, margins=((0, 0),) * self.space, mode="zeros", stuffing=None)

    def patches(self, image: Tensor) -> Tensor:
        """What each position of the output reads.

        Args:
            image: ``[n, c, *space]``.

        Returns:
            ``[n, positions, c taps]``.
        """
        image, plain = self.plain(image)
        windows = plain.padded(image)
        for dim, (size, step, gap) in enumerate(zip(self.kernel, self.stride, self.dilation, strict=True), start=2):
            windows = windows.unfold(dim, gap * (size - 1) + 1, step)[..., ::gap]
        windows = windows if self.stuffing is None else windows.flip(self._space_dims)
        positions, taps = (" ".join(f"{axis}{d}" for d in range(self.space)) for axis in ("position", "tap"))
        return rearrange(windows, f"n c {positions} {taps} -> n ({positions}) (c {taps})")

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
        """Where each tap reads, relative to the output position, at stride 1.

        Args:
            dim: of space.

        Returns:
            An offset for each tap.
        """
        return tuple(tap * self.dilation[dim] - self.margins[dim][0] for tap in range(self.kernel[dim]))

    def convolved(self, image: Tensor, weight: Tensor, groups: int = 1) -> Tensor:
        """``W b`` at every position.

        Args:
            image: ``[n, G c, *space]``.
            weight: ``[G o, c taps]``.
            groups: ``G``.

        Returns:
            ``[n, G o, *positions]``.
        """
        kernel = weight.view(len(weight), image.shape[1] // groups, *self.kernel)
        kernel = kernel if self.stuffing is None else kernel.flip(self._space_dims)
        image, plain = self.plain(image)
        convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[self.space - 1]
        if any(before != behind or before < 0 for before, behind in plain.margins):
            image, margins = plain.padded(image), [0] * self.space
        else:
            margins = [before for before, _ in plain.margins]
        return convolve(image, kernel, stride=self.stride, padding=margins, dilation=self.dilation, groups=groups)

    def crossed(self, image: Tensor, goals: Tensor, groups: int = 1) -> Tensor:
        """The sum over samples and positions of patches times goals: a convolution's weight gradient.

        Args:
            image: ``[n, G c, *space]``.
            goals: ``[n, G o, *positions]``.
            groups: ``G``.

        Returns:
            ``[G, c taps, o]``.
        """
        image, plain = self.plain(image)
        sums = weight_gradient(image, goals, plain.margins, self.kernel, self.dilation, groups, self.stride)
        sums = sums if self.stuffing is None else sums.flip(self._space_dims)
        return rearrange(sums, "(g o) c ... -> g (c ...) o", g=groups)

    def summed(self, image: Tensor, weights: Sequence[Sequence[float]]) -> Tensor:
        """Weighted sums of patches over positions.

        Args:
            image: ``[..., *space]``.
            weights: for each dimension of space those of its positions, which multiply.

        Returns:
            ``[..., taps]``.
        """
        first = image.ndim - self.space  # each dimension of space is taken from the front, and its taps come last
        for table, line in zip(self.tables(image.shape[first:]), weights, strict=True):
            read = torch.zeros(table.shape[1], image.shape[first] + 1, dtype=torch.float64)  # the first is outside
            read.scatter_add_(1, table.T + 1, torch.tensor(line, dtype=torch.float64).expand(table.shape[1], -1))
            image = torch.tensordot(image, read[:, 1:].to(image), ([first], [1]))
        return image.flatten(first)

    def padded(self, image: Tensor) -> Tensor:
        """The image with its margins of zeros.

        Args:
            image: ``[n, c, *space]``.

        Returns:
            ``[n, c, *space]``, larger.
        """
        return functional.pad(image, _flat(self.margins))

    def tables(self, sizes: Sequence[int]) -> list[Tensor]:
        """Which entry of the image each tap reads.

        Args:
            sizes: of the image, by dimension of space.

        Returns:
            By dimension of space ``[out, kernel]``, -1 where there is none.
        """
        return [self._along(d)._table(size) for d, size in enumerate(sizes)]

    def _along(self, d: int) -> "Geometry":
        """One dimension of space alone."""
        only = slice(d, d + 1)
        margins, stuffing = self.margins[only], None if self.stuffing is None else self.stuffing[only]
        return Geometry(self.kernel[only], self.stride[only], self.dilation[only], margins, self.mode, stuffing)

    def _table(self, size: int) -> Tensor:
        """Of the only dimension of space: the entries' numbers, which start at 1, are the image."""
        numbers = torch.arange(1, size + 1, dtype=torch.float64)
        return self.patches(rearrange(numbers, "entries -> 1 1 entries"))[0].long() - 1

    def sizes(self, image: Sequence[int]) -> list[int]:
        """The output's size.

        Args:
            image: sizes of the image, by dimension of space.

        Returns:
            By dimension of space.
        """
        stuffing = self.stuffing or (1,) * self.space
        return [
            (stuffing[d] * (size - 1) + 1 + sum(self.margins[d]) - self.dilation[d] * (self.kernel[d] - 1) - 1)
            // self.stride[d]
            + 1
            for d, size in enumerate(image)
        ]


def per_dimension(value: Any, count: int) -> tuple[Any, ...]:
    """A setting for each dimension of space, which users may give once for all."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return values * count if len(values) == 1 else values


def stuffed(image: Tensor, stuffing: Sequence[int]) -> Tensor:
    """An image with zeros between its entries."""
    if all(step == 1 for step in stuffing):
        return image
    for dim, step in enumerate(stuffing, start=2):
        apart = torch.stack([image, *[torch.zeros_like(image)] * (step - 1)], dim + 1).flatten(dim, dim + 1)
        image = apart.narrow(dim, 0, apart.shape[dim] - step + 1)
    return image


def _flat(margins: Sequence[tuple[int, int]]) -> list[int]:
    """As ``functional.pad`` takes them: the last dimension first."""
    return [margin for sides in reversed(margins) for margin in sides]


def weight_gradient(
    image: Tensor,
    goals: Tensor,
    margins: Sequence[tuple[int, int]],
    kernel: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    stride: Sequence[int] | None = None,
) -> Tensor:
    """``sum over n and t of goals(t) image(t stride + k dilation - margin)^T``.

    Args:
        image: ``[n, G c, *space]``.
        goals: ``[n, G o, *positions]``.
        margins: zeros before and behind each dimension of space.
        kernel: its size.
        dilation: of the kernel.
        groups: ``G``.
        stride: 1 by default.

    Returns:
        ``[G o, c, *kernel]``.
    """
    common = [max(0, min(sides)) for sides in margins]  # what the convolution adds by itself need not be copied
    rest = _flat([(before - both, behind - both) for (before, behind), both in zip(margins, common, strict=True)])
    image = functional.pad(image, rest) if any(rest) else image
    weight = image.new_empty(goals.shape[1], image.shape[1] // groups, *kernel)
    step, no_output_padding = stride or [1] * len(kernel), [0] * len(kernel)
    only_weight = [False, True, False]
    return torch.ops.aten.convolution_backward(
        goals, image, weight, None, step, common, dilation, False, no_output_padding, groups, only_weight
    )[1]
