"""A user's own exception leaves every verb as the exception that it was, with a note on the batch."""

import copy
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from small_net import MSE, X, Y, net
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

import dagrow
from dagrow import AddNeurons, Budget, Grower, MoveWeights, ShortTraining

BATCHES = [(X, Y), (X * 2, Y), (X[:6], Y[:6])]
OPERATORS = [MoveWeights(folds=1), AddNeurons(k=1, ridge=0.1, folds=1)]


class Stopped(Exception):  # noqa: N818
    """Of a user's own making."""


class Abandoned(BaseException):
    """That nothing but the user's own code is to catch."""


class OfRuntimeError(RuntimeError):
    """What a library would raise."""


def new_optimizer(dag: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(dag.model.parameters(), lr=1e-2)


def short_training(dag: Any, batches: Any, loss: Any, quiet: Callable[[], Any]) -> Any:
    with quiet():
        growths = dagrow.propose(dag, batches, loss, OPERATORS)
    return dagrow.plan(growths, policy=ShortTraining(steps=4, top=1))


def line_search(dag: Any, batches: Any, loss: Any, quiet: Callable[[], Any]) -> Any:
    with quiet():
        growths = dagrow.propose(dag, batches, loss, OPERATORS)
    return dagrow.plan(growths, Budget(growths=1))


def applied(dag: Any, batches: Any, loss: Any, quiet: Callable[[], Any]) -> Any:
    with quiet():
        growth = dagrow.propose(dag, batches, loss, OPERATORS)[0]
    return growth.apply(0.1)


VERBS: dict[str, Callable[..., Any]] = {
    "bottlenecks": lambda dag, batches, loss, quiet: dagrow.bottlenecks(dag, batches, loss),
    "propose": lambda dag, batches, loss, quiet: dagrow.propose(dag, batches, loss, OPERATORS),
    "grow": lambda dag, batches, loss, quiet: dagrow.grow(dag, batches, loss, OPERATORS),
    "tangent": lambda dag, batches, loss, quiet: dagrow.tangent(dag, batches, loss),
    "Grower.step": lambda dag, batches, loss, quiet: Grower(dag, loss, OPERATORS).step(0, batches),
    "fit": lambda dag, batches, loss, quiet: dagrow.fit(
        dag, batches, loss, OPERATORS, epochs=1, optimizer=new_optimizer(dag)
    ),
    "ShortTraining": short_training,
    "ByLineSearch": line_search,
    "Growth.apply": applied,
}


class Fault:
    """Raises at one call, counted from 0; the calls are those of a loss, a forward, or a read of a batch."""

    def __init__(self, kind: type[BaseException] | None, at: int) -> None:
        self.kind, self.at, self.calls, self.silent, self.raised = kind, at, 0, False, False

    def __call__(self) -> None:
        if self.silent:
            return
        self.calls += 1
        if self.kind is not None and self.calls == self.at + 1:
            self.raised = True
            raise self.kind("the user's own words")

    def quiet(self) -> Any:
        fault = self

        class Quiet:
            def __enter__(self) -> None:
                fault.silent = True

            def __exit__(self, *_: object) -> None:
                fault.silent = False

        return Quiet()


def tried(verb: str, place: str, fault: Fault) -> tuple[Any, Any]:
    """The verb with a fault at a place: the model, and what was raised."""
    model = net()
    dag = dagrow.trace(model, X)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        if place == "loss":
            fault()
        return MSE(output, target)

    class Batches:
        def __iter__(self) -> Iterator[Any]:
            if place == "iter":
                fault()
            return self.read()

        def read(self) -> Iterator[Any]:
            for batch in BATCHES:
                if place == "read":
                    fault()
                yield batch

    if place == "model":
        model[1].register_forward_hook(lambda *_: fault())
    before = copy.deepcopy(model.state_dict())
    try:
        VERBS[verb](dag, Batches(), loss, fault.quiet)
    except BaseException as error:
        if verb != "fit":
            assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
        assert torch.is_grad_enabled()
        return model, error
    return model, None


@pytest.mark.parametrize("place", ["loss", "model", "read", "iter"])
@pytest.mark.parametrize("verb", VERBS)
def test_exceptions_stay_what_they_are_wherever_they_are_raised(verb: str, place: str) -> None:
    counted = Fault(None, 0)
    assert tried(verb, place, counted)[1] is None
    kinds = [Stopped, Abandoned, OfRuntimeError, ValueError, RuntimeError, torch.OutOfMemoryError, KeyboardInterrupt]
    if verb == "tangent":  # layers without derivatives in forward mode raise one, and are taken in reverse
        kinds.remove(RuntimeError)
    ats = sorted({0, 1, 3, 4, counted.calls // 3, counted.calls // 2, counted.calls - 1} & {*range(counted.calls)})
    for turn, at in enumerate(ats):
        kind = kinds[turn % len(kinds)]
        fault = Fault(kind, at)
        _, error = tried(verb, place, fault)
        assert fault.raised
        if place == "model" and isinstance(error, dagrow.TraceError):
            assert type(error.__cause__) is kind  # on the example inputs, which are no batch
            continue
        if error is None and kind in (ValueError, RuntimeError, torch.OutOfMemoryError):
            continue  # of a trial on other samples than the user's, or on a wider model, either of which may fail so
        assert type(error) is kind, f"{kind.__name__} at call {at} of {counted.calls} became {error!r}"
        assert str(error) == "the user's own words"
        noted = any(note.startswith("dagrow: raised ") for note in getattr(error, "__notes__", ()))
        assert noted or place == "model"
        assert any(frame.name == "__call__" for frame in traceback.extract_tb(error.__traceback__))


@pytest.mark.parametrize("verb", VERBS)
def test_the_end_of_an_iteration_that_a_user_raises_is_no_end_of_ours(verb: str) -> None:
    for place in ("loss", "iter"):
        _, error = tried(verb, place, Fault(StopIteration, 1))
        assert type(error) is StopIteration


def test_a_note_tells_which_batch_it_was() -> None:
    model = net()
    dag = dagrow.trace(model, X)

    def step(network: nn.Module, batch: Any) -> Tensor:
        if len(batch[0]) == 6:
            raise Stopped("six")
        return MSE(network(batch[0]), batch[1])

    with pytest.raises(Stopped) as caught:
        dagrow.bottlenecks(dag, BATCHES, step=step)
    (note,) = caught.value.__notes__
    assert note.startswith("dagrow: raised on batch 2 of batches, counted from 0: ('(6, 4) float32', '(6, 2) float32')")
    assert "parameters are float32 on cpu" in note
    assert "has 6 samples, the first had 8" in note
    with pytest.raises(Stopped, match="batch 2 of validation"):
        dagrow.grow(dag, BATCHES[:2], operators=OPERATORS, step=step, validation=BATCHES)


class Backward(torch.autograd.Function):
    kind: type[Exception]

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise Backward.kind("the user's own words")


@pytest.mark.parametrize("kind", [Stopped, OfRuntimeError, RuntimeError, torch.OutOfMemoryError])
def test_exceptions_of_a_backward_pass(kind: type[Exception]) -> None:
    Backward.kind = kind
    dag = dagrow.trace(net(), X)
    with pytest.raises(kind, match=r"(?s)own words.*batch 0 of batches") as caught:
        dagrow.propose(dag, BATCHES, lambda o, t: MSE(Backward.apply(o), t), OPERATORS, reduction="mean")
    assert type(caught.value) is kind


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield X[0], Y[0]
        raise Stopped("the disk is gone")


def test_exceptions_of_a_data_set() -> None:
    dag = dagrow.trace(net(), X)
    with pytest.raises(Stopped, match="the disk is gone") as caught:
        dagrow.propose(dag, DataLoader(Stream(), batch_size=1), MSE, OPERATORS)
    assert "where batch 1 of batches" in "".join(caught.value.__notes__)
