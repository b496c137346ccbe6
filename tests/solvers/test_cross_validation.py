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


def held_out_move(d: Data, folds: int, used: int, ridge: float) -> float:
    """What moves fitted on the other folds explain of the first few folds."""
    drops = []
    for train, test in folds_of(d, folds)[:used]:
        size = np.sqrt((truth.flat(train.b) ** 2).mean(0))
        x = truth.regress(train.b / size, train.v, ridge) / size
        drops.append(truth.energy(test.v) - truth.energy(test.v - test.b @ x.T))
    return float(np.mean(drops))


@pytest.mark.parametrize(("n", "i", "used"), [(300, 260, 1), (120, 260, 3), (80, 260, 4), (300, 40, 4)])
def test_the_ridge_for_many_features_is_chosen_on_enough_samples(n: int, i: int, used: int) -> None:
    """On as many folds as have 64 held-out samples; for few features on all."""
    d = data(n=n, i=i, p=2, seed=20)
    found = validate_move(of(d, 4).split(), B, V, (0.3, 3.0, 30.0))
    near(found.gain, held_out_move(d, 4, 4, found.ridge))
    assert found.ridge == max((0.3, 3.0, 30.0), key=lambda ridge: held_out_move(d, 4, used, ridge))


def test_directions_of_many_features_have_the_ridge_of_one_fold_and_the_drop_of_all() -> None:
    d, ridges = data(n=300, i=2, p=260, seed=21), (0.3, 3.0, 30.0)
    split, regressions = of(d, 4).split(), [Regression(P, B, V)]
    found = validate_directions(split, regressions, 2, ridges)
    alone = {ridge: validate_directions(split[:1], regressions, 2, (ridge,)).gain for ridge in ridges}
    assert found.ridge == max(alone, key=alone.__getitem__)
    of_all = validate_directions(split, regressions, 2, (found.ridge,))
    near(found.gain, of_all.gain)
    for (alpha, (omega,)), (other, (others,)) in zip(found.fits, of_all.fits, strict=True):
        near(omega @ alpha.T, others @ other.T, 1e-6)


def test_samples_of_a_group_are_one_where_enough_is_asked_for() -> None:
    d, ridges = data(n=300, i=260, p=2, seed=22), (0.3, 3.0, 30.0)
    m = of(d, 4)
    m.groups = torch.ones(4).long()
    assert [test.units for _, test in m.split()] == [1] * 4
    assert [train.units for train, _ in m.split()] == [3] * 4
    assert m.joined(m).groups is m.only([(B, V)]).groups is m.groups
    found = validate_move(m.split(), B, V, ridges)
    assert found.ridge == max(ridges, key=lambda ridge: held_out_move(d, 4, 4, ridge))
    assert (m + m).groups.tolist() == [2] * 4
