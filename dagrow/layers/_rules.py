"""One rule per type of layer: the features that it reads, and what changes in it when it widens.

A weighted layer (an *edge* of the dag) is brought to the normal form ``a = W b``: rows of features ``b`` (the
bias is one more feature, constant 1) and rows of pre-activations ``a``. A *rider* carries one entry per channel.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor, nn

from dagrow.layers._geometry import Geometry


class LayerRule(ABC):
    """What dagrow has to know of a type of layer. Rules are values; hand your own to ``dagrow.trace(rules=...)``."""

    @property
    @abstractmethod
    def types(self) -> tuple[type[nn.Module], ...]:
        """The module classes that this rule speaks for; subclasses count when they keep the class's forward."""

    @abstractmethod
    def channel_dim(self, ndim: int) -> int:
        """The dimension that holds the channels of an input or output with ``ndim`` dimensions."""

    def covers(self, module: nn.Module) -> bool:
        """Whether the rule speaks for this very module of its types."""
        return True

    def refusal(self, module: nn.Module) -> str | None:
        """Why this very module cannot take new channels, or None."""
        return None

    def positions(self, inputs: Tensor, outputs: Tensor) -> int:
        """How often a forward pass uses each entry of the weight: once for each position of the output."""
        return outputs.numel() // max(1, outputs.shape[self.channel_dim(outputs.ndim)])


class EdgeRule(LayerRule):
    """A weighted layer ``a = W b``. Its weight is ``W`` with the input channels, and then their taps, side by side."""

    #: parameter name -> (dimension of output channels, dimension of input channels or None)
    dims: Mapping[str, tuple[int, int | None]]

    @abstractmethod
    def features(self, module: nn.Module, inputs: Tensor) -> Tensor:
        """What the layer reads, as rows ``[rows, i]``, without the constant of the bias."""

    @abstractmethod
    def rows(self, module: nn.Module, outputs: Tensor) -> Tensor:
        """An output (or the gradient at it) as rows ``[rows, o]``, aligned with :meth:`features`."""

    @abstractmethod
    def widths(self, module: nn.Module) -> tuple[int, int]:
        """Input and output channels."""

    @abstractmethod
    def attributes(self, inputs: int, outputs: int) -> dict[str, int]:
        """The module's attributes that state its widths, for the given numbers of channels."""

    def blocks(self, module: nn.Module) -> int:
        """Groups of channels, each of which is read and written by weights of its own, side by side in ``W``."""
        return 1

    def geometry(self, module: nn.Module) -> Geometry | None:
        """How a convolution slides over its input; None for a layer that does not."""
        return None

    def taps(self, module: nn.Module) -> int:
        """Features per input channel: the entries of a kernel."""
        geometry = self.geometry(module)
        return 1 if geometry is None else prod(geometry.kernel)


class RiderRule(LayerRule):
    """A layer with entries of its own for every channel, or every group of channels, and no mixing beyond them."""

    @abstractmethod
    def attributes(self, module: nn.Module, width: int) -> dict[str, int]:
        """The module's attributes that state its widths, for ``width`` output channels."""

    @abstractmethod
    def passing(self, module: nn.Module) -> dict[str, Tensor]:
        """For each parameter and buffer with one entry per output channel: the entries of one new group ``[outputs,
        ...]``, or a scalar for all, that let a channel through as unchanged as the layer can."""

    def group(self, module: nn.Module) -> tuple[int, int]:
        """Neighbouring input and output channels that only grow together."""
        return 1, 1

    def calibrated(self, module: nn.Module, mean: Tensor, variance: Tensor) -> dict[str, Tensor]:
        """Entries for new channels with these statistics at the layer's input, if it keeps statistics.

        The channels still pass unchanged in eval mode, and now in train mode as well.
        """
        return {}

    def source(self, module: nn.Module, sizes: Sequence[int]) -> list[Tensor] | None:
        """Which input position each output position reads, for each dimension of space: ``[out, taps]``, -1 for none.
        None where positions stay as they are."""
        return None


def rule_for(module: nn.Module, rules: Sequence[LayerRule]) -> LayerRule | None:
    """The first rule whose types include the module's class with its forward unchanged."""
    for rule in rules:
        for kind in rule.types:
            if isinstance(module, kind) and type(module).forward is kind.forward and rule.covers(module):
                return rule
    return None


def with_constant(features: Tensor, bias: bool) -> Tensor:
    """Appends the constant feature 1 that a bias multiplies."""
    return torch.cat([features, features.new_ones(len(features), 1)], dim=1) if bias else features
