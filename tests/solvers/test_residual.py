"""What is left of features and goals once what is read is taken out of them."""

import numpy as np
import pytest
import reference as truth
import torch
from regressions import B, P, V, data, near, of

from dagrow.solvers import (
    Regression,
    directions,
    fan_out,
)


def test_the_residual_falls_by_the_squared_singular_values() -> None:
    d = data(seed=7)
    for solver in ("none", "all"):
        block = Regression(P, B, V, solver, constant=True)
        found = directions(of(d), [block], 2)
        fit = fan_out(of(d), block, found.alpha)
        near(fit.drop, float(found.values.square().sum()))


def test_the_gain_of_neurons_knows_that_the_features_overlap_with_what_is_read() -> None:
    """gain = E <v, X h>, not E <v_perp, X h>: the cross term ``tr(dW C^T X^T)`` is far from zero here."""
    d = data(seed=10)
    fit = fan_out(of(d), Regression(P, B, V), torch.eye(5, dtype=torch.float64))
    x = fit.weights.numpy()
    near(fit.gain, truth.product(d.v, d.p @ x.T))
    assert abs(truth.product(d.b @ truth.best_move(d.b, d.v).T, d.p @ x.T)) > 0.01 * fit.gain


@pytest.mark.parametrize("seed", range(5))
def test_features_that_are_read_already_bring_nothing(seed: int) -> None:
    """What is left of them is rounding; it must not be mistaken for a direction."""
    d = data(seed=seed)
    read = d._replace(p=d.b @ np.random.default_rng(seed).normal(size=(5, 5)))
    fit = fan_out(of(read), Regression(P, B, V, "all"), torch.eye(5, dtype=torch.float64))
    assert not fit.weights.any()
    assert fit.drop == fit.gain == 0
    assert not len(directions(of(read), [Regression(P, B, V, "all")], 2).values)
