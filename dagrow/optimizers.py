"""Optimizer state that follows its parameters. Floor 2: knows tensors and landings, not models.

Every growth of a parameter is logged with the parameter. State whose shape is that of an earlier stage is brought
to the present one: old entries bit-equal, new ones zero. An optimizer that nobody passed is brought along just
before its next step.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakTensorKeyDictionary

from dagrow.axes import Landing
from dagrow.errors import OptimizerError

__all__ = ["carry", "log_growth", "refusal"]


@dataclass(frozen=True, eq=False)
class _Stage:
    """One growth (or its undoing) of a tensor."""

    before: torch.Size
    landings: Sequence[Landing]
    shrink: bool

    def follow(self, state: Tensor) -> Tensor:
        index = [torch.arange(size) for size in state.shape]
        for landing in self.landings:
            index[landing.dim] = landing.old
        grid = torch.meshgrid(*(i.to(state.device) for i in index), indexing="ij")
        if self.shrink:
            return state[grid]
        shape = list(state.shape)
        for landing in self.landings:
            shape[landing.dim] = landing.size
        grown = state.new_zeros(shape)
        grown[grid] = state
        return grown


_log: Any = WeakTensorKeyDictionary()
_hooked: list[Any] = []


def log_growth(tensor: Tensor, landings: Sequence[Landing], shrink: bool = False) -> None:
    """Notes that a parameter has just taken a new shape."""
    before = list(tensor.shape)
    for landing in landings:
        before[landing.dim] = landing.size if shrink else len(landing.old)
    _log.setdefault(tensor, []).append(_Stage(torch.Size(before), tuple(landings), shrink))
    if not _hooked:
        _hooked.append(register_optimizer_step_pre_hook(lambda optimizer, _args, _kwargs: carry(optimizer)))


def carry(optimizer: Optimizer) -> None:
    """Brings all state of an optimizer to its parameters' present shapes. Raises OptimizerError before any change."""
    grown = [p for group in optimizer.param_groups for p in group["params"] if p in _log and p in optimizer.state]
    stale = [p for p in grown if any(_is_stale(p, value) for value in optimizer.state[p].values())]
    refusal(optimizer, stale, logged=True)
    for parameter in stale:
        state = optimizer.state[parameter]
        optimizer.state[parameter] = {key: _followed(parameter, value) for key, value in state.items()}


def refusal(optimizer: Optimizer, parameters: Iterable[Tensor], logged: bool = False) -> None:
    """Raises OptimizerError if state of one of the parameters has neither its shape nor a single entry."""
    for parameter in parameters:
        shapes = {tuple(parameter.shape)} | ({tuple(s.before) for s in _log.get(parameter, ())} if logged else set())
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.numel() > 1 and tuple(value.shape) not in shapes:
                raise OptimizerError(
                    f"{type(optimizer).__name__} keeps {key!r} of shape {tuple(value.shape)} for a parameter of shape "
                    f"{tuple(parameter.shape)}: nothing says where new entries belong. Make a new optimizer after the "
                    "growth, or use one whose state has the parameter's shape (SGD, Adam, AdamW, ...)."
                )


def _is_stale(parameter: Tensor, value: object) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and value.shape != parameter.shape and value.numel() > 0


def _followed(parameter: Tensor, value: Any) -> Any:
    if not _is_stale(parameter, value):
        return value
    stages = _log[parameter]
    start = max((i for i, stage in enumerate(stages) if stage.before == value.shape), default=len(stages))
    for stage in stages[start:]:
        value = stage.follow(value)
    return value
