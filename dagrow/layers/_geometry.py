"""What a convolution reads at each position of its output.

A patch is one row of features: for every input channel the entries of the image under the kernel's taps.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
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
        sums = weight_gradient(spread, goals, plain.margins, self.kernel, self.dilation, groups, self.stride)
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
                self,
                kernel=self.kernel[d : d + 1],
                stride=self.stride[d : d + 1],
                dilation=self.dilation[d : d + 1],
                margins=self.margins[d : d + 1],
                stuffing=self.stuffing and self.stuffing[d : d + 1],
            )
            entries = torch.arange(1, size + 1, dtype=torch.float64).view(1, 1, -1)
            found.append(line.patches(entries)[0].long() - 1)
        return found

    def sizes(self, image: Sequence[int]) -> list[int]:
        """The output's size for an image's, by dimension of space."""
        stuffing = self.stuffing or (1,) * self.space
        return [
            (stuffing[d] * (size - 1) + 1 + sum(self.margins[d]) - self.dilation[d] * (self.kernel[d] - 1) - 1)
            // self.stride[d]
            + 1
            for d, size in enumerate(image)
        ]


def stuffed(image: Tensor, stuffing: Sequence[int]) -> Tensor:
    """An image with zeros between its entries."""
    if all(step == 1 for step in stuffing):
        return image
    for dim, step in enumerate(stuffing, start=2):
        spread = torch.stack([image, *[torch.zeros_like(image)] * (step - 1)], dim + 1).flatten(dim, dim + 1)
        image = spread.narrow(dim, 0, spread.shape[dim] - step + 1)
    return image


def weight_gradient(
    image: Tensor,
    goals: Tensor,
    margins: Sequence[tuple[int, int]],
    kernel: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    stride: Sequence[int] | None = None,
) -> Tensor:
    """``sum over n and t of goals(t) image(t stride + k dilation - margin)^T``: ``[G o, c, *kernel]``."""
    common = [max(0, min(sides)) for sides in margins]  # what the convolution adds by itself need not be copied
    rest = [side - shared for sides, shared in reversed(list(zip(margins, common, strict=True))) for side in sides]
    image = functional.pad(image, rest) if any(rest) else image
    weight, ones = image.new_empty(goals.shape[1], image.shape[1] // groups, *kernel), [1] * len(kernel)
    mask = [False, True, False]
    return torch.ops.aten.convolution_backward(
        goals, image, weight, None, stride or ones, common, dilation, False, [0] * len(kernel), groups, mask
    )[1]
