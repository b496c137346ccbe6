"""Second moments of features that have more entries than there are rows: kept as rows, they are small.

``E x y^T`` of n rows has rank n at most. With n far below dx and dy the rows tell all of it in ``n (dx + dy)`` numbers
instead of ``dx dy``, and their Gram ``[n, n]`` has its eigenvalues, for ``n^2 d`` operations instead of ``d^3``.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dagrow.solvers._grams import add_gram, complete

_WEIGHED = 256  #: columns whose magnitudes are all summed, and of the others those that are


def row_noise(resolution: float | None) -> float:
    """Below what eigenvalues of a Gram of rows, with ones on its diagonal, say nothing.

    Its own rounding is that of double precision. But goals are divided by eigenvalues, which are squares: what rounding
    of a goal adds stays below a ten-thousandth of it.

    Args:
        resolution: relative precision of goals, and of entries of rows.

    Returns:
        The bound.
    """
    return (100 * (resolution or 0.0)) ** 2


@dataclass(eq=False)
class Rows:
    """The rows of one feature.

    Attributes:
        folds: ``[n_f, d]`` for each fold.
    """

    folds: list[Tensor]

    def __add__(self, other: "Rows") -> "Rows":
        return Rows([torch.cat(parts) for parts in zip(self.folds, other.folds, strict=True)])

    def products(self, other: "Rows") -> list[Tensor]:
        """The sums over rows of ``x y^T`` ``[dx, dy]``, for each fold, in the wider type of the two."""
        dtype = torch.promote_types(self.folds[0].dtype, other.folds[0].dtype)
        return [x.to(dtype).T @ y.to(dtype) for x, y in zip(self.folds, other.folds, strict=True)]

    def joined(self, folds: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The rows of some folds ``[n, d]``."""
        return torch.cat([self.folds[fold] for fold in folds]).to(dtype)


