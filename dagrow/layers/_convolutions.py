"""Convolutions. As edges they read patches; with groups they are riders that grow by whole groups."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from dagrow.layers._geometry import Geometry
from dagrow.layers._rules import EdgeRule, LayerRule, RiderRule

_PLAIN = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def _margins(module: Any) -> tuple[tuple[int, int], ...]:
    if module.padding == "valid":
        return ((0, 0),) * len(module.kernel_size)
    if module.padding == "same":
        totals = [gap * (size - 1) for gap, size in zip(module.dilation, module.kernel_size, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    return tuple((int(size), int(size)) for size in module.padding)


def _geometry(module: Any) -> Geometry:
    """Of a convolution, transposed or not."""
    kernel, stride, dilation = module.kernel_size, module.stride, module.dilation
    if not isinstance(module, _TRANSPOSED):
        return Geometry(kernel, stride, dilation, _margins(module), module.padding_mode)
    spans = [gap * (size - 1) for gap, size in zip(dilation, kernel, strict=True)]
    margins = tuple(
        (span - before, span - before + behind)
        for span, before, behind in zip(spans, module.padding, module.output_padding, strict=True)
    )
    return Geometry(kernel, (1,) * len(kernel), dilation, margins, stuffing=stride)


@dataclass(frozen=True)
class _AnyConvolutionRule(LayerRule):
    """What convolutions have in common: channels stand before the dimensions of space, and samples may be missing."""

    space: int
    transposed: bool = False

    @property
    def types(self) -> tuple[type[nn.Module], ...]:  # type: ignore[override]
        return ((_TRANSPOSED if self.transposed else _PLAIN)[self.space - 1],)

    def channel_dim(self, ndim: int) -> int:
        return ndim - self.space - 1

    def batched(self, image: Tensor) -> Tensor:
        """``[n, c, *space]``, also of an image without the dimension of samples."""
        return image if image.ndim == self.space + 2 else image[None]

    def positions(self, inputs: Tensor, outputs: Tensor) -> int:
        return super().positions(inputs, inputs if self.transposed else outputs)


@dataclass(frozen=True)
class ConvolutionRule(_AnyConvolutionRule, EdgeRule):
    """``nn.Conv1d``, ``nn.Conv2d``, ``nn.Conv3d`` and their transposes, without groups: a row for each output position.

    The features are the patches, channel by channel and tap by tap, as in ``weight.flatten(1)``.
    """

    @property
    def dims(self) -> Mapping[str, tuple[int, int | None]]:  # type: ignore[override]
        return MappingProxyType({"weight": (1, 0) if self.transposed else (0, 1), "bias": (0, None)})

    def covers(self, module: Any) -> bool:
        return module.groups == 1

    def geometry(self, module: nn.Module) -> Geometry:
        return _geometry(module)

    def features(self, module: nn.Module, inputs: Tensor) -> Tensor:
        return rearrange(self.geometry(module).patches(self.batched(inputs)), "n positions i -> (n positions) i")

    def rows(self, module: nn.Module, outputs: Tensor) -> Tensor:
        return rearrange(self.batched(outputs), "n o ... -> (n ...) o")

    def widths(self, module: Any) -> tuple[int, int]:
        first, second = module.weight.shape[:2]
        return (first, second) if self.transposed else (second, first)

    def attributes(self, inputs: int, outputs: int) -> dict[str, int]:
        return {"in_channels": inputs, "out_channels": outputs}


@dataclass(frozen=True)
class GroupedRule(_AnyConvolutionRule, RiderRule):
    """Convolutions with groups, depthwise ones among them: a new group's channels pass through its kernels' middle.

    Where a group writes more channels than it reads, or fewer, the kernels of the others start at random.

    Within a group every output reads every input, so that groups grow as a whole; other groups never see a new one.

    Args:
        space: dimensions of space.
        transposed: whether it is of a transposed convolution.
    """

    def covers(self, module: Any) -> bool:
        return module.groups > 1

    def refusal(self, module: Any) -> str | None:
        if self.transposed and module.in_channels != module.out_channels:
            return "a transposed convolution with groups that read and write different numbers of channels"
        return None

    def group(self, module: Any) -> tuple[int, int]:
        return module.in_channels // module.groups, module.out_channels // module.groups

    def attributes(self, module: Any, width: int) -> dict[str, int]:
        inputs, outputs = self.group(module)
        groups = width // outputs
        return {"in_channels": groups * inputs, "out_channels": width, "groups": groups}

    def passing(self, module: Any) -> dict[str, Tensor]:
        inputs, outputs = self.group(module)
        generator = torch.Generator().manual_seed(outputs)
        weight = torch.empty(outputs, inputs, *module.kernel_size)
        weight.uniform_(-1, 1, generator=generator).div_(weight[0].numel() ** 0.5)
        middle, passed = tuple(size // 2 for size in module.kernel_size), torch.arange(min(inputs, outputs))
        weight[: len(passed), : len(passed)] = 0
        weight[(passed, passed, *middle)] = 1
        weight = (weight.transpose(0, 1) if self.transposed else weight).to(module.weight)
        return {"weight": weight} | ({} if module.bias is None else {"bias": module.bias.new_zeros(())})

    def source(self, module: nn.Module, sizes: Sequence[int]) -> list[Tensor]:
        """The tap in the middle."""
        geometry = _geometry(module)
        middle = [size // 2 for size in geometry.kernel]
        return [table[:, tap : tap + 1] for table, tap in zip(geometry.tables(sizes), middle, strict=True)]


@dataclass(frozen=True)
class BlockConvolutionRule(ConvolutionRule):
    """A convolution with groups as an edge, where whole groups cannot be added.

    Every group has weights of its own, and a new channel in each grows it within the groups.

    Args:
        space: dimensions of space.
        transposed: whether it is of a transposed convolution.
        groups: how many.
    """

    groups: int = 1

    def covers(self, module: Any) -> bool:
        return module.groups == self.groups

    def blocks(self, module: nn.Module) -> int:
        return self.groups

    def attributes(self, inputs: int, outputs: int) -> dict[str, int]:
        return {"in_channels": inputs * self.groups, "out_channels": outputs}


CONVOLUTIONS = tuple(ConvolutionRule(space, transposed) for transposed in (False, True) for space in (1, 2, 3))
GROUPED = tuple(GroupedRule(space, transposed) for transposed in (False, True) for space in (1, 2, 3))
