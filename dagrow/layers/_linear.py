"""Linear layers."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

from einops import rearrange
from torch import Tensor, nn

from dagrow.layers._rules import EdgeRule


class Product(nn.Module):
    """A product with a parameter: ``x W^T + b``, or ``W x`` where features are columns.

    Args:
        weight: ``W [o, i]``, or its transpose.
        bias: ``[o]``, or None.
        turned: whether the weight is the transpose.
        columns: whether features are columns ``[..., i, s]`` instead of rows ``[..., s, i]``.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, turned: bool, columns: bool = False) -> None:
        super().__init__()
        self.weight, self.bias, self.turned, self.columns = weight, bias, turned, columns
        self.out_features, self.in_features = reversed(weight.shape) if turned else weight.shape

    def forward(self, inputs: Tensor) -> Tensor:
        """The product.

        Args:
            inputs: rows ``[..., i]`` or columns ``[..., i, s]``.

        Returns:
            ``[..., o]``, or ``[..., o, s]``.
        """
        weight = self.weight.T if self.turned else self.weight
        product = weight @ inputs if self.columns else inputs @ weight.T
        return product if self.bias is None else product + self.bias


@dataclass(frozen=True)
class LinearRule(EdgeRule):
    """``nn.Linear``: any number of leading dimensions, each position is one row."""

    types: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear,)  # type: ignore[misc]
    dims = MappingProxyType({"weight": (0, 1), "bias": (0, None)})

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


@dataclass(frozen=True)
class ProductRule(LinearRule):
    """Products with a parameter; ``columns`` where it stands on the left, ``turned`` where it is ``[i, o]``."""

    turned: bool = False
    columns: bool = False
    types = (Product,)

    @property
    def dims(self) -> Mapping[str, tuple[int, int | None]]:  # type: ignore[override]
        return MappingProxyType({"weight": (1, 0) if self.turned else (0, 1), "bias": (0, None)})

    def covers(self, module: nn.Module) -> bool:
        return (module.turned, module.columns) == (self.turned, self.columns)

    def channel_dim(self, ndim: int) -> int:
        return ndim - 2 if self.columns else ndim - 1

    def features(self, module: nn.Module, inputs: Tensor) -> Tensor:
        return rearrange(inputs, "... i s -> (... s) i") if self.columns else super().features(module, inputs)

    def rows(self, module: nn.Module, outputs: Tensor) -> Tensor:
        return rearrange(outputs, "... o s -> (... s) o") if self.columns else super().rows(module, outputs)


LINEAR = LinearRule()
PRODUCTS = tuple(ProductRule(turned, columns) for turned in (False, True) for columns in (False, True))
