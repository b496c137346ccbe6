"""Parts that no example runs, and the axes that they freeze: those whose width they may read or write."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from two_layers import X, made

import dagrow


def plain(m: Any, x: Tensor) -> Any:
    return m.b(m.a(x))


def choosing(m: Any, x: Tensor) -> Any:
    h = m.a(x)
    if len(m.chosen) > 1:
        parts = m.head, m.heads, m.encoder, m.norm, m.down, m.up, m.scale, m.centers, m.table, m.rnn, m.mask
        return parts[m.chosen[0]](h)
    return m.b(h)


def branching(**parts: Any) -> nn.Module:
    return made(choosing, chosen=[0], **parts)


def _with_buffer(size: int) -> nn.Module:
    model = branching()
    model.register_buffer("mask", torch.ones(size))
    return model


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (branching(head=nn.Linear(8, 5)), "head"),
        (branching(heads=nn.ModuleDict({"u": nn.Linear(8, 5)})), "heads.u"),
        (branching(encoder=nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 8))), "encoder.2"),
        (branching(norm=nn.BatchNorm1d(8)), "norm"),
        (branching(down=nn.Linear(8, 1), up=nn.Linear(1, 5)), "down"),
        (branching(scale=nn.Parameter(torch.ones(8))), "scale"),
        (branching(centers=nn.Parameter(torch.ones(5, 8))), "centers"),
        (branching(table=nn.Embedding(5, 8)), "table"),
        (branching(rnn=nn.GRU(8, 5)), "rnn"),
        (_with_buffer(8), "mask"),
    ],
)
def test_what_no_example_runs_freezes_the_axis_that_it_may_use(model: nn.Module, name: str) -> None:
    dag = dagrow.trace(model, X)
    axis = dag.axis("a")
    assert not axis.growable
    assert f"{name}" in str(axis.reason).partition(", which no example runs")[0]
    assert "also=[example]" in str(axis.reason)


@pytest.mark.parametrize(
    "model",
    [
        branching(head=nn.Linear(9, 5)),
        branching(heads=nn.ModuleDict({"u": nn.Linear(7, 5)})),
        branching(scale=nn.Parameter(torch.ones(7, 9))),
        branching(table=nn.Embedding(8, 5)),
        _with_buffer(7),
    ],
)
def test_what_cannot_have_the_width_freezes_nothing(model: nn.Module) -> None:
    assert dagrow.trace(model, X).axis("a").growable


def test_what_no_code_of_the_model_mentions_freezes_nothing_and_is_listed() -> None:
    dag = dagrow.trace(made(plain, head=nn.Linear(8, 5)), X)
    assert dag.axis("a").growable
    assert "No example runs head:" in str(dag)


def test_what_nothing_runs_can_be_deleted() -> None:
    model: Any = branching(head=nn.Sequential(nn.Linear(8, 5), nn.ReLU()))
    assert "No example runs head:" in str(dagrow.trace(model, X))
    model.head = None
    dag = dagrow.trace(model, X)
    assert dag.axis("a").growable
    assert "No example runs" not in str(dag)


class Pictures(nn.Module):
    """A convolution whose image may be flattened by a part that does not run."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 2, 3), nn.Linear(features, 2)

    def forward(self, x: Tensor, flat: bool = False) -> Any:
        h = self.a(x).relu()
        return self.head(h.flatten(1)) if flat else self.b(h).mean((2, 3))


@pytest.mark.parametrize(("features", "growable"), [(6 * 16, False), (6 * 4, False), (7 * 5, True)])
def test_a_part_may_read_all_positions_at_once(features: int, growable: bool) -> None:
    assert dagrow.trace(Pictures(features), torch.randn(2, 3, 9, 9)).axis("a").growable is growable


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Any:
        return self.down(self.up(x).relu())


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.token = nn.Linear(6, 6), nn.Parameter(torch.zeros(1, 8))

    def forward(self, x: Tensor, masked: bool = False) -> Any:
        return self.a(x) + self.token.mean() if masked else self.a(x)


def test_a_part_beside_the_module_that_an_axis_lies_in_does_not_come_near_it() -> None:
    model = nn.Sequential()
    model.add_module("table", Table())
    model.add_module("inner", Inner())
    assert dagrow.trace(model.double(), X).axis("inner.up").growable
