"""Products that are known by rows are as good as the matrices that they stand for."""

import pytest
import torch
from regressions import near

from dagrow.solvers._linalg import whitening
from dagrow.solvers._row_products import RowProduct, dense, magnitudes_times, mean_of


def drawn(n: int, d: int, seed: int) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("n", "d"), [(5, 12), (12, 5), (1, 7)])
def test_a_product_is_its_matrix(n: int, d: int) -> None:
    x, y, columns = drawn(n, d, 0), drawn(n, 4, 1), drawn(4, 3, 2)
    product, matrix = RowProduct(x, y, 8), x.T @ y / 8
    assert product.shape == matrix.shape
    assert len(product) == len(matrix)
    near(dense(product), matrix)
    near(dense(product.T), matrix.T)
    near(product @ columns, matrix @ columns)
    near(dense(product.columns(torch.tensor([2, 0]))), matrix[:, [2, 0]])
    near(magnitudes_times(product, columns.abs()), matrix.abs() @ columns.abs())
    assert magnitudes_times(product, columns[:, :0]).shape == (d, 0)
    near(RowProduct(x, x, 8).diagonal(), (x.T @ x / 8).diagonal())


@pytest.mark.parametrize("ridge", [0.0, 1e-3, 2.0])
def test_vectors_in_the_span_are_whitened_as_by_the_matrix(ridge: float) -> None:
    """By one decomposition for all ridges, and another for features of another size."""
    x, goals = drawn(6, 15, 0), drawn(6, 2, 1)
    x[:, 3] = 0
    product, n = RowProduct(x, x, 6), x.T @ goals
    for unit in (None, torch.arange(1.0, 16.0).double()):
        known, matrix = whitening(product, ridge, unit=unit), whitening(dense(product), ridge, unit=unit)
        near(known.solve(n), matrix.solve(n), 1e-10)
        near(known.whiten(n).norm(), matrix.whiten(n).norm(), 1e-10)
        assert known.note == matrix.note == ("" if ridge else "rank cut from 15 to 6")
    assert whitening(product, ridge).rank == 6


def test_the_mean_of_products() -> None:
    """Rows of the same features count once; where all of them together are many, it is a matrix."""
    x, z = drawn(6, 40, 0), drawn(6, 40, 1)
    first, same, other = RowProduct(x, x, 6), RowProduct(x, x, 6), RowProduct(z, z, 3)
    assert mean_of([first, same.T]) is first
    for products, rows in (([first, same, other], 12), ([first, dense(other)], None), ([first, other] * 9, 12)):
        mean = mean_of(products)
        near(dense(mean), torch.stack([*map(dense, products)]).mean(0))
        assert (len(mean.x) if isinstance(mean, RowProduct) else None) == rows
    others = [RowProduct(rows, rows, 6) for rows in drawn(24, 40, 2).split(6)]
    assert isinstance(mean_of(others), torch.Tensor)


def test_rows_in_single_precision_span_what_they_span_in_double() -> None:
    """Their Gram is in double precision: a mean that is by far the largest direction hides no other."""
    x, eps = (1 + 1e-3 * drawn(6, 400, 0)).float().double(), torch.finfo(torch.float32).eps
    product = RowProduct(x, x, 6)
    assert product.is_independent(eps)
    assert whitening(product, resolution=eps).rank == 6
    x[3] = x[2]
    product = RowProduct(x, x, 6)
    assert not product.is_independent(eps)
    assert whitening(product, resolution=eps).rank == 5


