"""Whether a grown model at gamma = 0 is still the same function, on the example inputs, in both modes."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dagrow._comparison import alike, close, jittered, rounding_between
from dagrow._model_state import ModelState, NoDropout, seed_everything, torch_state
from dagrow._pytree import leaves
from dagrow.errors import first_line
from dagrow.tracing import bind, hold_values


@dataclass(frozen=True)
class _Run:
    """What a model gave.

    Attributes:
        failure: why it gave nothing, or None.
        drawn: the random generators after it.
    """

    outputs: dict[str, object]
    failure: Exception | None
    drawn: list[Tensor]


@dataclass(frozen=True)
class Difference:
    """How two models differ.

    Attributes:
        text: in words.
        cause: what the second one raised, if it did.
    """

    text: str
    cause: Exception | None = None


def difference(
    model: nn.Module, examples: Sequence[Any], grown: Callable[[], AbstractContextManager[None]]
) -> Difference | None:
    """Compares the model as it is with the model inside ``grown()``.

    Both run without dropout, which draws other numbers where widths are others. A mode in which the model as it is
    fails is left out. Where the grown model still draws more random numbers or fewer, its outputs must only have the
    same shapes.

    Args:
        model: as it is.
        examples: what both run on, one after the other; nothing is compared where there is None.
        grown: a context in which the model is grown.

    Returns:
        How they differ, or None if they do not.
    """
    if examples[0] is None or not hold_values(model, [bind(example) for example in examples]):
        return None
    state, modes = ModelState(model, weights=True), (model.training, not model.training)
    calls = [(number, training) for number in range(len(examples)) for training in modes]
    before = {call: _run(state, examples[call[0]], call[1]) for call in calls}
    with grown():
        grown_state = ModelState(model, weights=True)
        after = {call: _run(grown_state, examples[call[0]], call[1]) for call in calls}
    for (number, training), run in before.items():
        now, mode = after[number, training], "training" if training else "evaluation"
        mode += f" on also[{number - 1}]" if number else ""
        if run.failure is not None:
            continue
        if now.failure is not None:
            return Difference(f"it would fail in {mode}: {first_line(now.failure)}", now.failure)
        changed = _changed(state, examples[number], training, run, now)
        if changed or run.outputs.keys() != now.outputs.keys():
            return Difference(f"its output{next(iter(changed), '')} would change in {mode}")
    return None


def _changed(state: ModelState, example_inputs: Any, training: bool, run: _Run, now: _Run) -> list[str]:
    """The outputs that differ by more than rounding explains."""
    outputs = {path: (output, now.outputs.get(path)) for path, output in run.outputs.items()}
    if not all(map(torch.equal, run.drawn, now.drawn)):
        return [path for path, pair in outputs.items() if not alike(*pair)]
    outputs = {path: pair for path, pair in outputs.items() if not close(*pair)}
    if not outputs:
        return []
    others = [_run(state, example_inputs, training, weights).outputs for weights in jittered(state.model)]
    return [
        path
        for path, pair in outputs.items()
        if not close(*pair, rounding_between(pair[0], [other.get(path) for other in others]))
    ]


def _run(state: ModelState, example_inputs: Any, training: bool, weights: dict[str, Tensor] | None = None) -> _Run:
    """What a model gives in a mode, with other weights if there are any. It comes back to its state."""
    model = state.model
    with state.kept(), torch.no_grad(), NoDropout():
        for parameter in model.parameters():
            parameter.grad = None  # the user's forward may run backward
        seed_everything(0, others=False)
        args, kwargs = bind(example_inputs)
        try:
            if model.training != training:
                model.train(training)
            output = functional_call(model, weights, args, kwargs) if weights else model(*args, **kwargs)
            outputs = {path: _kept(value) for path, value in leaves(output)}
        except Exception as error:  # the user's forward may raise anything
            return _Run({}, error, [])
        return _Run(outputs, None, _drawn())


def _drawn() -> list[Tensor]:
    """The random generators of all devices."""
    return [torch_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])]


def _kept(value: object) -> object:
    return value.clone() if isinstance(value, Tensor) else value
