"""Matrices: what is singular, dead or badly scaled."""

import pytest
import torch
from regressions import near

from dagrow.solvers._linalg import projected_energy, whitening


def test_features_that_are_mostly_dead_and_depend_on_each_other() -> None:
    """In single precision, where LAPACK's eigenvalues of such a matrix do not converge."""
    generator = torch.Generator().manual_seed(0)
    x, alive = torch.randn(400, 160, generator=generator), torch.randperm(785, generator=generator)[:160]
    x[:, 1] = x[:, 0]
    p = torch.zeros(785, 785)
    p[alive[:, None], alive] = x.T @ x / 400
    found = whitening(p)
    near(found.whiten(found.whiten(p).T), torch.eye(159), 1e-3)
    assert found.note == "rank cut from 785 to 159"


def layer_norm_moments(smallest: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Of features that sum to zero, with eigenvalues down to one, and of goals that they follow in part."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.logspace(0, smallest / 2, 40).double()
    x = torch.randn(900, 40, generator=generator).double() * sizes
    x = x @ torch.linalg.qr(torch.randn(40, 40, generator=generator).double()).Q
    x = x - x.mean(1, keepdim=True)
    v = x @ torch.randn(40, 7, generator=generator).double() + torch.randn(900, 7, generator=generator).double()
    x, v = x.to(dtype), v.to(dtype)
    return (x.T @ x / 900).double(), (x.T @ v / 900).double()


@pytest.mark.parametrize(
    ("dtype", "smallest", "tolerance"),
    [(torch.float64, -6, 1e-8), (torch.float64, -1, 1e-9), (torch.float32, -1, 1e-5)],
)
def test_energy_behind_a_layer_norm_needs_no_eigenvalues(
    dtype: torch.dtype, smallest: float, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    p, cross = layer_norm_moments(smallest, dtype)
    expected = float((cross * (torch.linalg.pinv(p, rtol=1e-6 if dtype == torch.float32 else 1e-12) @ cross)).sum())
    with monkeypatch.context() as patched:
        patched.setattr("dagrow.solvers._linalg.whitening", lambda *_: pytest.fail("all eigenvalues were computed"))
        energy, is_bound = projected_energy(p, cross, torch.finfo(dtype).eps)
    assert energy == pytest.approx(expected, rel=tolerance)
    assert not is_bound


@pytest.mark.parametrize("goals", ["all", "leading"])
def test_energy_with_eigenvalues_down_to_rounding_is_a_bound(goals: str) -> None:
    """Whether goals depend on the small ones or not."""
    p, cross = layer_norm_moments(-9, torch.float32)
    resolution = torch.finfo(torch.float32).eps
    if goals == "leading":
        leading = torch.linalg.eigh(p).eigenvectors[:, -1:]
        cross = leading @ (leading.T @ cross)
    energy, is_bound = projected_energy(p, cross, resolution)
    assert energy == pytest.approx(float(whitening(p, 0.0, resolution).whiten(cross).square().sum()))
    assert is_bound


def test_energy_of_few_directions_next_to_ones_near_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left out is as by eigenvalues, which are not needed; it is a bound."""
    p, cross = layer_norm_moments(-5, torch.float32)
    resolution = torch.finfo(torch.float32).eps
    expected = float(whitening(p, 0.0, resolution).whiten(cross).square().sum())
    monkeypatch.setattr("dagrow.solvers._linalg.whitening", lambda *_: pytest.fail("all eigenvalues were computed"))
    energy, is_bound = projected_energy(p, cross, resolution)
    assert energy == pytest.approx(expected, rel=1e-5)
    assert is_bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_energy_of_many_features_that_run_on_into_rounding(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """In single precision a bound, about as close as by eigenvalues; in double precision what the pseudo-inverse is."""
    generator, d = torch.Generator().manual_seed(0), 600
    sizes = torch.logspace(0, -5, d).double()
    x = (torch.randn(2000, d, generator=generator).double() * sizes) @ torch.linalg.qr(
        torch.randn(d, d, generator=generator).double()
    ).Q
    x[:, -40:] = x[:, :40]  # dependent but for nothing
    v = x @ torch.randn(d, 5, generator=generator).double() + torch.randn(2000, 5, generator=generator).double()
    truth = float((x.T @ v / 2000 * (torch.linalg.pinv(x.T @ x / 2000, rtol=1e-13) @ (x.T @ v / 2000))).sum())
    x, v = x.to(dtype), v.to(dtype)
    p, cross, resolution = (x.T @ x / 2000).double(), (x.T @ v / 2000).double(), torch.finfo(dtype).eps
    by_eigenvalues = float(whitening(p, 0.0, resolution).whiten(cross).square().sum())
    if dtype == torch.float32:
        monkeypatch.setattr("dagrow.solvers._linalg.whitening", lambda *_: pytest.fail("all eigenvalues were computed"))
    energy, is_bound = projected_energy(p, cross, resolution)
    if dtype == torch.float64:
        assert energy == pytest.approx(truth, rel=1e-8)
    else:
        assert is_bound
        assert 0.9 * by_eigenvalues < energy < truth


@pytest.mark.parametrize("columns", [1, 63, 64, 200])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
def test_systems_of_few_and_of_many_columns(dtype: torch.dtype, tolerance: float, columns: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 50, generator=generator).double()
    p, wanted = x.T @ x / 300, torch.randn(50, columns, generator=generator).double()
    found = whitening(p.to(dtype))
    near(found.solve(wanted.to(dtype)).double(), torch.linalg.inv(p) @ wanted, tolerance)
    whitened = found.whiten(wanted.to(dtype)).double()
    near(whitened.T @ whitened, wanted.T @ torch.linalg.inv(p) @ wanted, tolerance)
