"""Held-out drops, ridges and ranks from moments against fits on samples of the other folds."""

import numpy as np
import pytest
import reference as truth
import torch
from regressions import B, Data, P, V, data, near, of

from dagrow.solvers import Regression, validate_directions, validate_fan_out, validate_move


def folds_of(d: Data, folds: int) -> list[tuple[Data, Data]]:
    at = np.arange(len(d.b)) % folds
    return [(Data(*(x[at != f] for x in d)), Data(*(x[at == f] for x in d))) for f in range(folds)]


def left_over(train: Data, test: Data) -> tuple[np.ndarray, np.ndarray]:
    """v_perp of both, with the move that was fitted on the training folds."""
    dw = truth.best_move(train.b, train.v)
    return train.v - train.b @ dw.T, test.v - test.b @ dw.T


@pytest.mark.parametrize("ridge", [0.0, 0.1])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_held_out_directions(k: int, ridge: float) -> None:
    d, drops = data(n=43, seed=16), []
    for train, test in folds_of(d, 4):
        seen, unseen = left_over(train, test)
        size = np.sqrt((truth.flat(train.p) ** 2).mean(0))
        x = truth.ridge_rank(train.p / size, seen, ridge, k) / size
        drops.append(truth.energy(unseen) - truth.energy(unseen - test.p @ x.T))
    found = validate_directions(of(d, 4).split(), [Regression(P, B, V)], k, (ridge,))
    near(found.gain, np.mean(drops))
    assert found.k == k
    for (train, _), (alpha, (omega,)) in zip(folds_of(d, 4), found.fits, strict=True):
        size = np.sqrt((truth.flat(train.p) ** 2).mean(0))
        x = truth.ridge_rank(train.p / size, left_over(train, train)[0], ridge, k) / size
        near(omega.numpy() @ alpha.numpy().T, x, 1e-6)


@pytest.mark.parametrize("ridge", [0.0, 0.1])
def test_held_out_fan_out(ridge: float) -> None:
    d, drops = data(n=43, seed=17), []
    for train, test in folds_of(d, 4):
        seen, unseen = left_over(train, test)
        size = np.sqrt((truth.flat(train.p) ** 2).mean(0))
        x = truth.regress(train.p / size, seen, ridge) / size
        drops.append(truth.energy(unseen) - truth.energy(unseen - test.p @ x.T))
    found = validate_fan_out(of(d, 4).split(), Regression(P, B, V), torch.eye(5, dtype=torch.float64), (ridge,))
    near(found.gain, np.mean(drops))


def test_held_out_move() -> None:
    d, drops = data(n=43, seed=18), []
    for train, test in folds_of(d, 4):
        drops.append(truth.energy(test.v) - truth.energy(left_over(train, test)[1]))
    near(validate_move(of(d, 4).split(), B, V, (0.0,)).gain, np.mean(drops))


def test_the_ridge_that_explains_most_of_the_other_folds_is_chosen() -> None:
    d, ridges = data(n=16, i=8, p=6, seed=19), (1e-4, 1e-2, 1.0)
    alone = [validate_move(of(d, 4).split(), B, V, (ridge,)) for ridge in ridges]
    best = max(alone, key=lambda held: held.gain)
    found = validate_move(of(d, 4).split(), B, V, ridges)
    assert (found.ridge, found.gain) == (best.ridge, best.gain)
