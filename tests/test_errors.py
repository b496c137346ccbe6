"""Wrong input: a DagrowError that says what was given, why not and what to do, with the model as it was."""

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from small_net import BATCHES, MSE, X, Y, net, setting
from torch import Tensor, nn

import dagrow
from dagrow import (
    AddNeurons,
    BatchError,
    DagrowError,
    GrowthError,
    LossError,
    MoveWeights,
    OptimizerError,
    TraceError,
)

OPERATORS = [AddNeurons(k=1, ridge=0.1, folds=1)]


def unchanged(model: nn.Module, before: dict[str, Tensor], hooks: list[int]) -> None:
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert all(p.grad is None for p in model.parameters())
    assert all(m.training for m in model.modules())
    assert torch.is_grad_enabled()


def refused(error: type[Exception], message: str, call: Callable[[Any], Any]) -> None:
    model, dag = setting()
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    with pytest.raises(error, match=message) as caught:
        call(dag)
    said = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", ())])
    assert said.rstrip().endswith((".", ")")) or "\n" in said, "a full sentence"
    unchanged(model, before, hooks)
    assert torch.equal(random, torch.get_rng_state())
    receipt = dagrow.grow(dag, BATCHES, MSE, OPERATORS)
    assert receipt.neurons == 1
    assert receipt.loss_after < receipt.loss_before


@pytest.mark.parametrize(
    ("validation", "error", "message"),
    [
        ([], BatchError, "validation is empty"),
        (iter(BATCHES), BatchError, "validation is a list_iterator"),
        ([(X[:, :2], Y)], RuntimeError, r"(.|\n)*batch 0 of validation.*\(8, 2\)"),
        ([(X, Y * math.nan)], LossError, "finite"),
    ],
)
def test_validation(validation: Any, error: type[Exception], message: str) -> None:
    refused(error, message, lambda dag: dagrow.grow(dag, BATCHES, MSE, OPERATORS, validation=validation))


@pytest.mark.parametrize(
    ("operators", "message"),
    [
        ([], "give a list such as"),
        (None, "give a list such as"),
        ([AddNeurons], "give a list such as"),
        (["AddNeurons"], "give a list such as"),
        ([AddNeurons(k=1, axes=("9",))], "there is no axis '9'"),
        ([AddNeurons(k=1, axes=("2",))], "is an output of the model"),
        ([MoveWeights(edges=("1",))], "there is no edge '1'"),
    ],
)
def test_operators(operators: Any, message: str) -> None:
    refused(GrowthError, message, lambda dag: dagrow.grow(dag, BATCHES, MSE, operators))
    refused(GrowthError, message, lambda dag: dagrow.propose(dag, BATCHES, MSE, operators))


def test_other_arguments() -> None:
    refused(LossError, "neither 'eval' nor 'train'", lambda dag: dagrow.grow(dag, BATCHES, MSE, OPERATORS, mode="test"))
    refused(OptimizerError, "float", lambda dag: dagrow.grow(dag, BATCHES, MSE, OPERATORS, optimizer=0.1))  # type: ignore[arg-type]
    other = torch.optim.SGD(net().parameters(), 0.1)
    refused(
        OptimizerError, "none of the parameters", lambda dag: dagrow.grow(dag, BATCHES, MSE, OPERATORS, optimizer=other)
    )
    for verb in (dagrow.grow, dagrow.propose, dagrow.bottlenecks):
        with pytest.raises(GrowthError, match=r"dagrow.trace\(model"):
            verb(net(), BATCHES, MSE)  # type: ignore[operator]


@pytest.mark.parametrize("given", [None, 3, "model", nn.Linear, np.zeros(3), lambda x: x])
def test_trace_of_what_is_no_module(given: Any) -> None:
    with pytest.raises(TraceError, match=r"takes a torch.nn.Module"):
        dagrow.trace(given, X)


@pytest.mark.parametrize("inputs", [X[:, :2], X.double(), "x", 3, {"y": X}, (X, X), ()])
def test_trace_with_inputs_that_do_not_fit(inputs: Any) -> None:
    model = net()
    with pytest.raises(TraceError, match=r"inputs|raised"):
        dagrow.trace(model, inputs)
    unchanged(model, net().state_dict(), [0] * 4)


def test_nothing_to_grow() -> None:
    model = nn.Linear(4, 2)
    dag = dagrow.trace(model, X)
    with pytest.raises(GrowthError, match="no axis can grow"):
        dagrow.grow(dag, BATCHES, MSE)
    flat = nn.Sequential(nn.Flatten(), nn.Tanh())
    with pytest.raises(GrowthError, match="no axis can grow"):
        dagrow.grow(dagrow.trace(flat, X), BATCHES, MSE)
    receipt = dagrow.grow(dag, BATCHES, MSE, [MoveWeights(folds=1)])  # but its weights can move
    assert receipt.loss_after < receipt.loss_before


@pytest.mark.parametrize("gamma", [math.nan, math.inf, "1", None, True, 10**400])
def test_amplitudes(gamma: Any) -> None:
    model, dag = setting()
    growth = dagrow.propose(dag, BATCHES, MSE, OPERATORS)[0]
    before = copy.deepcopy(model.state_dict())
    for call in (growth.apply, growth.loss):
        with pytest.raises(GrowthError, match="finite number"):
            call(gamma)
    unchanged(model, before, [0] * 4)


def test_a_loss_on_other_batches() -> None:
    _, dag = setting()
    growth = dagrow.propose(dag, BATCHES, MSE, OPERATORS)[0]
    other = [(X[:3], Y[:3])]
    with pytest.raises(GrowthError, match=r"a list was given.*with_batches\(batches\)"):
        growth.loss(0.0, other)  # type: ignore[arg-type]
    expected = float(MSE(dag.model(X[:3]), Y[:3]).detach())
    assert growth.loss(0.0, growth.objective.with_batches(other)) == pytest.approx(expected)


def test_a_stale_growth() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    dag = dagrow.trace(model, X)
    first, second = dagrow.propose(dag, BATCHES, MSE, OPERATORS)
    receipt = first.apply()
    for growth in (first, second):
        with pytest.raises(GrowthError, match=r"stale.*propose again"):
            growth.apply()
        with pytest.raises(GrowthError, match="stale"):
            growth.loss(0.5)
    receipt.undo()
    second.apply().undo()
    with pytest.raises(GrowthError, match="already"):
        receipt.undo()


def test_a_model_that_was_changed_by_hand() -> None:
    model, dag = setting()
    growth = dagrow.propose(dag, BATCHES, MSE, OPERATORS)[0]
    model[2] = nn.Linear(3, 2)  # type: ignore[operator]
    for call in (lambda: dagrow.grow(dag, BATCHES, MSE), lambda: dagrow.bottlenecks(dag, BATCHES, MSE), growth.apply):
        with pytest.raises(GrowthError, match="trace it again"):
            call()


def test_unknown_names_list_the_known_ones() -> None:
    _, dag = setting()
    with pytest.raises(GrowthError, match="it has 0, 2"):
        dag.axis("hidden")
    with pytest.raises(GrowthError, match="it has 0, 2"):
        dag.edge("hidden")
    with pytest.raises(GrowthError, match="cannot grow by 1"):
        dag.widening(dag.axis("2"), 1)


def test_all_errors_are_of_one_family() -> None:
    family = [getattr(dagrow, name) for name in dagrow.__all__ if name.endswith("Error")]
    assert len(family) >= 7
    assert all(issubclass(kind, DagrowError) for kind in family)
