"""What a batch leaves at layers: their inputs and the goals at their outputs, by sample and by fold."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.autograd.graph import GradientEdge

from dagrow.axes import IndexMap
from dagrow.errors import BatchError, GrowthError
from dagrow.layers import EdgeRule, Geometry, LayerRule
from dagrow.statistics._sample_layout import SampleLayout

Writers = tuple[str, ...]  #: the producers of new channels


@dataclass
class Capture:
    """What one forward and backward pass of a batch left at one layer.

    Attributes:
        input_map, output_map: which channels are new in a preview; None where none is.
        version: of the input, when the layer read it; a change in place counts it up.
        input_gradient, output_gradient: where autograd finds them.
        input_goal, output_goal: minus the gradient of each sample's loss.
        seen: whether a gradient of the loss arrives at its output; where the layer was called several times only.
        runs: which of the layer's calls are joined here.
        sample_dim: the dimension along which samples lay, before they came first.
        units: which of an axis' new units are whose, where several previews share it: what writes them -> units.
    """

    module: torch.nn.Module
    rule: LayerRule
    input_map: IndexMap | None
    output_map: IndexMap | None
    inputs: Tensor
    version: int
    output_shape: Sequence[int]
    output_gradient: GradientEdge | None = None
    output_goal: Tensor | None = None
    input_gradient: GradientEdge | None = None
    input_goal: Tensor | None = None
    seen: bool = True
    runs: tuple[int, ...] = (0,)
    sample_dim: int = 0
    units: Mapping[Writers, slice] = field(default_factory=dict)

    @property
    def edge_rule(self) -> EdgeRule:
        """The rule of a weighted layer."""
        assert isinstance(self.rule, EdgeRule)
        return self.rule

    @property
    def geometry(self) -> Geometry | None:
        """Of a convolution; None for other layers."""
        return self.rule.geometry(self.module) if isinstance(self.rule, EdgeRule) else None

    @property
    def channel_dim(self) -> int:
        """The dimension of its input that holds the channels."""
        return self.rule.channel_dim(self.inputs.ndim)

    @property
    def is_image(self) -> bool:
        """Whether channels lie before the positions, so that each sample is an image."""
        return self.channel_dim != self.inputs.ndim - 1

    @property
    def positions(self) -> int:
        """Of its output, for all samples together."""
        return prod(self.output_shape) // max(1, self.output_shape[self.rule.channel_dim(len(self.output_shape))])

    @property
    def grid(self) -> tuple[int, ...]:
        """Its output's sizes but for the first dimension and the channels."""
        channels = self.rule.channel_dim(len(self.output_shape))
        return tuple(size for dim, size in enumerate(self.output_shape) if dim not in (0, channels))

    def old_inputs(self) -> Tensor:
        """The layer's input, without the new channels of a preview."""
        inputs = self._unchanged_inputs()
        return inputs if self.input_map is None else self._select(inputs, self.input_map.old)

    def new_inputs(self, writers: Writers = ()) -> Tensor:
        """The new channels of the layer's input in a preview; those of some writers, or all."""
        inputs = self._unchanged_inputs()
        if self.input_map is None:
            return inputs
        units = self.units[writers] if writers else slice(None)
        return self._select(inputs, self.input_map.new[units].flatten())

    def goal_at_outputs(self) -> Tensor:
        """The goal at the layer's old output channels."""
        assert self.output_goal is not None
        return self.output_goal if self.output_map is None else self._select(self.output_goal, self.output_map.old)

    def goal_at_inputs(self) -> Tensor:
        """The goal at the layer's old input channels."""
        assert self.input_goal is not None
        return self.input_goal if self.input_map is None else self._select(self.input_goal, self.input_map.old)

    def channels_last(self, tensor: Tensor) -> Tensor:
        """An input, or the goal there, as rows ``[n s, c]``."""
        return tensor.movedim(self.rule.channel_dim(tensor.ndim), -1).flatten(0, -2)

    def _unchanged_inputs(self) -> Tensor:
        if self.inputs._version != self.version:
            raise GrowthError(
                "the input of a layer was changed in place after the layer read it; measure a model that does not."
            )
        return self.inputs

    def _select(self, tensor: Tensor, channels: Tensor) -> Tensor:
        return tensor.index_select(self.rule.channel_dim(tensor.ndim), channels.to(tensor.device))

    def arranged(self, layout: SampleLayout, n: int) -> "Capture":
        """With the rows of each of n samples together, samples first."""
        if layout.dim == 0 and layout.outer == 1:
            return self
        tensors = {"inputs": self.inputs, "output_goal": self.output_goal, "input_goal": self.input_goal}
        ordered: dict[str, Any] = {k: layout.samples_first(t, n) for k, t in tensors.items() if t is not None}
        shape = layout.samples_first(torch.empty(tuple(self.output_shape), device="meta"), n).shape
        version = ordered["inputs"]._version if self.inputs._version == self.version else -1
        return replace(self, version=version, output_shape=shape, sample_dim=layout.dim, **ordered)

    @classmethod
    def joined(cls, captures: Sequence["Capture"]) -> "Capture":
        """Several of one layer, one after another along the first dimension, in memory of their own."""
        first, unchanged = captures[0], all(each.inputs._version == each.version for each in captures)
        inputs = torch.cat([each.inputs for each in captures])
        return replace(
            first,
            inputs=inputs,
            version=inputs._version if unchanged else -1,
            output_shape=(sum(each.output_shape[0] for each in captures), *first.output_shape[1:]),
            output_gradient=None,
            input_gradient=None,
            output_goal=_cat([each.output_goal for each in captures]),
            input_goal=_cat([each.input_goal for each in captures]),
        )

    @property
    def entries(self) -> int:
        """How many numbers it holds."""
        return sum(t.numel() for t in (self.inputs, self.output_goal, self.input_goal) if t is not None)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of its input and its output, but for the first dimension."""
        return *self.inputs.shape[1:], *self.output_shape[1:]

    def subset(self, samples: slice | Tensor, count: int) -> "Capture":
        """Some of ``count`` samples, each of which may be several entries of the first dimension."""
        if len(self.inputs) % count:
            raise BatchError(
                f"a layer reads a first dimension of {len(self.inputs)}, which is no multiple of the {count} samples; "
                "samples must come first."
            )

        tensors = {"inputs": self.inputs, "output_goal": self.output_goal, "input_goal": self.input_goal}
        selected: dict[str, Any] = {
            name: tensor.unflatten(0, (count, -1))[samples].flatten(0, 1).contiguous()
            for name, tensor in tensors.items()
            if tensor is not None
        }
        inputs = selected["inputs"]
        shape = (self.output_shape[0] // len(self.inputs) * len(inputs), *self.output_shape[1:])
        return replace(self, version=inputs._version, output_shape=shape, **selected)


def _cat(goals: Sequence[Tensor | None]) -> Tensor | None:
    found = [goal for goal in goals if goal is not None]
    return torch.cat(found) if found else None


class _Subsets(dict[str, Capture]):
    """Captures of some samples, each cut out when it is first asked for."""

    def __init__(self, captures: Mapping[str, Capture], samples: slice | Tensor, count: int) -> None:
        super().__init__()
        self.captures, self.samples, self.count = captures, samples, count

    def __missing__(self, name: str) -> Capture:
        self[name] = self.captures[name].subset(self.samples, self.count)
        return self[name]


@dataclass
class Batch:
    """What one batch left at all layers. Samples go round-robin into folds.

    Attributes:
        captures: layer -> what was left there.
        samples: how many.
        seen: samples before this batch.
        only: the fold that all samples are of, if they are those of one fold.
    """

    captures: dict[str, Capture]
    samples: int
    seen: int = 0
    folds: int = 1
    only: int | None = None

    def __getitem__(self, edge: str) -> Capture:
        return self.captures[edge]

    @property
    def groups(self) -> list[int]:
        """The folds that there are; with G of them, sample i belongs to ``groups[i % G]``."""
        if self.only is not None:
            return [self.only]
        return [(self.seen + i) % self.folds for i in range(min(self.folds, self.samples))]

    @property
    def fold_slices(self) -> list[tuple[int, slice]]:
        """The folds that there are, each with its samples."""
        groups = self.groups
        return [(fold, slice(i, None, len(groups))) for i, fold in enumerate(groups)]

    def subset(self, samples: slice, only: int | None = None) -> "Batch":
        """Some of the samples: one after another, or ``only`` those of one fold."""
        captures, count = _Subsets(self.captures, samples, self.samples), len(range(self.samples)[samples])
        only = self.only if only is None else only
        return replace(self, captures=captures, samples=count, seen=self.seen + samples.start, only=only)

    def of_fold(self, samples: Tensor, fold: int) -> "Batch":
        """The samples with these indices ``[m]``, which are all of one fold."""
        return Batch(_Subsets(self.captures, samples, self.samples), len(samples), folds=self.folds, only=fold)

    def by_fold(self, rows: "Callable[[Batch, int], Tensor]") -> Tensor:
        """Rows ``[n s, d]`` that depend on the fold of a sample, computed for each fold."""
        slices = self.fold_slices
        parts = [rows(self.subset(samples, fold), fold) for fold, samples in slices]
        total = parts[0].new_empty(self.samples, sum(map(len, parts)) // self.samples, parts[0].shape[1])
        for (_, samples), part in zip(slices, parts, strict=True):
            total[samples] = part.view(-1, *total.shape[1:])
        return total.flatten(0, 1)

    def grouped(self, image: Tensor) -> Tensor:
        """Groups with channels of their own: ``[n r, c, *space]``, r images a sample, to ``[m r, G c, *space]``."""
        groups, images = len(self.groups), len(image) // self.samples
        missing = -self.samples % groups
        if missing:  # zeros at the end
            image = torch.cat([image, image.new_zeros(missing * images, *image.shape[1:])])
        return rearrange(image, "(m g r) c ... -> (m r) (g c) ...", g=groups, r=images)

    def ungrouped(self, image: Tensor) -> Tensor:
        """The inverse of :meth:`grouped`."""
        groups = len(self.groups)
        images = len(image) // -(-self.samples // groups)
        return rearrange(image, "(m r) (g c) ... -> (m g r) c ...", g=groups, r=images)[: self.samples * images]
