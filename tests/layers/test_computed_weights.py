"""Layers whose weight is computed have a row that says why they do not grow."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import dagrow
from dagrow.layers._computed_weights import weight_sources
from dagrow.testing import try_axes
from dagrow.tracing import record


class Layer(nn.Module):
    """A layer that computes its output in its own way."""

    def __init__(self, use: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.other = nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.randn(6, 5))
        self.bias, self.scale = nn.Parameter(torch.randn(6)), nn.Parameter(torch.ones(6))
        self.stack = nn.Parameter(torch.randn(3, 5, 6))
        self.register_buffer("mask", torch.ones(6, 5))
        self.fake, self.use = torch.ao.quantization.FakeQuantize(), use
        for name in {"weight", "other", "bias", "scale", "stack"} - set(use.__code__.co_names):  # that nothing reads
            delattr(self, name)

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, x)


def model(use: Callable[[Any, Tensor], Tensor]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), Layer(use), nn.Tanh(), nn.Linear(6, 2)).double()


X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).double()
COMPUTED = "its weight is computed from 2.weight"
CASES: list[tuple[Callable[[Any, Tensor], Tensor], str]] = [
    (lambda m, x: functional.linear(x, m.weight * m.mask, m.bias), f"{COMPUTED}, 2.mask, not a parameter"),
    (lambda m, x: functional.linear(input=x, weight=m.weight * m.scale[:, None]), f"{COMPUTED}, 2.scale"),
    (lambda m, x: functional.linear(x, m.weight.masked_fill(m.mask < 1, 0), m.bias), f"{COMPUTED}, 2.mask"),
    (lambda m, x: functional.linear(x, m.fake(m.weight)), COMPUTED),
    (lambda m, x: functional.linear(x, m.weight + (m.weight.round() - m.weight).detach()), COMPUTED),
    (lambda m, x: functional.linear(x, m.weight * torch.ones(6, 5)), COMPUTED),
    (lambda m, x: functional.linear(x, m.weight[: len(m.bias), : x.shape[1]], m.bias), COMPUTED),
    (lambda m, x: functional.linear(x, torch.cat([m.weight[:2], m.other[2:]]), m.bias), f"{COMPUTED}, 2.other"),
    (
        lambda m, x: functional.conv1d(x[..., None], (m.weight - m.weight.mean(1, keepdim=True))[..., None])[..., 0],
        COMPUTED,
    ),
    (
        lambda m, x: functional.linear(x, m.weight, torch.cat([m.bias[:2], m.scale[2:]])),
        "its bias is computed from 2.bias",
    ),
    (lambda m, x: functional.linear(x, m.weight, x.mean(0)[:1]), "its bias is computed from the input"),
    (lambda m, x: x @ (m.weight * m.mask).t(), f"{COMPUTED}, 2.mask"),
    (lambda m, x: torch.addmm(m.bias, x, (m.weight * m.mask).t()), f"{COMPUTED}, 2.mask"),
    (lambda m, x: torch.einsum("bi,oi->bo", x, m.weight * m.scale[:, None]), f"{COMPUTED}, 2.scale"),
    (
        lambda m, x: torch.bmm(x.expand(3, -1, -1), m.stack).mean(0),
        "its weight 2.stack holds 3 matrices of one product",
    ),
    (lambda m, x: (x.expand(3, -1, -1) @ m.stack).mean(0), "its weight 2.stack holds 3 matrices of one product"),
    (
        lambda m, x: torch.einsum("ebi,eio->ebo", x.expand(3, -1, -1), m.stack).mean(0),
        "its weight 2.stack holds 3 matrices",
    ),
    (lambda m, x: torch.baddbmm(m.bias, x.expand(3, -1, -1), m.stack).mean(0), "its weight 2.stack holds 3 matrices"),
]


@pytest.mark.parametrize(("use", "why"), CASES)
def test_a_row_and_its_reason(use: Any, why: str) -> None:
    dag = dagrow.trace(model(use), X)
    (edge,) = (edge for edge in dag.edges if edge.name.startswith("2"))
    assert dag.edge(edge.name) is edge
    assert (edge.growable, edge.rule.widths(edge.module)) == (False, (5, 6))
    assert why in str(edge.reason)
    assert why in " ".join(dag.describe(width=1000).split())
    assert not any(axis.growable for axis in dag.axes)
    assert any(why in reason for reason in dag.coverage().reasons)
    assert sum(parameter.numel() for parameter in edge.parameters().values()) >= 30


class Padded(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return functional.conv1d(x, self.weight, self.bias, padding=x.shape[2] // 2)


def test_a_convolution_whose_padding_follows_from_its_input() -> None:
    dag = dagrow.trace(nn.Sequential(Padded(2, 4, 3), nn.ReLU(), Padded(4, 2, 3)), torch.randn(3, 2, 4))
    assert dag.axis("0").reason == "operation conv1d has no rule where its settings are computed"
    assert [edge.name for edge in dag.edges] == ["0", "2"]


@pytest.mark.parametrize("use", [CASES[0][0], CASES[12][0]])
def test_verbs_leave_it_out(use: Any) -> None:
    dag = dagrow.trace(model(use), X)
    batches = [(X, torch.randn(6, 2).double())]
    name = next(edge.name for edge in dag.edges if edge.name.startswith("2"))
    moves = dagrow.propose(dag, batches, functional.mse_loss, [dagrow.MoveWeights()])
    assert {move.where for move in moves} == {"0", "4"}
    report = dagrow.bottlenecks(dag, batches, functional.mse_loss)
    assert set(report) == {"0", "4"}
    assert f"Left out: {dag.edge(name).shared}" in str(report)
    with pytest.raises(dagrow.GrowthError, match="no axis can grow"):
        dagrow.propose(dag, batches, functional.mse_loss, [dagrow.AddNeurons(k=1)])
    with pytest.raises(dagrow.GrowthError, match=r"computed|matrices"):
        dagrow.propose(dag, batches, functional.mse_loss, [dagrow.MoveWeights(edges=(name,))])
    dagrow.propose(dag, batches, functional.mse_loss, [dagrow.AddConnection(rank=1)])


GROWN: list[Callable[[Any, Tensor], Tensor]] = [
    lambda m, x: torch.einsum("bi,oi->bo", x, m.weight) + m.bias,
    lambda m, x: torch.einsum("...i,io->...o", x, m.weight.t()),
    lambda m, x: functional.linear(x, m.weight.to(x.dtype), m.bias.type_as(x)),
    lambda m, x: functional.linear(x, m.weight.contiguous(), m.bias),
]


@pytest.mark.parametrize("use", GROWN)
def test_what_is_the_parameter_itself_grows(use: Any) -> None:
    dag = dagrow.trace(model(use), X)
    assert [axis.name for axis in dag.axes if axis.growable] == ["0", "2"]
    assert try_axes(dag, [X, X[:2]]) == {"0": None, "2": None}
    batches = [(X, torch.randn(6, 2).double())]
    for growth in dagrow.propose(dag, batches, functional.mse_loss, [dagrow.AddNeurons(k=1), dagrow.MoveWeights()]):
        assert (growth.loss(-1e-5) - growth.loss(1e-5)) / 2e-5 == pytest.approx(growth.gain, rel=1e-4, abs=1e-8)


@pytest.mark.parametrize(
    "use",
    [
        lambda m, x: torch.einsum("bi,bi->b", x, m.weight)[:, None].expand(-1, 6),  # no matrix
        lambda m, x: torch.einsum("bi,oi->ob", x, m.weight).t(),
    ],
)
def test_other_equations_are_no_layers(use: Any) -> None:
    dag = dagrow.trace(model(use), X)
    assert not dag.axis("0").growable


def test_weights_that_follow_from_the_input_are_no_layers() -> None:
    graph = record(model(CASES[0][0]), X).graph
    for node in graph.nodes:
        node.meta["module"] = None
    sources = weight_sources(graph, dict(model(CASES[0][0]).named_parameters()))
    assert ("2.weight",) in sources.values()
    assert not any(node in sources for node in graph.nodes if node.op == "placeholder")


def test_quantised_layers_are_named() -> None:
    plain = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    model = torch.ao.quantization.quantize_dynamic(plain, {nn.Linear})
    assert "No rule yet for 0 (quantised Linear), 2 (quantised Linear)" in str(dagrow.trace(model, X.float()))