@dataclass(frozen=True, eq=False)
class RowProduct:
    """The mean of ``x y^T`` over samples, as rows.

    Attributes:
        x: ``[n, dx]``.
        y: ``[n, dy]``.
        samples: how many.
    """

    x: Tensor
    y: Tensor
    samples: int

    @property
    def shape(self) -> tuple[int, int]:
        """``dx, dy``."""
        return self.x.shape[1], self.y.shape[1]

    def _transposed(self) -> "RowProduct":
        return RowProduct(self.y, self.x, self.samples)

    T = property(_transposed)  #: the transpose, by its name in torch

    def __len__(self) -> int:
        return self.x.shape[1]

    def __matmul__(self, columns: Tensor) -> Tensor:
        """Its product with ``[dy, k]``."""
        return self.x.T @ (self.y @ columns.to(self.y)) / self.samples

    def columns(self, indices: Tensor) -> "RowProduct":
        """Those with some indices."""
        return RowProduct(self.x, self.y[:, indices], self.samples)

    def diagonal(self) -> Tensor:
        """Its diagonal."""
        return (self.x * self.y).sum(0) / self.samples

    def magnitudes_times(self, columns: Tensor) -> Tensor:
        """``|P| C``, with the magnitudes of its entries, about: they are not all made, but where C is large.

        Args:
            columns: ``[dy, k]``, none negative.

        Returns:
            ``[dx, k]``; of all but the few hundred columns of P that weigh most, each of some stands for several.
        """
        order = (columns.amax(1) * self.y.square().sum(0).sqrt()).argsort(descending=True)
        first, rest = order[:_WEIGHED], order[_WEIGHED:]
        some = rest[:: -(-len(rest) // _WEIGHED) or 1]
        magnitudes = [self.columns(chosen).dense().abs() @ columns[chosen] for chosen in (first, some)]
        return magnitudes[0] + magnitudes[1] * (len(rest) / max(1, len(some)))

    def dense(self) -> Tensor:
        """The matrix ``[dx, dy]``."""
        return self.x.T @ self.y / self.samples

    def is_independent(self, resolution: float) -> bool:
        """Whether the rows of x are linearly independent, so that any goals of theirs can be followed.

        Args:
            resolution: relative precision of their entries.

        Returns:
            False where that is not sure.
        """
        unit = self.diagonal().clamp_min(0)
        scale = torch.where(unit > 0, unit, 1).rsqrt()
        factor, failed = torch.linalg.cholesky_ex(self._gram(scale))
        pivots = factor.diagonal().square()
        least = max(row_noise(resolution), torch.finfo(pivots.dtype).eps * self.x.shape[1] * float(pivots.max()))
        return not failed and bool(pivots.min() > least)

    def _gram(self, scale: Tensor) -> Tensor:
        """``x D^2 x^T`` of the scaled rows, in double precision ``[n, n]``."""
        rows = self.x.double() * scale
        gram = rows.new_zeros(len(rows), len(rows))
        add_gram(gram, rows.T)
        complete(gram)
        return gram.div_(self.samples)

    @cached_property
    def _triangular(self) -> list[tuple[Tensor, "Triangular | None"]]:
        return []

    def triangular(self, scale: Tensor) -> "Triangular | None":
        """An orthonormal basis of what the scaled rows span: ``Q^T = D x^T L^-T`` with ``x D^2 x^T = L L^T``.

        It takes a tenth of the time of :meth:`spectrum`, and is as exact where the rows are far from dependent.

        Args:
            scale: the diagonal D ``[d]``.

        Returns:
            The basis; None where rows are so nearly dependent that it might not be orthonormal.
        """
        for known, found in self._triangular:
            if torch.equal(known, scale):
                return found
        found = self._orthonormal(scale)
        self._triangular[:] = [(scale, found)]  # for all ridges
        return found

    def _orthonormal(self, scale: Tensor) -> "Triangular | None":
        gram = self._gram(scale)
        lower, failed = torch.linalg.cholesky_ex(gram)
        if failed:
            return None
        inverse = torch.linalg.solve_triangular(lower, torch.eye(len(lower)).to(lower), upper=False)
        smallest = 1 / float(inverse.square().sum())  # the largest eigenvalue of the inverse is at most its trace
        precise = max(torch.finfo(self.x.dtype).eps, torch.finfo(gram.dtype).eps ** 0.5)
        if not torch.finfo(gram.dtype).eps * float(gram.trace()) <= precise * smallest:
            return None
        rows = self.x * (scale / self.samples**0.5).to(self.x)
        return Triangular(RowProduct(rows, inverse.T.to(self.x), 1), lower.T @ lower, smallest)

    @cached_property
    def _spectra(self) -> list[tuple[Tensor, Tensor, "RowProduct"]]:
        return []

    def spectrum(self, scale: Tensor) -> tuple[Tensor, "RowProduct"]:
        """Eigenvalues of the Gram ``D E x x^T D``, the largest last, and orthonormal eigenvectors.

        Args:
            scale: the diagonal D ``[d]``.

        Returns:
            ``[r]`` in double precision, and ``[d, r]`` as combinations of the rows, without what is zero but for
            rounding.
        """
        for known, values, vectors in self._spectra:
            if torch.equal(known, scale):
                return values, vectors
        values, left = torch.linalg.eigh(self._gram(scale))
        kept = values > torch.finfo(values.dtype).eps * len(values) * values[-1:].clamp_min(0)
        rows = self.x * (scale / self.samples**0.5).to(self.x)
        vectors = RowProduct(rows, (left[:, kept] * values[kept].rsqrt()).to(self.x), 1)
        self._spectra[:] = [(scale, values[kept], vectors)]  # for all ridges
        return values[kept], vectors


@dataclass(frozen=True, eq=False)
class Triangular:
    """Scaled rows in an orthonormal basis of their span, ``D E x x^T D = Q^T C Q``.

    Attributes:
        vectors: ``Q^T [d, n]``, as combinations of the rows.
        gram: ``C = L^T L [n, n]``, in double precision.
        smallest: its eigenvalues are at least so large.
    """

    vectors: RowProduct
    gram: Tensor
    smallest: float


Product = Tensor | RowProduct  #: a matrix, or one that is known by rows


def dense(product: Product) -> Tensor:
    """A product as a matrix.

    Args:
        product: in any form.

    Returns:
        ``[dx, dy]``.
    """
    return product.dense() if isinstance(product, RowProduct) else product


def magnitudes_times(product: Product, columns: Tensor) -> Tensor:
    """``|P| C``, with the magnitudes of a product's entries; about, of many that are known by rows.

    Args:
        product: in any form.
        columns: ``[dy, k]``, none negative.

    Returns:
        ``[dx, k]``.
    """
    return product.magnitudes_times(columns) if isinstance(product, RowProduct) else product.abs() @ columns


def mean_of(products: Sequence[Product]) -> Product:
    """The mean of Grams of features that are as wide as each other.

    Args:
        products: in any form.

    Returns:
        As rows, if all of them are, and they are few together. Those of the same features count once.
    """
    by_rows = [product for product in products if isinstance(product, RowProduct)]
    distinct = {id(product.x): product for product in by_rows}
    if len(products) == 1 or (len(by_rows) == len(products) and len(distinct) == 1):
        return products[0]
    if len(by_rows) < len(products) or 2 * sum(len(product.x) for product in distinct.values()) > len(by_rows[0]):
        return torch.stack([*map(dense, products)]).mean(0)
    times = Counter(id(product.x) for product in by_rows)
    parts = [product.x * (times[key] / (product.samples * len(products))) ** 0.5 for key, product in distinct.items()]
    rows = torch.cat(parts)
    return RowProduct(rows, rows, 1)
