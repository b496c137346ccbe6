"""Which units are needed least, against refitting every set anew."""

import numpy as np
import pytest
import torch
from reference import energy, moment
from reference import least_needed as slowly
from torch import Tensor

from dagrow.solvers import Reader, least_needed


def reader(seed: int, outputs: int = 3, taps: int = 1, **kwargs: object) -> tuple[Reader, tuple, np.ndarray]:
    """A reader of 7 units beside 2 other features and a constant, and the same for the slow truth."""
    rng = np.random.default_rng(seed)
    size = 7 * taps
    B = rng.normal(size=(60, 1, size + 2)) @ rng.normal(size=(size + 2, size + 2))
    B = np.concatenate([np.tanh(B), np.ones((60, 1, 1))], 2)
    W = rng.normal(size=(outputs, size + 3))
    columns = torch.randperm(size, generator=torch.Generator().manual_seed(seed)).view(7, taps)
    whose = torch.full((outputs,), -1)
    made = Reader(torch.from_numpy(moment(B, B)), torch.from_numpy(W), columns, whose, **kwargs)  # type: ignore[arg-type]
    return made, (B, W, columns.tolist()), B


@pytest.mark.parametrize("taps", [1, 2])
def test_several_readers_lose_least_together(taps: int) -> None:
    (one, slow_one, _), (two, slow_two, _) = reader(0, 3, taps), reader(1, 2, taps)
    assert least_needed([one, two], 6).tolist() == slowly([slow_one, slow_two], 6)
    assert least_needed([one], 6).tolist() == slowly([slow_one], 6)


def test_frozen_readers_lose_all_that_goes() -> None:
    frozen, (B, W, columns), _ = reader(2, is_trainable=False)
    gone: list[int] = []
    for _ in range(6):

        def lost(unit: int) -> float:
            at = [i for u in (*gone, unit) for i in columns[u]]
            return energy(B[..., at] @ W[:, at].T)

        gone.append(min((unit for unit in range(7) if unit not in gone), key=lost))
    assert least_needed([frozen], 6).tolist() == gone


def test_what_a_unit_writes_itself_goes_with_it() -> None:
    """A unit that writes nothing but itself is not needed, however much it writes."""
    made, _, _ = reader(3, outputs=7)
    weights = made.weights.clone()
    weights[:, made.columns[4]] = 0
    weights[4, made.columns[4]] = 100.0
    own = Reader(made.gram, weights, made.columns, torch.arange(7))
    assert least_needed([own], 1).tolist() == [4]
    assert least_needed([Reader(made.gram, weights, made.columns, made.outputs)], 1).tolist() != [4]


def test_a_large_ridge_looks_at_what_units_write_by_themselves() -> None:
    made, (B, W, columns), _ = reader(4)
    alone = [energy(B[..., at] @ W[:, at].T) for at in columns]
    assert least_needed([made], 1, ridge=1e6).tolist() == [int(np.argmin(alone))]


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_units_of_features_make_no_difference(scale: float) -> None:
    made, _, _ = reader(5)
    sizes = torch.ones(len(made.gram), dtype=torch.float64)
    sizes[3] = scale
    other = Reader(made.gram * sizes * sizes[:, None], made.weights / sizes, made.columns, made.outputs)
    assert least_needed([other], 6, 0.1).tolist() == least_needed([made], 6, 0.1).tolist()


def test_twins_and_dead_units_go_first() -> None:
    made, _, B = reader(6)
    rows = torch.from_numpy(B[:, 0])
    c = made.columns.flatten()
    rows[:, c[2]] = 0
    rows[:, c[5]] = 3 * rows[:, c[1]]
    gram: Tensor = rows.T @ rows / len(rows)
    order = least_needed([Reader(gram, made.weights, made.columns, made.outputs)], 3).tolist()
    assert set(order[:2]) in ({2, 5}, {2, 1})
