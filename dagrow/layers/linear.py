"""Linear layers."""

from dataclasses import dataclass
from types import MappingProxyType

from einops import rearrange
from torch import Tensor, nn

from dagrow.layers.base import EdgeRule

__all__ = ["LINEAR"]


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


LINEAR = LinearRule()
