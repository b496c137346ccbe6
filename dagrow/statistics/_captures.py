"""What a batch leaves at layers: their inputs and the goals at their outputs, by sample and by fold."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from dagrow.axes import IndexMap
from dagrow.errors import BatchError, GrowthError
from dagrow.layers import EdgeRule, Geometry


@dataclass
class Capture:
    """What one forward and backward pass of a batch left at one layer."""

    module: torch.nn.Module
    rule: Any
    new_read: IndexMap | None
    new_written: IndexMap | None
    inputs: Tensor
    version: int
    shape: Sequence[int]  #: of its output
    written: GradientEdge | None = None  #: where the gradient of its output is found
    goal: Tensor | None = None
    arrived: GradientEdge | None = None  #: where the gradient of its input is found
    wish: Tensor | None = None

    @property
    def geometry(self) -> Geometry | None:
        """Of a convolution; None for other layers."""
        return self.rule.geometry(self.module) if isinstance(self.rule, EdgeRule) else None

    @property
    def positions(self) -> int:
        """Of its output, for all samples together."""
        channels = self.rule.channel_dim(len(self.shape))
        return prod(self.shape) // max(1, self.shape[channels])

    @property
    def spatial(self) -> bool:
        """Whether channels lie before the positions, so that each sample is an image."""
        return self.rule.channel_dim(self.inputs.ndim) != self.inputs.ndim - 1

    def read(self, new: bool = False) -> Tensor:
        """The layer's input, restricted to its old or new channels."""
        if self.inputs._version != self.version:
            raise GrowthError(
                "the input of a layer was changed in place after the layer read it; measure a model that does not."
            )
        if self.new_read is None:
            return self.inputs
        return self._select(self.inputs, self.new_read.new.flatten() if new else self.new_read.old)

    def wanted(self) -> Tensor:
        """The goal at the layer's old output channels."""
        assert self.goal is not None
        return self.goal if self.new_written is None else self._select(self.goal, self.new_written.old)

    def wanted_of_inputs(self) -> Tensor:
        """The goal at the layer's input."""
        assert self.wish is not None
        return self.wish if self.new_read is None else self._select(self.wish, self.new_read.old)

    def _select(self, tensor: Tensor, channels: Tensor) -> Tensor:
        return tensor.index_select(self.rule.channel_dim(tensor.ndim), channels.to(tensor.device))

    @property
    def grid(self) -> tuple[int, ...]:
        """Its output's sizes but for the first dimension and the channels."""
        channels = self.rule.channel_dim(len(self.shape))
        return tuple(size for dim, size in enumerate(self.shape) if dim not in (0, channels))

    def part(self, samples: slice, of: int) -> "Capture":
        """Some of the samples, each of which may be several entries of the first dimension."""
        if len(self.inputs) % of:
            raise BatchError(
                f"a layer reads a first dimension of {len(self.inputs)}, which is no multiple of the {of} samples; "
                "samples must come first."
            )

        def cut(tensor: Tensor | None) -> Any:
            return None if tensor is None else tensor.unflatten(0, (of, -1))[samples].flatten(0, 1).contiguous()

        inputs = cut(self.inputs)
        shape = (self.shape[0] // len(self.inputs) * len(inputs), *self.shape[1:])
        return replace(
            self, inputs=inputs, goal=cut(self.goal), wish=cut(self.wish), version=inputs._version, shape=shape
        )


class _Parts(dict[str, Capture]):
    """Captures of some samples, each cut out when it is first asked for."""

    def __init__(self, whole: Mapping[str, Capture], samples: slice, of: int) -> None:
        super().__init__()
        self.whole, self.samples, self.of = whole, samples, of

    def __missing__(self, name: str) -> Capture:
        self[name] = self.whole[name].part(self.samples, self.of)
        return self[name]


@dataclass
class Batch:
    """What one batch left at all layers. Samples go round-robin into folds."""

    captures: dict[str, Capture]
    samples: int
    seen: int = 0  #: samples before this batch
    folds: int = 1
    only: int | None = None  #: the fold that all samples are of, if they are those of one fold

    def __getitem__(self, edge: str) -> Capture:
        return self.captures[edge]

    @property
    def groups(self) -> list[int]:
        """The folds that there are; with G of them, sample i belongs to ``groups[i % G]``."""
        if self.only is not None:
            return [self.only]
        return [(self.seen + i) % self.folds for i in range(min(self.folds, self.samples))]

    def part(self, samples: slice) -> "Batch":
        """Some of the samples, one after another."""
        return replace(self._of(samples), seen=self.seen + samples.start)

    def _of(self, samples: slice) -> "Batch":
        found = _Parts(self.captures, samples, self.samples)
        return replace(self, captures=found, samples=len(range(self.samples)[samples]))

    def by_fold(self, rows: "Callable[[Batch, int], Tensor]") -> Tensor:
        """Rows ``[n s, d]`` that depend on the fold of a sample, computed for each fold."""
        groups = self.groups
        parts = [replace(self._of(slice(i, None, len(groups))), only=fold) for i, fold in enumerate(groups)]
        found = [rows(part, fold) for part, fold in zip(parts, groups, strict=True)]
        total = found[0].new_empty(self.samples, sum(map(len, found)) // self.samples, found[0].shape[1])
        for i, part in enumerate(found):
            total[i :: len(groups)] = part.view(-1, *total.shape[1:])
        return total.flatten(0, 1)

    def grouped(self, image: Tensor) -> Tensor:
        """Groups with channels of their own, ``[n r, c, *space]`` to ``[m r, G c, *space]`` with zeros at the end.

        A sample may be r images.
        """
        groups, each = len(self.groups), len(image) // self.samples
        missing = -self.samples % groups
        if missing:
            image = torch.cat([image, image.new_zeros(missing * each, *image.shape[1:])])
        image = image.unflatten(0, (-1, groups, each))
        return image.transpose(1, 2).flatten(2, 3).flatten(0, 1)

    def ungrouped(self, image: Tensor) -> Tensor:
        """The inverse of :meth:`grouped`."""
        groups = len(self.groups)
        each = len(image) // -(-self.samples // groups)
        image = image.unflatten(1, (groups, -1)).unflatten(0, (-1, each))
        return image.transpose(1, 2).flatten(0, 2)[: self.samples * each]
