"""Features of new paths: what new layers would read and compute, and what activations want."""

from dataclasses import dataclass, field
from math import prod

from torch import Tensor, nn

from dagrow.layers import Geometry, with_constant
from dagrow.statistics._captures import Batch
from dagrow.statistics._features import LayerInputs, OneLayer, Wrapped


@dataclass(frozen=True)
class PatchInputs(LayerInputs):
    """What a new convolution would read of the images that a layer reads.

    Attributes:
        edge: the layer that reads the images.
        bias: whether the constant 1 comes last.
        geometry: how the new convolution would slide over them.
    """

    bias: bool = True
    geometry: Geometry = field(kw_only=True)

    def inputs(self, batch: Batch) -> Tensor:
        return batch[self.edge].old_inputs()

    def geometry_in(self, batch: Batch) -> Geometry:
        return self.geometry

    def count(self, batch: Batch) -> int:
        inputs = batch[self.edge].inputs
        return len(inputs) * prod(self.geometry.sizes(inputs.shape[2:]))

    def rows(self, batch: Batch) -> Tensor:
        return with_constant(self.geometry.patches(self.inputs(batch)).flatten(0, 1), self.bias)

    def image(self, batch: Batch) -> Tensor | None:
        is_pointwise = prod(self.geometry.kernel) == 1 and not any(map(any, self.geometry.margins))
        steps = (slice(None), slice(None), *(slice(None, None, step) for step in self.geometry.stride))
        return self.inputs(batch)[steps].contiguous() if is_pointwise else None


@dataclass(frozen=True)
class MeanInputs(OneLayer):
    """The mean over positions of each image that a convolution reads, with the constant 1: one row per image.

    Attributes:
        edge: the convolution's name.
        bias: whether the constant 1 comes last.
    """

    bias: bool = True

    def count(self, batch: Batch) -> int:
        return len(batch[self.edge].inputs)

    def rows(self, batch: Batch) -> Tensor:
        return with_constant(batch[self.edge].old_inputs().flatten(2).mean(2), self.bias)


@dataclass(frozen=True)
class ActivationGoal(OneLayer):
    """The goal of an activation: minus the gradient of each sample's loss at what a layer reads, whoever reads it too.

    Zero where no gradient arrives, as where forward switches gradients off.

    Attributes:
        edge: the layer that reads the activation.
    """

    @property
    def input_goals(self) -> tuple[str, ...]:
        return (self.edge,)

    def count(self, batch: Batch) -> int:
        capture = batch[self.edge]
        return capture.inputs.numel() // capture.inputs.shape[capture.channel_dim]

    def rows(self, batch: Batch) -> Tensor:
        capture = batch[self.edge]
        return capture.channels_last(capture.goal_at_inputs())

    def image(self, batch: Batch) -> Tensor | None:
        capture = batch[self.edge]
        return capture.goal_at_inputs() if capture.geometry is not None else None


@dataclass(frozen=True, eq=False)
class Hidden(Wrapped):
    """Hidden units of a new layer: ``h = sigma(alpha^T p)``, one column each.

    Attributes:
        source: ``p``, with the constant 1 for the units' biases.
        alpha: ``[p, k]``.
        activation: sigma, entry by entry.
    """

    alpha: Tensor = field(repr=False)
    activation: nn.Module = field(repr=False)

    def rows(self, batch: Batch) -> Tensor:
        return self.activation(self.source.projected(batch, self.alpha))
