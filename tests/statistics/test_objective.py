"""Losses, inputs and batches: in every form they give the same growth, and what is wrong with them is told."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_errors import BATCHES, MSE, OPERATORS, X, Y, refused
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dagrow
from dagrow import AddNeurons, BatchError, DagrowError, LossError, MoveWeights

GENERATOR = torch.Generator().manual_seed(0)
INPUTS = torch.randn(60, 4, generator=GENERATOR).double()
TARGETS = INPUTS[:, :2] * INPUTS[:, 2:]
WHOLE = [(INPUTS, TARGETS)]
MOVE_AND_NEURONS = [MoveWeights(ridge=1e-3), AddNeurons(k=2, ridge=1e-3)]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 2)
        self.double()

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        h = self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))
        return h if scale is None else h * scale


def traced(example: Any = INPUTS) -> Any:
    return dagrow.trace(Net(), example)


def mean(output: Tensor, target: Tensor) -> Tensor:
    return ((output - target) ** 2).sum(1).mean()


def split(size: int, x: Tensor = INPUTS, y: Tensor = TARGETS) -> list[Any]:
    return list(zip(x.split(size), y.split(size), strict=True))


def summed(output: Tensor, target: Tensor) -> Tensor:
    return ((output - target) ** 2).sum()


def step(model: nn.Module, batch: Any) -> Tensor:
    return mean(model(batch["x"]), batch["y"])


def gains(batches: Any, loss: Any = None, example: Any = INPUTS, **kwargs: Any) -> Tensor:
    growths = dagrow.propose(traced(example), batches, loss, MOVE_AND_NEURONS, **kwargs)
    return torch.tensor([growth.gain for growth in sorted(growths, key=lambda g: (g.where, g.neurons))])


@pytest.fixture(scope="module")
def reference() -> Tensor:
    return gains(WHOLE, mean)


def test_gains_do_not_depend_on_the_reduction(reference: Tensor) -> None:
    torch.testing.assert_close(gains(WHOLE, summed), reference, rtol=1e-9, atol=0)
    torch.testing.assert_close(gains(split(7), summed), reference, rtol=1e-9, atol=0)


@pytest.mark.parametrize("size", [1, 7, 60])
def test_gains_do_not_depend_on_the_batch_size(size: int, reference: Tensor) -> None:
    torch.testing.assert_close(gains(split(size), mean), reference, rtol=1e-9, atol=0)


def test_a_step_gives_the_same_gains(reference: Tensor) -> None:
    batches = [{"x": x, "y": y} for x, y in split(20)]
    torch.testing.assert_close(gains(batches, step=step), reference, rtol=1e-9, atol=0)


@pytest.mark.parametrize("form", ["tuple", "keywords", "two"])
def test_inputs_in_every_form(form: str, reference: Tensor) -> None:
    ones = torch.ones(60, 2).double()
    inputs: Any = {"tuple": (INPUTS,), "keywords": {"x": INPUTS}, "two": {"x": INPUTS, "scale": ones}}[form]
    torch.testing.assert_close(gains([(inputs, TARGETS)], mean, example=inputs), reference, rtol=1e-9, atol=0)


def test_a_loader_that_shuffles_works_and_random_numbers_stay() -> None:
    data = torch.utils.data.TensorDataset(INPUTS, TARGETS)
    loader = torch.utils.data.DataLoader(data, batch_size=16, shuffle=True)
    dag = traced()
    before = torch.get_rng_state()
    receipt = dagrow.grow(dag, loader, mean, MOVE_AND_NEURONS)
    assert receipt.loss_after < receipt.loss_before
    assert torch.equal(before, torch.get_rng_state())


def test_a_loader_with_a_generator_of_its_own_shuffles_every_pass_alike() -> None:
    """Samples stay in their folds from one pass to the next, and training goes on as it would have."""
    data, seen = torch.utils.data.TensorDataset(INPUTS, TARGETS), []
    generator = torch.Generator().manual_seed(3)
    loader = torch.utils.data.DataLoader(data, batch_size=16, shuffle=True, generator=generator)
    before = generator.get_state()

    def step(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        seen.append(float(batch[0].sum()))
        return mean(model(batch[0]), batch[1])

    dagrow.propose(traced(), loader, operators=[dagrow.AddNeurons(k=1)], step=step)
    assert torch.equal(before, generator.get_state())
    again = {value for value in seen if seen.count(value) > 1}
    assert len(again) == len(loader)


class Once:
    """Can be read only once, but does not say so."""

    def __init__(self) -> None:
        self.source = iter(BATCHES)

    def __iter__(self) -> Iterator[Any]:
        return self.source


def broken(output: Tensor, target: Tensor) -> Tensor:
    raise KeyError("a bug in the loss")


BAD_BATCHES: dict[str, tuple[Any, type[Exception], str]] = {
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
    "inputs too wide": ([(torch.cat([X, X], 1), Y)], RuntimeError, r"\(8, 8\) float32"),
    "fewer targets": ([(X, Y[:5])], BatchError, "8 inputs and 5 targets"),
    "targets too wide": ([(X, X)], RuntimeError, r"\(8, 4\) float32"),
    "double inputs": ([(X.double(), Y.double())], RuntimeError, "parameters are float32"),
    "integer inputs": ([(X.long(), Y)], RuntimeError, "int64"),
    "nan inputs": ([(X * math.nan, Y)], LossError, "finite"),
    "infinite targets": ([(X, Y * math.inf)], LossError, "finite"),
    "meta": ([(X.to("meta"), Y)], RuntimeError, "device"),
    "second batch bad": ([(X, Y), (X[:, :2], Y)], RuntimeError, r"batch 1 of batches.*\(8, 2\)"),
    "wrong keyword": ([({"inputs": X}, Y)], TypeError, "inputs"),
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
    refused(
        KeyError, "a bug in the loss.*\n?.*batch 0 of batches", lambda dag: dagrow.grow(dag, BATCHES, broken, OPERATORS)
    )


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


@pytest.mark.parametrize("reduction", [None, "mean"])
@pytest.mark.parametrize("retain", [False, True])
@pytest.mark.parametrize("detached", [False, True])
def test_a_step_that_runs_backward_is_told_so(reduction: Any, retain: bool, detached: bool) -> None:
    def step(model: nn.Module, batch: Any) -> Tensor:
        loss = MSE(model(batch[0]), batch[1])
        loss.backward(retain_graph=retain)
        return loss.detach() if detached else loss

    options = {} if reduction is None else {"reduction": reduction}
    message = r"runs backward\(\).*leaves backward\(\) and optimizer.step\(\) to the training loop"
    refused(LossError, message, lambda dag: dagrow.propose(dag, BATCHES, step=step, **options))
