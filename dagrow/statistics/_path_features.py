"""Features of new paths: what new layers would read and compute, and what activations want."""

from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor, nn

from dagrow.layers import Geometry, with_constant
from dagrow.statistics._captures import Batch
from dagrow.statistics._features import Feature, InputFeatures, OutputGoal


@dataclass(frozen=True)
class PatchInputs(InputFeatures):
    """What a new convolution would read of the images that a layer reads.

    Attributes:
        geometry: how it would slide over them.
    """

    geometry: Geometry = field(kw_only=True)

    def slides(self, batch: Batch) -> Geometry:
        return self.geometry

    def count(self, batch: Batch) -> int:
        image = batch[self.edge].inputs
        return len(image) * prod(self.geometry.sizes(image.shape[2:]))

    def rows(self, batch: Batch) -> Tensor:
        return with_constant(self.geometry.patches(self.image(batch)).flatten(0, 1), self.bias)

    def picture(self, batch: Batch) -> Tensor | None:
        thin = prod(self.geometry.kernel) == 1 and not any(map(any, self.geometry.margins))
        steps = (slice(None), slice(None), *(slice(None, None, step) for step in self.geometry.stride))
        return self.image(batch)[steps].contiguous() if thin else None


@dataclass(frozen=True)
class MeanInputs(Feature):
    """The mean over positions of each image that a convolution reads, with the constant 1: one row per sample."""

    edge: str
    bias: bool = True

    @property
    def edges(self) -> tuple[str, ...]:
        return (self.edge,)

    def count(self, batch: Batch) -> int:
        return len(batch[self.edge].inputs)

    def rows(self, batch: Batch) -> Tensor:
        return with_constant(batch[self.edge].read().flatten(2).mean(2), self.bias)


@dataclass(frozen=True)
class ActivationGoal(OutputGoal):
    """The goal of an activation: minus the gradient of each sample's loss at what a layer reads, whoever reads it too.

    Zero where no gradient arrives, as where forward switches gradients off.
    """

    @property
    def goals(self) -> tuple[str, ...]:
        return ()

    @property
    def wishes(self) -> tuple[str, ...]:
        return (self.edge,)

    def count(self, batch: Batch) -> int:
        capture = batch[self.edge]
        return capture.inputs.numel() // capture.inputs.shape[capture.rule.channel_dim(capture.inputs.ndim)]

    def rows(self, batch: Batch) -> Tensor:
        capture = batch[self.edge]
        wish = capture.wanted_of_inputs()
        return wish.movedim(capture.rule.channel_dim(wish.ndim), -1).flatten(0, -2)

    def picture(self, batch: Batch) -> Tensor | None:
        capture = batch[self.edge]
        return capture.wanted_of_inputs() if capture.geometry is not None else None


@dataclass(frozen=True, eq=False)
class Hidden(Feature):
    """Hidden units of a new layer: ``h = sigma(alpha^T p)``, one column each.

    Attributes:
        source: ``p``, with the constant 1 for the units' biases.
        alpha: ``[p, k]``.
        activation: sigma, entry by entry.
    """

    source: Feature
    alpha: Tensor = field(repr=False)
    activation: nn.Module = field(repr=False)

    @property
    def edges(self) -> tuple[str, ...]:
        return self.source.edges

    def count(self, batch: Batch) -> int:
        return self.source.count(batch)

    def rows(self, batch: Batch) -> Tensor:
        return self.activation(self.source.projected(batch, self.alpha))


@dataclass(frozen=True)
class Squares(Feature):
    """The squares of other features."""

    source: Feature

    @property
    def edges(self) -> tuple[str, ...]:
        return self.source.edges

    def count(self, batch: Batch) -> int:
        return self.source.count(batch)

    def rows(self, batch: Batch) -> Tensor:
        return self.source.rows(batch).square()


@dataclass(frozen=True)
class Ones(Squares):
    """The constant 1 alone, as often as there are rows of other features."""

    def rows(self, batch: Batch) -> Tensor:
        return torch.ones_like(self.source.rows(batch)[:, :1])
