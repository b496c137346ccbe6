"""What the other weights become once features go."""

import numpy as np
import pytest
import torch
from reference import energy, moment, product, regress, without

from dagrow.solvers import REFIT_RIDGES, Lost, Moments

GONE = [1, 4]


def case(n: int = 60, noise: float = 0.1) -> tuple[Lost, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    B = rng.normal(size=(n, 2, 6))
    B[..., 1] = B[..., 0] - B[..., 2] + noise * rng.normal(size=(n, 2))
    V, W = rng.normal(size=(n, 2, 3)), rng.normal(size=(3, 6))
    sums = {
        pair: torch.stack([torch.from_numpy(moment(x[f::4], y[f::4]) * len(x[f::4])) for f in range(4)])
        for pair, (x, y) in {("b", "b"): (B, B), ("b", "v"): (B, V)}.items()
    }
    counts = torch.tensor([len(B[f::4]) for f in range(4)])
    m = Moments(counts, sums, {"b": 2.0, "v": 2.0}, torch.finfo(torch.float64).eps)
    return Lost(m, "b", "v", torch.from_numpy(W), torch.tensor(GONE)), B, V, W


def test_without_a_ridge_it_is_least_squares() -> None:
    lost, B, V, W = case()
    refit = lost.refit(0.0)
    wanted, energy_left = without(B, W, GONE)
    np.testing.assert_allclose(refit.change, wanted - W, rtol=1e-8, atol=1e-10)
    assert refit.energy == pytest.approx(energy_left, rel=1e-9)
    assert refit.gain == pytest.approx(product(V, B @ (wanted - W).T), rel=1e-9)


def test_a_singular_rest_gives_the_smallest_weights() -> None:
    lost, B, _, W = case(noise=0.0)
    lost = Lost(lost.m, "b", "v", lost.weights, torch.tensor([4]))  # 0, 1 and 2, which stay, are dependent
    refit = lost.refit(0.0)
    assert refit.note
    assert refit.energy == pytest.approx(without(B, W, [4])[1], rel=1e-9)


def test_nothing_is_lost_where_the_rest_stands_in() -> None:
    lost, *_ = case(noise=0.0)
    lost = Lost(lost.m, "b", "v", lost.weights, torch.tensor([1]))
    assert lost.refit(0.0).energy < 1e-14
    assert lost.held_out(0.0) < 1e-14
    assert lost.held_out(1e-4) > 1e-9


@pytest.mark.parametrize("ridge", REFIT_RIDGES)
def test_held_out_is_what_fits_on_the_other_folds_lose(ridge: float) -> None:
    lost, B, _, W = case()
    stay, total = [0, 2, 3, 5], 0.0
    fold = np.arange(len(B)) % 4
    for f in range(4):
        train = B[fold != f]
        scale = np.sqrt(moment(train, train).diagonal()[stay])
        delta = regress(train[..., stay] / scale, train[..., GONE] @ W[:, GONE].T, ridge, scale=1.0) / scale
        change = np.zeros_like(W)
        change[:, GONE], change[:, stay] = -W[:, GONE], delta
        np.testing.assert_allclose(lost.folds(ridge)[f].weights, change, rtol=1e-6, atol=1e-8)
        total += energy(B[fold == f] @ change.T) / 4
    assert lost.held_out(ridge) == pytest.approx(total, rel=1e-6)


def test_what_is_not_refitted_only_fades() -> None:
    lost, _, _, W = case()
    plain = Lost(lost.m, "b", "v", lost.weights, torch.tensor(GONE), is_refitted=False)
    change = plain.refit(0.0).change
    assert torch.equal(change[:, GONE], -torch.from_numpy(W)[:, GONE])
    assert change.count_nonzero() == 6
    assert all(torch.equal(fit.weights, change) for fit in plain.folds(0.0))
