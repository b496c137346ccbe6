"""Which features a fit is on: all of them, some of them, or combinations of them."""

from dataclasses import dataclass

from torch import Tensor

from dagrow.solvers._row_products import Product, RowProduct, dense


@dataclass(frozen=True, eq=False)
class Basis:
    """The columns ``B [p, k]`` that stand for p features.

    Attributes:
        choice: None for all features (B is the identity); the indices ``[k]`` of some; or B itself.
    """

    choice: Tensor | None = None

    @property
    def _combines(self) -> bool:
        return self.choice is not None and self.choice.is_floating_point()

    def columns(self, a: Product) -> Product:
        """``A B``."""
        if self.choice is None:
            return a
        if isinstance(a, RowProduct):
            return a @ self.choice if self._combines else a.columns(self.choice)
        return a @ self.choice.to(a) if self._combines else a[:, self.choice]

    def rows(self, a: Product) -> Product:
        """``B^T A``."""
        return self.columns(a.T).T

    def diagonal(self, p: Product) -> Tensor:
        """The diagonal of ``B^T P B`` ``[k]``."""
        if self.choice is None or not self._combines:
            return p.diagonal() if self.choice is None else p.diagonal()[self.choice]
        columns = dense(self.columns(p))
        return (self.choice.to(columns) * columns).sum(0)

    def spread(self, x: Tensor, size: int) -> Tensor:
        """``X B^T [o, p]``: what weights ``X [o, k]`` are for the p = ``size`` features themselves."""
        if self.choice is None:
            return x
        if self._combines:
            return x @ self.choice.to(x).T
        return x.new_zeros(len(x), size).index_copy(1, self.choice, x)
