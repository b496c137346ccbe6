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
        """The dimension that holds the channels.

        Args:
            ndim: of an input or output.

        Returns:
            From 0 on.
        """

    def covers(self, module: nn.Module) -> bool:
        """Whether the rule speaks for this very module.

        Args:
            module: of one of its types.

        Returns:
            True by default.
        """
        return True

    def refusal(self, module: nn.Module) -> str | None:
        """Why this very module cannot take new channels.

        Args:
            module: that the rule covers.

        Returns:
            The reason as users read it, or None if it can.
        """
        return None

    def positions(self, inputs: Tensor, outputs: Tensor) -> int:
        """How often a forward pass uses each entry of the weight.

        Args:
            inputs: what the layer read.
            outputs: what it wrote.

        Returns:
            Once for each position of the output.
        """
        return outputs.numel() // max(1, outputs.shape[self.channel_dim(outputs.ndim)])


class EdgeRule(LayerRule):
    """A weighted layer ``a = W b``. Its weight is ``W`` with the input channels, and then their taps, side by side.

    Attributes:
        dims: parameter name -> (dimension of output channels, dimension of input channels or None).
    """

    dims: Mapping[str, tuple[int, int | None]]

    @abstractmethod
    def features(self, module: nn.Module, inputs: Tensor) -> Tensor:
        """What the layer reads, as rows, without the constant of the bias.

        Args:
            module: that the rule covers.
            inputs: of a batch.

        Returns:
            ``[rows, i]``.
        """

    @abstractmethod
    def rows(self, module: nn.Module, outputs: Tensor) -> Tensor:
        """An output (or the gradient at it) as rows, aligned with :meth:`features`.

        Args:
            module: that the rule covers.
            outputs: of a batch.

        Returns:
            ``[rows, o]``.
        """

    @abstractmethod
    def widths(self, module: nn.Module) -> tuple[int, int]:
        """Input and output channels.

        Args:
            module: that the rule covers.

        Returns:
            Both, of a group if there are several.
        """

    @abstractmethod
    def attributes(self, inputs: int, outputs: int) -> dict[str, int]:
        """The module's attributes that state its widths.

        Args:
            inputs: input channels.
            outputs: output channels.

        Returns:
            What they are for so many channels.
        """

    def blocks(self, module: nn.Module) -> int:
        """Groups of channels, each of which is read and written by weights of its own, side by side in ``W``.

        Args:
            module: that the rule covers.

        Returns:
            1 by default.
        """
        return 1

    def geometry(self, module: nn.Module) -> Geometry | None:
        """How a convolution slides over its input.

        Args:
            module: that the rule covers.

        Returns:
            None for a layer that does not.
        """
        return None

    def taps(self, module: nn.Module) -> int:
        """Features per input channel.

        Args:
            module: that the rule covers.

        Returns:
            The entries of a kernel.
        """
        geometry = self.geometry(module)
        return 1 if geometry is None else prod(geometry.kernel)


class RiderRule(LayerRule):
    """A layer with entries of its own for every channel, or every group of channels, and no mixing beyond them."""

    @abstractmethod
    def attributes(self, module: nn.Module, width: int) -> dict[str, int]:
        """The module's attributes that state its widths.

        Args:
            module: that the rule covers.
            width: output channels.

        Returns:
            What they are for so many channels.
        """

    @abstractmethod
    def passing(self, module: nn.Module) -> dict[str, Tensor]:
        """Entries that let a new channel through as unchanged as the layer can.

        Args:
            module: that the rule covers.

        Returns:
            For each parameter and buffer with one entry per output channel: the entries of one new group ``[outputs,
            ...]``, or a scalar for all.
        """

    def group(self, module: nn.Module) -> tuple[int, int]:
        """Neighbouring channels that only grow together.

        Args:
            module: that the rule covers.

        Returns:
            Of the input and of the output; 1 and 1 by default.
        """
        return 1, 1

    def calibrated(self, module: nn.Module, mean: Tensor, variance: Tensor) -> dict[str, Tensor]:
        """Entries for new channels, if the layer keeps statistics of what it reads.

        The channels still pass unchanged in eval mode, and now in train mode as well.

        Args:
            module: that the rule covers.
            mean: of new channels at the layer's input.
            variance: of the same.

        Returns:
            By parameter and buffer; empty by default.
        """
        return {}

    def source(self, module: nn.Module, sizes: Sequence[int]) -> list[Tensor] | None:
        """Which input positions each output position reads.

        Args:
            module: that the rule covers.
            sizes: of the input's dimensions of space.

        Returns:
            For each dimension of space ``[out, taps]``, -1 for none; None where positions stay as they are.
        """
        return None


def rule_for(module: nn.Module, rules: Sequence[LayerRule]) -> LayerRule | None:
    """The rule that speaks for a module.

    Args:
        module: of any class.
        rules: in the order in which they are asked.

    Returns:
        The first whose types include the module's class with its forward unchanged, or None.
    """
    for rule in rules:
        for kind in rule.types:
            if isinstance(module, kind) and type(module).forward is kind.forward and rule.covers(module):
                return rule
    return None


def with_constant(features: Tensor, bias: bool) -> Tensor:
    """Appends the constant feature 1 that a bias multiplies.

    Args:
        features: ``[rows, i]``.
        bias: whether there is one.

    Returns:
        ``[rows, i + 1]``, or the features as they are.
    """
    return torch.cat([features, features.new_ones(len(features), 1)], dim=1) if bias else features
