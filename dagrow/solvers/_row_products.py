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

_CONVERTED = 512  #: entries of rows that are converted at once
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
        """Its product with ``[dy, k]``, in the wider type of x and y."""
        dtype = torch.promote_types(self.x.dtype, self.y.dtype)
        return _product(self.x.T, _product(self.y, columns, dtype), dtype) / self.samples

    def __rmatmul__(self, rows: Tensor) -> Tensor:
        """The product of ``[k, dx]`` with it, in the wider type of x and y."""
        return (self.T @ rows.T).T

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
        order = (columns.sum(1) * self.y.square().sum(0).sqrt()).argsort(descending=True)
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
        if len(self.x) > int(unit.count_nonzero()):
            return False
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
        """A basis of what the scaled rows span: ``Q^T = D x^T L^-T`` with ``x D^2 x^T + shift = L L^T``.

        It takes a tenth of the time of :meth:`spectrum`. Where rows are far from dependent there is no shift, and Q is
        orthonormal. Else directions with eigenvalues below the shift are shortened: of what a fit with a ridge
        explains they are ``shift / ridge`` at most.

        Args:
            scale: the diagonal D ``[d]``.

        Returns:
            The basis; None where there is none in double precision.
        """
        for known, found in self._triangular:
            if torch.equal(known, scale):
                return found
        found = self._orthonormal(scale)
        self._triangular[:] = [(scale, found)]  # for all ridges
        return found

    def _orthonormal(self, scale: Tensor) -> "Triangular | None":
        gram, own = self._gram(scale), torch.finfo(self.x.dtype).eps
        eps, trace, one = torch.finfo(gram.dtype).eps, float(gram.trace()), torch.eye(len(gram)).to(gram)
        for shift in (0.0, max(own / 1000, 10 * eps * trace)):
            lower, failed = torch.linalg.cholesky_ex(gram + shift * one)
            if failed:
                continue
            inverse = torch.linalg.solve_triangular(lower, one, upper=False)
            smallest = float(inverse.square().sum().reciprocal())  # eigenvalues of the inverse are at most its trace
            if shift or eps * trace <= max(own, eps**0.5) * smallest:
                weights = inverse.T if shift else inverse.T.to(self.x)
                return Triangular(self._combined(weights), lower.T @ lower, shift, 0.0 if shift else smallest)
        return None

    def _combined(self, weights: Tensor) -> "RowProduct":
        """Sums of rows over the root of the number of samples, with weights ``[n, r]``."""
        return RowProduct(self.x, weights * self.samples**0.5, self.samples)

    @cached_property
    def _spectra(self) -> list[tuple[Tensor, Tensor, "RowProduct"]]:
        return []

    def spectrum(self, scale: Tensor) -> tuple[Tensor, "RowProduct"]:
        """Eigenvalues of the Gram ``D E x x^T D``, the largest last, and orthonormal eigenvectors.

        Args:
            scale: the diagonal D ``[d]``.

        Returns:
            ``[r]`` in double precision, and the vectors ``[d, r]``, without what is zero but for rounding; these as
            combinations of the rows, which D makes orthonormal.
        """
        for known, values, vectors in self._spectra:
            if torch.equal(known, scale):
                return values, vectors
        values, left = torch.linalg.eigh(self._gram(scale))
        kept = values > torch.finfo(values.dtype).eps * len(values) * values[-1:].clamp_min(0)
        vectors = self._combined(left[:, kept] * values[kept].rsqrt())
        self._spectra[:] = [(scale, values[kept], vectors)]  # for all ridges
        return values[kept], vectors


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """``a b`` in some type, without all of ``a`` in it: rounding of what combinations are large in is not theirs."""
    b = b.to(dtype)
    if a.dtype == dtype:
        return a @ b
    if len(a) > a.shape[1]:
        return torch.cat([part.to(dtype) @ b for part in a.split(_CONVERTED)])
    total = b.new_zeros(len(a), b.shape[1])
    for part, others in zip(a.split(_CONVERTED, 1), b.split(_CONVERTED), strict=True):
        total.addmm_(part.to(dtype), others)
    return total


@dataclass(frozen=True, eq=False)
class Triangular:
    """Scaled rows in a basis of their span, ``D E x x^T D = Q^T C Q``.

    Attributes:
        vectors: ``D^-1 Q^T [d, n]``: combinations of the rows as they are, which scaling would round.
        gram: ``C = L^T L [n, n]``, in double precision.
        shift: what was added to eigenvalues.
        smallest: without a shift, eigenvalues are at least so large.
    """

    vectors: RowProduct
    gram: Tensor
    shift: float
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
