"""From an `nn.Module` to a `Program`: its `fx.Graph`, proved to compute what the model computes.

Two front-ends, one normal form. `record` runs the model once and writes down what happens
(`dagrow.record`); `symbolic` uses `torch.fx` where there are no example inputs. Neither changes the model.
"""

import contextlib
import inspect
import logging
from collections.abc import Callable, Iterator, Set
from typing import Any

import torch
from torch import nn

from dagrow.errors import TraceError
from dagrow.program import Program, arguments, bind, explained, hold_values, plainly
from dagrow.record import FakeMode, Recorder
from dagrow.stated import stated
from dagrow.undisturbed import AsFound
from dagrow.verification import verify

__all__ = ["record", "refuse_lazy"]

_STARS: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}


def record(
    model: nn.Module, example_inputs: Any, *, verified: bool = True, closed: Callable[[nn.Module], bool] | None = None
) -> Program:
    """The program of `model`, recorded in the mode that it is in, and verified at another batch size.

    Modules that are ``closed`` become one node, whatever they do inside."""
    given = bind(example_inputs)
    refuse_lazy(model)
    found, real = AsFound(model, weights=True), hold_values(model, given)
    held = {id(saved.tensor) for saved in found.tensors}

    def written() -> Program:
        with found.kept():
            program = _recorded(model, *given, real, closed, held)
        if program.obstacle and real:  # many a forward does without values where there are none
            with found.kept(), contextlib.suppress(TraceError), _quietly():
                program = _recorded(model, *given, False, closed, held)
        return verify(program, example_inputs, found) if verified else program

    return found.trusted(written)


def _recorded(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], real: bool,
    closed: Callable[[nn.Module], bool] | None, held: Set[int],
) -> Program:  # fmt: skip
    """One run of the model, on fake tensors unless ``real``. Leaves it for the caller to clean up."""
    bound = arguments(model, args, kwargs)
    fake = None if real else FakeMode(allow_non_fake_inputs=True)
    for module in model.modules():  # wrapped inputs and outputs would hide which tensor is which
        module._backward_hooks.clear()
        module._backward_pre_hooks.clear()
    with fake or contextlib.nullcontext(), torch.enable_grad(), stated(model) as uses, plainly():
        recorder = Recorder(model, fake, closed, held)
        uses.live = lambda: recorder.live
        for name, value in bound.arguments.items():
            star = _STARS.get(bound.signature.parameters[name].kind, "")
            bound.arguments[name] = recorder.placeholder(star + name, value)
        with explained(model, (args, kwargs)), recorder:
            output = model(*bound.args, **bound.kwargs)
        recorder.output(output)
        for name in recorder.assigned():
            recorder.notes[f"forward assigns buffer {name}; the graph leaves it"] = None
    return Program(
        model,
        recorder.graph,
        recorder.constants,
        tuple(recorder.notes),
        frozenset(uses.computed),
        recorder.obstacle,
        recorder.unrolled,
    )


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without what torch logs about operations that need values."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def refuse_lazy(model: nn.Module) -> None:
    """Raises TraceError for parameters that have no shape yet."""
    lazy = [name for name, p in model.named_parameters() if nn.parameter.is_lazy(p)]
    if lazy:
        raise TraceError(f"Parameters {lazy} have no shape yet. Run one batch through the model first.")
