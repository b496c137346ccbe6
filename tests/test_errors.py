"""Wrong input: a DagrowError that says what was given, why not and what to do, with the model as it was."""

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import dagrow
from dagrow import (
    AddConnection,
    AddLayer,
    AddNeurons,
    BatchError,
    DagrowError,
    GrowthError,
    LossError,
    MoveWeights,
    OptimizerError,
    TraceError,
)

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
Y = X[:, :2] * X[:, 2:]
BATCHES = [(X, Y)]
MSE = functional.mse_loss
OPERATORS = [AddNeurons(k=1, ridge=0.1, folds=1)]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))


def setting() -> tuple[nn.Module, Any]:
    model = net()
    return model, dagrow.trace(model, X)


class Once:
    """Can be read only once, but does not say so."""

    def __init__(self) -> None:
        self.source = iter(BATCHES)

    def __iter__(self) -> Iterator[Any]:
        return self.source


def broken(output: Tensor, target: Tensor) -> Tensor:
    raise KeyError("a bug in the loss")


BAD_BATCHES: dict[str, tuple[Any, type[DagrowError], str]] = {
    "generator": ((b for b in BATCHES), BatchError, "read only once; give a list"),
    "iterator": (iter(BATCHES), BatchError, "read only once; give a list"),
    "secretly once": (Once(), BatchError, "read only once"),
    "empty list": ([], BatchError, "is empty"),
    "empty loader": (DataLoader(TensorDataset(X[:0], Y[:0]), batch_size=4), BatchError, "is empty"),
    "dataset": (TensorDataset(X, Y), BatchError, "DataLoader"),
    "one batch": ((X, Y), BatchError, r"\[\(inputs, target\)\]"),
    "tensor": (X, BatchError, "list of"),
    "none": (None, BatchError, "list of"),
    "number": (3, BatchError, "list of"),
    "dict": ({"x": X}, BatchError, "list of"),
    "string": ("data", BatchError, "list of"),
    "triples": ([(X, Y, Y)], BatchError, "step="),
    "inputs only": ([X], BatchError, "step="),
    "no samples": ([(X[:0], Y[:0])], BatchError, "no samples"),
    "numpy": ([(X.numpy(), Y.numpy())], BatchError, "tensor"),
    "inputs too wide": ([(torch.cat([X, X], 1), Y)], BatchError, r"\(8, 8\) float32"),
    "fewer targets": ([(X, Y[:5])], BatchError, "8 inputs and 5 targets"),
    "targets too wide": ([(X, X)], BatchError, r"\(8, 4\) float32"),
    "double inputs": ([(X.double(), Y.double())], BatchError, "parameters are float32"),
    "integer inputs": ([(X.long(), Y)], BatchError, "int64"),
    "nan inputs": ([(X * math.nan, Y)], LossError, "finite"),
    "infinite targets": ([(X, Y * math.inf)], LossError, "finite"),
    "meta": ([(X.to("meta"), Y)], BatchError, "device"),
    "second batch bad": ([(X, Y), (X[:, :2], Y)], BatchError, r"\(8, 2\)"),
    "wrong keyword": ([({"inputs": X}, Y)], BatchError, "inputs"),
    "set": ([({1, 2}, Y)], DagrowError, "set"),
}

BAD_LOSSES: dict[str, tuple[Any, str]] = {
    "none": (None, "either loss="),
    "a number": (0.5, "cannot be called"),
    "vector": (lambda o, t: ((o - t) ** 2).mean(1), "one number"),
    "python float": (lambda o, t: 1.0, "float"),
    "nothing": (lambda o, t: None, "NoneType"),
    "nan": (lambda o, t: MSE(o, t) * math.nan, "finite"),
    "inf": (lambda o, t: MSE(o, t) / 0, "finite"),
    "independent": (lambda o, t: (t**2).mean(), "does not depend on the model"),
    "detached": (lambda o, t: MSE(o.detach(), t), "does not depend on the model"),
    "neither mean nor sum": (lambda o, t: MSE(o, t, reduction="sum") ** 0.5, "a sum gives 2"),
    "constant in the model": (lambda o, t: (o * 0 + t).detach().mean().requires_grad_(), "does not depend"),
}


def unchanged(model: nn.Module, before: dict[str, Tensor], hooks: list[int]) -> None:
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert all(p.grad is None for p in model.parameters())
    assert all(m.training for m in model.modules())
    assert torch.is_grad_enabled()


def refused(error: type[DagrowError], message: str, call: Callable[[Any], Any]) -> None:
    model, dag = setting()
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    with pytest.raises(error, match=message) as caught:
        call(dag)
    assert str(caught.value).rstrip().endswith((".", ")")) or "\n" in str(caught.value), "a full sentence"
    unchanged(model, before, hooks)
    assert torch.equal(random, torch.get_rng_state())
    receipt = dagrow.grow(dag, BATCHES, MSE, OPERATORS)
    assert receipt.neurons == 1
    assert receipt.loss_after < receipt.loss_before


@pytest.mark.parametrize("case", BAD_BATCHES)
def test_batches(case: str) -> None:
    batches, error, message = BAD_BATCHES[case]
    refused(error, message, lambda dag: dagrow.grow(dag, batches, MSE, OPERATORS))


