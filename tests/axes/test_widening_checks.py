"""Widths that a forward computes with: what cannot widen, and what stays the number that it was."""

from collections.abc import Callable

import pytest
import torch
from between import Between, dag_of, data, loss
from torch import Tensor

import dagrow


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("between", "width"),
    [
        (lambda m, h: h.tanh() / h.size(1), 4),
        (lambda m, h: torch.cat([h[:, :-2], h[:, -2:] * 0.5], 1), 16),
        (lambda m, h: h[:, torch.tensor([1, 0, 3, 2])], 4),
        (lambda m, h: h - h.std(1, keepdim=True), 4),
    ],
    ids=["divided by its width", "halves of its end", "permuted by an index", "a deviation"],
)
def test_what_knows_its_width_does_not_grow(between: Callable[[Between, Tensor], Tensor], width: int) -> None:
    axis = dag_of(Between(between, width), 3).axis("first")
    assert not axis.growable
    assert axis.reason


@pytest.mark.parametrize(
    "between",
    [
        lambda m, h: h.tanh() / float(h.size(1)) ** 0.5,
        lambda m, h: h.clamp(max=h.shape[1] * 0.01),
        lambda m, h: h.tanh() / m.first.out_features**0.5,
        lambda m, h: h.tanh() if h.shape[1] == 4 else h,
    ],
    ids=["divided by a root", "clamped", "divided by what the layer states", "compared"],
)
def test_a_number_computed_from_a_width_stays_what_it_was(between: Callable[..., Tensor]) -> None:
    dag = dag_of(Between(between), 3)
    (x, _), *_ = data(3)
    before = dag.model(x)
    dagrow.propose(dag, data(3), loss, [dagrow.AddNeurons(k=2)])[0].apply(0.0)
    assert dag.model.first.out_features == 6
    assert torch.allclose(dag.model(x), before, rtol=0, atol=1e-12)