@pytest.mark.parametrize("distance", [1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_of_goals_is_not_magnified_by_rows_that_are_nearly_alike(distance: float, dtype: torch.dtype) -> None:
    x = drawn(25, 300, 0)
    x, goals = torch.cat([x, x + distance * drawn(25, 300, 1)]).float(), drawn(50, 3, 2).float()
    eps = torch.finfo(torch.float32).eps
    known = whitening(RowProduct(x.to(dtype), x.to(dtype), 50), resolution=eps)
    followed = known.whiten((x.T @ goals / 50).to(dtype)).square().sum() / (goals.square().sum() / 50)
    assert 0 < float(followed) < 1.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_of_zeros_span_nothing(dtype: torch.dtype) -> None:
    product = RowProduct(torch.zeros(4, 300, dtype=dtype), torch.zeros(4, 300, dtype=dtype), 4)
    assert not product.is_independent(1e-7)
    assert not whitening(product, resolution=1e-7).solve(torch.ones(300, 2, dtype=dtype)).any()


@pytest.mark.parametrize("ridge", [0.0, 1e-4, 1.0, 30.0])
@pytest.mark.parametrize("apart", [1.0, 0.1])
def test_three_forms_agree(apart: float, ridge: float) -> None:
    """Rows by Cholesky, rows by eigenvalues, and the matrix."""
    x = drawn(20, 300, 0)
    x, goals = torch.cat([x, x + apart * drawn(20, 300, 1)]), drawn(40, 3, 2)
    product, n = RowProduct(x, x, 40), x.T @ goals / 40
    rows, matrix = whitening(product, ridge), whitening(dense(product), ridge)
    product._triangular[:] = [(product.diagonal().rsqrt(), None)]  # as if rows were nearly dependent
    values = whitening(product, ridge)
    assert (rows.root.ndim, values.root.ndim) == (2, 1)
    assert rows.rank == values.rank == 40
    for known in (rows, values):
        near(known.solve(n), matrix.solve(n))
        near(known.whiten(n).T @ known.whiten(n), n.T @ matrix.solve(n))
        damped = dense(product) + ridge * torch.diag(product.diagonal())
        near(known.whiten(damped @ known.back(torch.eye(40).double())), torch.eye(40))


@pytest.mark.parametrize("ridge", [1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("apart", [1.0, 0.1, 1e-3, 1e-6, 0.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 1e-4)])
def test_rows_that_are_nearly_dependent(dtype: torch.dtype, tolerance: float, apart: float, ridge: float) -> None:
    """By Cholesky with a shift that is small beside the ridge, as by eigenvalues in double precision."""
    x = drawn(20, 300, 0).to(dtype)
    x, goals = torch.cat([x, x + apart * drawn(20, 300, 1).to(dtype)]), drawn(40, 3, 2)
    product, exact = RowProduct(x, x, 40), RowProduct(x.double(), x.double(), 40)
    found, exact._triangular[:] = whitening(product, ridge), [(exact.diagonal().rsqrt(), None)]
    expected = whitening(exact, ridge)
    assert (found.root.ndim, expected.root.ndim) == (2, 1)
    n = x.double().T @ goals / 40
    near(found.whiten(n.to(dtype)).square().sum(), expected.whiten(n).square().sum(), tolerance)
    near(x @ found.solve(n.to(dtype)), x.double() @ expected.solve(n), 10 * tolerance)


@pytest.mark.parametrize("ridge", [0.0, 1e-9])
def test_without_a_ridge_eigenvalues_say_what_counts(ridge: float) -> None:
    x = drawn(20, 300, 0)
    x = torch.cat([x, x + 1e-6 * drawn(20, 300, 1)])
    assert whitening(RowProduct(x, x, 40), ridge).root.ndim == 1


@pytest.mark.parametrize("heavy", [0, 3])
def test_magnitudes_of_many_columns_are_summed_nearly(heavy: int) -> None:
    """Also where a few columns, or a few weights, are by far the largest."""
    x, columns = drawn(50, 2000, 0), drawn(2000, 4, 1).abs()
    x[:, 100:400] *= 10.0**heavy
    columns[1000:1010] *= 10.0**heavy
    found, expected = magnitudes_times(RowProduct(x, x, 50), columns), (x.T @ x / 50).abs() @ columns
    near((columns * found).sum(0) / (columns * expected).sum(0), torch.ones(4), 0.1)
    near(found / expected, torch.ones(2000, 4), 0.3)


@pytest.mark.parametrize("ridge", [0.0, 1.0])
def test_no_rows_span_nothing(ridge: float) -> None:
    rows = torch.zeros(0, 300).double()
    known = whitening(RowProduct(rows, rows, 4), ridge)
    assert known.rank == 0
    assert not known.solve(torch.ones(300, 2).double()).any()
