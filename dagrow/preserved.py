"""Whether a grown model at gamma = 0 is still the same function, on few of the example inputs, in both modes."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dagrow.errors import first_line
from dagrow.program import bind, hold_values
from dagrow.trees import leaves
from dagrow.undisturbed import undisturbed
from dagrow.verification import close, fewer

__all__ = ["difference"]


@dataclass(frozen=True)
class _Run:
    """What a model gave.

    Attributes:
        failure: why it gave nothing, or None.
        random: whether it drew random numbers, which are others where widths are others.
    """

    outputs: dict[str, Any]
    failure: str | None
    random: bool


def difference(model: nn.Module, example_inputs: Any, grown: Callable[[], AbstractContextManager[None]]) -> str | None:
    """How the model inside ``grown()`` differs from the model as it is, or None.

    A mode in which the model as it is fails is left out. Where it draws random numbers, as dropout does, outputs cannot
    be compared: there it must only not fail.
    """
    if example_inputs is None or not hold_values(model, bind(example_inputs)):
        return None
    given = fewer(example_inputs)
    before = {training: _run(model, given, training) for training in (model.training, not model.training)}
    with grown():
        after = {training: _run(model, given, training) for training in before}
    for training, run in before.items():
        now, mode = after[training], "training" if training else "evaluation"
        if run.failure is None and now.failure is not None:
            return f"it would fail in {mode}: {now.failure}"
        if run.failure is None and not run.random and not now.random:
            changed = [path for path, value in run.outputs.items() if not close(value, now.outputs.get(path))]
            if changed or run.outputs.keys() != now.outputs.keys():
                return f"its output{next(iter(changed), '')} would change in {mode}"
    return None


def _run(model: nn.Module, example_inputs: Any, training: bool) -> _Run:
    with undisturbed(model), torch.no_grad():
        if model.training != training:
            model.train(training)
        torch.manual_seed(0)
        states = _states()
        args, kwargs = bind(example_inputs)
        try:
            outputs = {path: _kept(value) for path, value in leaves(model(*args, **kwargs))}
        except Exception as error:  # the user's forward may raise anything
            return _Run({}, first_line(error), False)
        return _Run(outputs, None, not all(map(torch.equal, _states(), states)))


def _states() -> list[Tensor]:
    """Of the random generators of all devices."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])]


def _kept(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