@pytest.mark.parametrize("verb", [dagrow.bottlenecks, dagrow.propose, dagrow.grow])
@pytest.mark.parametrize("case", ["empty list", "one batch", "double inputs", "second batch bad", "nan inputs"])
def test_batches_of_every_verb(verb: Any, case: str) -> None:
    batches, error, message = BAD_BATCHES[case]
    refused(error, message, lambda dag: verb(dag, batches, MSE))


@pytest.mark.parametrize("case", BAD_LOSSES)
def test_losses(case: str) -> None:
    loss, message = BAD_LOSSES[case]
    refused(LossError, message, lambda dag: dagrow.grow(dag, BATCHES, loss, OPERATORS))


def test_a_bug_in_the_loss_is_told_with_its_cause() -> None:
    refused(BatchError, "KeyError: 'a bug in the loss'", lambda dag: dagrow.grow(dag, BATCHES, broken, OPERATORS))


def test_step_and_loss() -> None:
    def step(model: nn.Module, batch: Any) -> Tensor:
        return MSE(model(batch[0]), batch[1])

    refused(LossError, "either loss=", lambda dag: dagrow.grow(dag, BATCHES, MSE, OPERATORS, step=step))
    refused(LossError, "cannot be called", lambda dag: dagrow.grow(dag, BATCHES, step=3, operators=OPERATORS))  # type: ignore[arg-type]
    refused(
        LossError,
        "does not depend",
        lambda dag: dagrow.bottlenecks(dag, BATCHES, step=lambda m, b: MSE(b[1] * 2, b[1])),
    )


@pytest.mark.parametrize(
    ("validation", "error", "message"),
    [
        ([], BatchError, "validation is empty"),
        (iter(BATCHES), BatchError, "validation is a list_iterator"),
        ([(X[:, :2], Y)], BatchError, r"\(8, 2\)"),
        ([(X, Y * math.nan)], LossError, "finite"),
    ],
)
def test_validation(validation: Any, error: type[DagrowError], message: str) -> None:
    refused(error, message, lambda dag: dagrow.grow(dag, BATCHES, MSE, OPERATORS, validation=validation))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AddNeurons(k=0), "whole number from 1 on"),
        (lambda: AddNeurons(k=-1), "whole number from 1 on"),
        (lambda: AddNeurons(k=1.5), "whole number from 1 on"),  # type: ignore[arg-type]
        (lambda: AddNeurons(k="3"), "whole number from 1 on"),  # type: ignore[arg-type]
        (lambda: AddNeurons(solver="best"), "not one of"),  # type: ignore[arg-type]
        (lambda: AddNeurons(init="xavier"), "not one of"),  # type: ignore[arg-type]
        (lambda: AddNeurons(folds=0), "whole number from 1 on"),
        (lambda: AddNeurons(ridge=-1.0), "finite number from 0 on"),
        (lambda: AddNeurons(ridge=math.nan), "finite number from 0 on"),
        (lambda: AddNeurons(folds=1), "Give k="),
        (lambda: AddNeurons(init="copy"), "Give k="),
        (lambda: AddNeurons(axes="0"), "tuple of names"),  # type: ignore[arg-type]
        (lambda: MoveWeights(edges="0"), "tuple of names"),  # type: ignore[arg-type]
        (lambda: MoveWeights(folds=0), "whole number from 1 on"),
        (lambda: MoveWeights(ridge=-1.0), "finite number from 0 on"),
        (lambda: MoveWeights(ridge=True), "finite number from 0 on"),
        (lambda: MoveWeights(ridge=10**400), "finite number from 0 on"),
        (lambda: AddNeurons(seed=2**70), "whole number from 0 to 4294967295"),
        (lambda: AddNeurons(seed=True), "whole number from 0 to"),
        (lambda: AddConnection(rank=0), "whole number from 1 on, or None for a single layer"),
        (lambda: AddConnection(kernel=None), "whole number from 1 on[.]"),  # type: ignore[arg-type]
        (lambda: AddLayer(k=None), "whole number from 1 on[.]"),  # type: ignore[arg-type]
        (lambda: AddLayer(3, seed=-1), "whole number from 0 to"),
    ],
)
def test_operators_that_make_no_sense(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(GrowthError, match=message):
        make()


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


def test_frozen_weights_are_not_moved() -> None:
    model, dag = setting()
    model.requires_grad_(False)
    with pytest.raises(GrowthError, match="requires_grad=False"):
        dagrow.grow(dag, BATCHES, MSE, [MoveWeights(edges=("0",))])


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


def test_a_model_that_takes_another_way_than_when_it_was_traced() -> None:
    class Fickle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.skip = nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 2), False

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.a(x))
            return self.c(h if self.skip else torch.tanh(self.b(h)))

    model = Fickle()
    dag = dagrow.trace(model, X)
    model.skip = True
    with pytest.raises(GrowthError, match="another way than when it was traced"):
        dagrow.bottlenecks(dag, BATCHES, MSE)
    assert not any(m._forward_hooks for m in model.modules())


def test_all_errors_are_of_one_family() -> None:
    family = [getattr(dagrow, name) for name in dagrow.__all__ if name.endswith("Error")]
    assert len(family) >= 7
    assert all(issubclass(kind, DagrowError) for kind in family)
