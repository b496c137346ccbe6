"""Features are chosen one after the other as if every one of them was tried."""

import pytest
import torch
from regressions import CASES, B, Data, P, V, data, near, of

from dagrow.solvers import Regression, fan_out, forward_selection, marginal_drops

COMPENSATIONS = ["none", "constant", "all"]


def drop(d: Data, block: Regression, features: list[int]) -> float:
    return float(fan_out(of(d), block, torch.tensor(features)).drop)


@pytest.mark.parametrize("compensation", COMPENSATIONS)
@pytest.mark.parametrize("name", ["plain", "positions", "one output"])
def test_the_feature_that_explains_most_beside_those_taken_comes_next(name: str, compensation: str) -> None:
    d, block, taken = CASES[name], Regression(P, B, V, compensation, constant=True), []
    for _ in range(3):
        others = [j for j in range(d.p.shape[-1]) if j not in taken]
        taken.append(max(others, key=lambda j: drop(d, block, [*taken, j])))
    assert forward_selection(of(d), block, 3).tolist() == taken


def test_only_what_is_offered_is_taken_and_copies_of_others_come_last() -> None:
    d, block = data(twins=2, seed=3), Regression(P, B, V)
    assert set(forward_selection(of(d), block, 2, offered=torch.tensor([1, 4])).tolist()) == {1, 4}
    assert {j % 5 for j in forward_selection(of(d), block, 5).tolist()} == set(range(5))


def test_where_there_is_nothing_to_explain_nothing_is_taken() -> None:
    d = data(seed=3)
    assert not len(forward_selection(of(d._replace(v=0 * d.v)), Regression(P, B, V), 2))


@pytest.mark.parametrize("compensation", COMPENSATIONS)
@pytest.mark.parametrize("slots", [1, 2, 3])
def test_what_units_explain_alone(slots: int, compensation: str) -> None:
    d, block = data(p=6, seed=20), Regression(P, B, V, compensation, constant=True)
    units = torch.arange(6).view(-1, slots).tolist()
    near(marginal_drops(of(d), block, slots), [drop(d, block, unit) for unit in units])
