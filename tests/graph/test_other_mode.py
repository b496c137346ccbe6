"""Parts that are used in the other mode only, and the axes that they freeze."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from two_layers import X, made

import dagrow


def scaling(m: Any, x: Tensor) -> Any:
    h = m.a(x)
    return m.b(h * m.scale if m.training else h)


def assisted(m: Any, x: Tensor) -> Any:
    h = m.a(x)
    return (m.b(h), m.aux(h)) if m.training else m.b(h)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (made(scaling, scale=nn.Parameter(torch.rand(8))), "in training, scale has its channels too"),
        (made(assisted, aux=nn.Linear(8, 3)), "in training, aux has its channels too"),
    ],
)
def test_what_is_used_in_the_other_mode_only_freezes_the_axis_that_it_shares(model: nn.Module, why: str) -> None:
    axis = dagrow.trace(model, X).axis("a")
    assert not axis.growable
    assert why in str(axis.reason)
    assert dagrow.trace(model.train(), X).axis("a").growable


def test_what_is_used_in_neither_mode_freezes_nothing() -> None:
    model = made(lambda m, x: m.b(m.a(x)), idle=nn.Linear(8, 8))
    assert dagrow.trace(model, X).axis("a").growable


def test_a_part_of_its_own_in_the_other_mode_freezes_nothing() -> None:
    model = made(
        lambda m, x: m.b(m.a(x)) + (m.c(m.aux(x)) if m.training else 0), aux=nn.Linear(6, 4), c=nn.Linear(4, 3)
    )
    assert dagrow.trace(model, X).axis("a").growable
