"""One rule per type of layer: the features that it reads, and what changes in it when it widens.

A weighted layer (an *edge* of the dag) is brought to the normal form ``a = W b``: rows of features ``b`` (the
bias is one more feature, constant 1) and rows of pre-activations ``a``. A *rider* carries one entry per channel.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from einops import rearrange
from torch import Tensor, nn

__all__ = ["BATCH_NORM", "DEFAULT_RULES", "LINEAR", "EdgeRule", "LayerRule", "RiderRule", "rule_for"]


class LayerRule(ABC):
    """What dagrow has to know of a type of layer. Rules are values; hand your own to ``dagrow.trace(rules=...)``."""

    @property
    @abstractmethod
    def types(self) -> tuple[type[nn.Module], ...]:
        """The module classes that this rule speaks for; subclasses count when they keep the class's forward."""

    def refusal(self, module: nn.Module) -> str | None:
        """Why this very module cannot take new channels, or None."""
        return None


class EdgeRule(LayerRule):
    """A weighted layer ``a = W b``."""

    #: parameter name -> (dimension of output channels, dimension of input channels or None)
    dims: Mapping[str, tuple[int, int | None]]

    @abstractmethod
    def channel_dim(self, ndim: int) -> int:
        """The dimension that holds the channels of an input or output with ``ndim`` dimensions."""

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


class RiderRule(LayerRule):
    """A layer with one entry per channel, through which a new channel must pass unchanged."""

    #: parameters and buffers with one entry per channel
    entries: tuple[str, ...]

    @abstractmethod
    def channel_dim(self, ndim: int) -> int:
        """The dimension that holds the channels of an input with ``ndim`` dimensions."""

    @abstractmethod
    def attributes(self, width: int) -> dict[str, int]:
        """The module's attributes that state its width."""

    @abstractmethod
    def calibrated(self, module: nn.Module, mean: Tensor, variance: Tensor) -> dict[str, Tensor]:
        """Entries for new channels with these statistics at the layer's input.

        The channels still pass unchanged in eval mode, and now in train mode as well.
        """


@dataclass(frozen=True)
class LinearRule(EdgeRule):
    """``nn.Linear``: any number of leading dimensions, each position is one row."""

    types = (nn.Linear,)
    dims = MappingProxyType({"weight": (0, 1), "bias": (0, None)})

    def channel_dim(self, ndim: int) -> int:
        return ndim - 1

    def features(self, module: nn.Module, inputs: Tensor) -> Tensor:
        return rearrange(inputs, "... i -> (...) i")

    def rows(self, module: nn.Module, outputs: Tensor) -> Tensor:
        return rearrange(outputs, "... o -> (...) o")

    def widths(self, module: nn.Module) -> tuple[int, int]:
        assert isinstance(module, nn.Linear)  # whose weight may be computed
        o, i = module.weight.shape
        return i, o

    def attributes(self, inputs: int, outputs: int) -> dict[str, int]:
        return {"in_features": inputs, "out_features": outputs}


@dataclass(frozen=True)
class BatchNormRule(RiderRule):
    """``nn.BatchNorm1d``. With running mean m, variance s^2, weight sqrt(s^2 + eps) and bias m it is the identity."""

    types = (nn.BatchNorm1d,)
    entries = ("weight", "bias", "running_mean", "running_var")

    def channel_dim(self, ndim: int) -> int:
        return 1

    def attributes(self, width: int) -> dict[str, int]:
        return {"num_features": width}

    def refusal(self, module: nn.Module) -> str | None:
        assert isinstance(module, nn.BatchNorm1d)
        if not module.affine:
            return "a BatchNorm without affine parameters cannot pass a new channel unchanged"
        if not module.track_running_stats:
            return "a BatchNorm without running statistics mixes the samples of a batch"
        return None

    def calibrated(self, module: nn.Module, mean: Tensor, variance: Tensor) -> dict[str, Tensor]:
        assert isinstance(module, nn.BatchNorm1d)
        deviation = (variance + module.eps).sqrt()
        return {"weight": deviation, "bias": mean, "running_mean": mean, "running_var": variance}


LINEAR, BATCH_NORM = LinearRule(), BatchNormRule()
DEFAULT_RULES: tuple[LayerRule, ...] = (LINEAR, BATCH_NORM)


def rule_for(module: nn.Module, rules: Sequence[LayerRule]) -> LayerRule | None:
    """The first rule whose types include the module's class with its forward unchanged."""
    for rule in rules:
        for kind in rule.types:
            if isinstance(module, kind) and type(module).forward is kind.forward:
                return rule
    return None


def with_constant(features: Tensor, bias: bool) -> Tensor:
    """Appends the constant feature 1 that a bias multiplies."""
    return torch.cat([features, features.new_ones(len(features), 1)], dim=1) if bias else features
