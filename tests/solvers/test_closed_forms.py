"""The closed forms on moments against the slow truths on samples."""

import numpy as np
import pytest
import reference as truth
import torch
from regressions import VARIANTS, B, Data, P, V, W, case, data, moments, near, of

from dagrow.solvers import (
    Regression,
    best_move,
    directions,
    explained,
    fan_out,
    validate_directions,
)


@case
def test_best_move(d: Data) -> None:
    move, dw = best_move(of(d), B, V), truth.best_move(d.b, d.v)
    near(d.b @ move.weights.numpy().T, d.b @ dw.T, 1e-7)
    near(move.gain, -truth.move_slope(d.b, d.v, dw))
    energy = truth.energy(d.v)
    assert abs(energy - move.drop - truth.bottleneck(d.b, d.v)) <= 1e-8 * energy
    assert abs(explained(of(d), B, V)[0] - move.drop) <= 1e-8 * energy


def test_a_ridge_is_relative_to_each_feature() -> None:
    d, ridge = data(seed=6), 0.3
    size = np.sqrt((truth.flat(d.b) ** 2).mean(0))
    expected = truth.regress(d.b / size, d.v, ridge) / size
    near(best_move(of(d), B, V, ridge).weights, expected)
    drop = truth.energy(d.v) - truth.energy(d.v - d.b @ expected.T)
    near(best_move(of(d), B, V, ridge).drop, drop)
    near(explained(of(d), B, V, ridge)[0], drop)


@case
@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("solver", ["none", "all"])
def test_directions_are_those_of_the_singular_value_decomposition(d: Data, k: int, solver: str) -> None:
    block = Regression(P, B, V, solver, constant=True)
    found = directions(of(d), [block], k)
    neurons = (truth.neurons_sequential if solver == "none" else truth.neurons_joint)(d.b, d.p, d.v, k)
    energy = truth.energy(d.v) ** 0.5
    values = np.zeros(len(neurons.values))
    values[: len(found.values)] = found.values.numpy()
    assert np.abs(values - neurons.values).max() <= 1e-7 * energy
    real = neurons.values > 1e-6 * energy
    new = d.p if solver == "none" else truth.residual(d.b, d.p)
    wrote = new @ found.alpha.numpy()[:, real[: len(found.values)]] * np.sqrt(neurons.values[real])
    wanted = new @ neurons.fan_in[:, real]
    signs = np.sign((wrote * wanted).sum((0, 1)))
    if real.any():
        near(wrote * signs, wanted, 1e-6)


@case
@pytest.mark.parametrize("compensation", VARIANTS)
def test_fan_out_is_the_regression_of_what_is_left(d: Data, compensation: str) -> None:
    h = np.maximum(d.p @ np.random.default_rng(8).normal(size=(d.p.shape[-1], 2)), 0)
    m, block = moments({B: d.b, P: h, V: d.v}), Regression(P, B, V, compensation, constant=True)
    fit, expected = (
        fan_out(m, block, torch.eye(2, dtype=torch.float64)),
        truth.explained(d.b, h, d.v, VARIANTS[compensation]),
    )
    wrote = h @ fit.weights.numpy().T
    if fit.compensation is not None:
        wrote = wrote + d.b @ fit.compensation.numpy().T
    energy = truth.energy(d.v)
    assert truth.energy(wrote - h @ expected.weight.T - d.b @ expected.compensation.T) <= 1e-12 * energy
    assert abs(fit.gain - expected.gain) <= 1e-8 * energy
    fall = truth.bottleneck(d.b, d.v) - truth.energy(expected.residual)
    assert abs(fit.drop - fall) <= 1e-8 * energy


def test_fan_out_with_ridge() -> None:
    d, ridge = data(seed=9), 0.2
    h = d.p[..., :2] / np.sqrt((truth.flat(d.p[..., :2]) ** 2).mean(0))
    m = moments({B: d.b, P: h, V: d.v})
    fit = fan_out(m, Regression(P, B, V), torch.eye(2, dtype=torch.float64), ridge)
    expected = truth.explained(d.b, h, d.v, "raw", ridge)
    near(fit.weights, expected.weight)
    near(fit.gain, expected.gain)
    near(fit.drop, truth.bottleneck(d.b, d.v) - truth.energy(expected.residual))


def test_the_constant_is_one_of_the_features() -> None:
    """A goal that is constant is followed by the bias alone; new features with a mean explain none of it."""
    d = data(seed=11)
    constant = Data(d.b, d.p + 1.0, np.ones_like(d.v) * [1.0, -2.0, 3.0])
    move = best_move(of(constant), B, V)
    near(move.weights[:, -1], [1.0, -2.0, 3.0])
    near(move.drop, truth.energy(constant.v), 1e-12)
    assert (
        fan_out(of(constant), Regression(P, B, V, "constant", constant=True), torch.eye(5, dtype=torch.float64)).drop
        < 1e-12
    )


def test_consumers_side_by_side() -> None:
    d, other = data(seed=12), data(seed=13)
    m = moments({B: d.b, P: d.p, V: d.v, W: other.v})
    found = directions(m, [Regression(P, B, V), Regression(P, B, W)], 3)
    near(found.values, truth.neurons_sequential(d.b, d.p, np.concatenate([d.v, other.v], -1), 3).values)


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_nothing_depends_on_units(factor: float) -> None:
    """Goals, and single features, in another unit: the same move, neurons and choices."""
    d = data(n=120, twins=2, seed=14)
    unit = np.where(np.arange(d.p.shape[-1]) == 1, factor, 1.0)
    b = d.b.copy()
    b[..., 1] *= factor
    scaled = Data(b, d.p * unit, d.v * factor)
    block = Regression(P, B, V)
    near(best_move(of(scaled), B, V).gain, best_move(of(d), B, V).gain * factor**2, 1e-7)
    here, there = directions(of(d), [block], 2), directions(of(scaled), [block], 2)
    near(there.values, here.values.numpy() * factor, 1e-7)
    near(fan_out(of(scaled), block, there.alpha).drop, fan_out(of(d), block, here.alpha).drop * factor**2, 1e-7)
    chosen = [validate_directions(of(x, 4).split(), [block], None, (1e-3, 0.1)) for x in (d, scaled)]
    assert min(held.gain for held in chosen) > 0
    assert (chosen[0].k, chosen[0].ridge) == (chosen[1].k, chosen[1].ridge)
    near(chosen[1].gain, chosen[0].gain * factor**2, 1e-6)
