"""Linear layers."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from einops import rearrange
from torch import Tensor, nn

from dagrow.layers.base import EdgeRule

__all__ = ["LINEAR", "TRANSPOSED", "TransposedLinear"]


class TransposedLinear(nn.Module):
    """``x W + b`` with ``W [i, o]``: what a product with a parameter computes."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias
        self.in_features, self.out_features = weight.shape

    def forward(self, inputs: Tensor) -> Tensor:
        product = inputs @ self.weight
        return product if self.bias is None else product + self.bias


@dataclass(frozen=True)
class LinearRule(EdgeRule):
    """``nn.Linear``, and products with a parameter: any number of leading dimensions, each position is one row."""

    transposed: bool = False

    @property
    def types(self) -> tuple[type[nn.Module], ...]:  # type: ignore[override]
        return (TransposedLinear if self.transposed else nn.Linear,)

    @property
    def dims(self) -> Mapping[str, tuple[int, int | None]]:  # type: ignore[override]
        return MappingProxyType({"weight": (1, 0) if self.transposed else (0, 1), "bias": (0, None)})

    def channel_dim(self, ndim: int) -> int:
        return ndim - 1

    def features(self, module: nn.Module, inputs: Tensor) -> Tensor:
        return rearrange(inputs, "... i -> (...) i")

    def rows(self, module: nn.Module, outputs: Tensor) -> Tensor:
        return rearrange(outputs, "... o -> (...) o")

    def widths(self, module: nn.Module) -> tuple[int, int]:
        weight = module.weight  # which may be computed
        assert isinstance(weight, Tensor)
        o, i = self.dims["weight"]
        assert i is not None
        return weight.shape[i], weight.shape[o]

    def attributes(self, inputs: int, outputs: int) -> dict[str, int]:
        return {"in_features": inputs, "out_features": outputs}


LINEAR, TRANSPOSED = LinearRule(), LinearRule(transposed=True)
