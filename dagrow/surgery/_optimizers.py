"""Optimizers that follow the parameters of a growing model.

Every growth of a parameter is logged with the parameter. State that an optimizer keeps for an earlier version of it
is brought to the present one: old entries bit-equal, new ones zero. An optimizer that nobody passed is brought along
just before its next step.

New parameters of new layers are optimized along with one that was there: they join its group, and leave it again when
the growth is undone.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from dagrow.axes import IndexMap
from dagrow.errors import OptimizerError


@dataclass(frozen=True, eq=False)
class _Stage:
    """One growth (or its undoing) of a tensor."""

    before: torch.Size
    after: torch.Size
    landings: Sequence[IndexMap]
    shrink: bool

    def follow(self, state: Tensor) -> Tensor:
        sizes = self.after if self.shrink else self.before
        index = [torch.arange(size) for size in sizes]
        for landing in self.landings:
            index[landing.dim] = landing.old
        grid = torch.meshgrid(*(i.to(state.device) for i in index), indexing="ij")
        if self.shrink:
            return state[grid]
        grown = state.new_zeros(self.after)
        grown[grid] = state
        return grown


@dataclass(eq=False)
class _History:
    """The growths of one tensor. Those that no shape leads to any more are dropped; ``first`` counts them."""

    first: int = 0
    stages: list[_Stage] = field(default_factory=list)

    @property
    def version(self) -> int:
        return self.first + len(self.stages)

    def add(self, stage: _Stage) -> None:
        if self.stages and self.stages[-1].after == stage.after:
            return  # an interrupted undo runs twice
        self.stages.append(stage)
        newest = {stage.before: index for index, stage in enumerate(self.stages)}
        unreachable = min(newest.values())
        self.first, self.stages = self.first + unreachable, self.stages[unreachable:]

    def start(self, shape: torch.Size, seen: int | None) -> int | None:
        """The first stage that state of this shape has still to follow; None if no version had the shape."""
        if seen is not None and seen >= self.first:
            at = seen - self.first
            if at == len(self.stages) or self.stages[at].before == shape:
                return at
        if self.stages[-1].after == shape:
            return len(self.stages)
        return max((i for i, stage in enumerate(self.stages) if stage.before == shape), default=None)

    def follow(self, state: Tensor, seen: int | None) -> Tensor:
        start = self.start(state.shape, seen)
        for stage in self.stages[len(self.stages) if start is None else start :]:
            state = stage.follow(state)
        return state


#: one entry per row or column, in Adafactor: of one neuron it has the parameter's shape by accident
FACTORED = {"row_var", "col_var", "exp_avg_sq_row", "exp_avg_sq_col"}
_log: Any = WeakTensorKeyDictionary()  #: tensor -> _History
_seen: Any = WeakKeyDictionary()  #: optimizer -> tensor -> the version that its state is of
_beside: Any = WeakTensorKeyDictionary()  #: new parameter -> weak reference to the one it is optimized with, or None
_hooked: list[Any] = []
_logged = [0]  #: how often anything was logged here
_up_to_date: Any = WeakKeyDictionary()  #: optimizer -> what was logged when it was carried, and its parameters' ids


def log_growth(tensor: Tensor, landings: Sequence[IndexMap]) -> None:
    """Notes that a parameter has just grown to its present shape."""
    before = list(tensor.shape)
    for landing in landings:
        before[landing.dim] = len(landing.old)
    _log.setdefault(tensor, _History()).add(_Stage(torch.Size(before), tensor.shape, tuple(landings), False))
    _watch_steps()


def _watch_steps() -> None:
    """After a change optimizers are brought along before their next step."""
    _logged[0] += 1
    if not _hooked:
        _hooked.append(register_optimizer_step_pre_hook(lambda optimizer, _args, _kwargs: _bring_along(optimizer)))


def _bring_along(optimizer: Optimizer) -> None:
    """Carries an optimizer if anything was logged, or its parameters are others, since its last step."""
    now = _logged[0], [id(parameter) for parameter in _parameters(optimizer)]
    if _up_to_date.get(optimizer) != now:
        carry(optimizer)
        _up_to_date[optimizer] = now


def log_undo(tensor: Tensor, landings: Sequence[IndexMap]) -> None:
    """Notes that a growth of a parameter has just been undone. May run twice."""
    before = list(tensor.shape)
    for landing in landings:
        before[landing.dim] = landing.size
    if tensor in _log:
        _log[tensor].add(_Stage(torch.Size(before), tensor.shape, tuple(landings), True))
    _watch_steps()


def log_added(parameter: Tensor, beside: Tensor) -> None:
    """Notes that a parameter is new, and which one it is optimized with."""
    _beside[parameter] = ref(beside)
    _watch_steps()


def adopt(optimizer: Optimizer, new: Iterable[Tensor], others: Iterable[Tensor]) -> None:
    """New parameters that would be optimized with none of the optimizer's, as beside a frozen layer, join it with the
    first of the others that it has. No other optimizer takes them then."""
    mine = {id(p) for p in _parameters(optimizer)}
    near = next(p for p in others if id(p) in mine)
    for parameter in new:
        if id(parameter) not in mine:
            log_added(parameter, near)
    regroup(optimizer)


def log_removed(parameter: Tensor) -> None:
    """Notes that a new parameter has just been taken out again. May run twice."""
    _beside[parameter] = None
    _watch_steps()


def regroup(optimizer: Optimizer) -> None:
    """New parameters join the group of those that they are optimized with; those that were taken out leave."""
    if not _beside:
        return
    mine = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for parameter, beside in list(_beside.items()):
        if beside is None:
            _leave(optimizer, parameter)
        elif id(parameter) not in mine and id(beside()) in mine and _takes(optimizer, parameter):
            mine[id(parameter)] = mine[id(beside())]  # those that were added to it join, too
            mine[id(parameter)]["params"].append(parameter)
            optimizer.state.update(_first_state(optimizer, parameter))


def _leave(optimizer: Optimizer, parameter: Tensor) -> None:
    for group in optimizer.param_groups:
        if any(p is parameter for p in group["params"]):
            group["params"][:] = [p for p in group["params"] if p is not parameter]
            optimizer.state.pop(parameter, None)


def _takes(optimizer: Optimizer, parameter: Tensor) -> bool:
    """Whether an optimizer works with parameters of this shape, that it did not have from the start."""
    matrices = getattr(torch.optim, "Muon", ())
    return not isinstance(optimizer, torch.optim.LBFGS) and (parameter.ndim == 2 or not isinstance(optimizer, matrices))


def _first_state(optimizer: Optimizer, parameter: Tensor) -> dict[Tensor, Any]:
    """What an optimizer of this kind holds of a parameter before its first step: nothing, for most."""
    if not isinstance(optimizer, torch.optim.Adagrad):
        return {}
    return dict(type(optimizer)([parameter], **optimizer.defaults).state)


def carry(optimizer: Optimizer) -> None:
    """Brings all state of an optimizer to its parameters' present shapes, and new parameters into its groups.

    Raises OptimizerError before any change."""
    regroup(optimizer)
    seen = _seen.setdefault(optimizer, WeakTensorKeyDictionary())
    grown = [p for p in _parameters(optimizer) if p in _log and seen.get(p) != _log[p].version]
    if not grown:
        return
    refuse(optimizer, grown)
    states = {p: _brought(p, optimizer.state[p], seen.get(p)) for p in grown if p in optimizer.state}
    for parameter, state in states.items():
        optimizer.state[parameter] = state
    settle(optimizer, grown)


def settle(optimizer: Optimizer, parameters: Iterable[Tensor]) -> None:
    """Notes that the state of these parameters is that of their present versions."""
    seen = _seen.setdefault(optimizer, WeakTensorKeyDictionary())
    for parameter in parameters:
        if parameter in _log:
            seen[parameter] = _log[parameter].version


def refuse(optimizer: Optimizer, growing: Iterable[Tensor]) -> None:
    """Raises OptimizerError if one of the parameters is the optimizer's and some of its state cannot follow."""
    mine = {id(p) for p in _parameters(optimizer)}
    if not any(id(p) in mine for p in growing):
        return
    for parameter in _parameters(optimizer):
        for key, value in optimizer.state.get(parameter, {}).items():
            found = next((x for x in tree_leaves(value) if key in FACTORED or not _fits(parameter, x)), None)
            if found is not None:
                raise OptimizerError(
                    f"{type(optimizer).__name__} keeps {key!r} of shape {tuple(found.shape)} for a parameter of shape "
                    f"{tuple(parameter.shape)}: nothing says where new entries belong. Make a new optimizer after the "
                    "growth, or use one whose state has the parameter's shape (SGD, Adam, AdamW, ...)."
                )


def refuse_new(optimizer: Optimizer, new: Mapping[str, Tensor]) -> None:
    """Raises OptimizerError if an optimizer cannot take some of these new parameters."""
    refused = [name for name, parameter in new.items() if not _takes(optimizer, parameter)]
    if refused:
        raise OptimizerError(
            f"{type(optimizer).__name__} cannot take the new parameters {', '.join(refused)}: it keeps one state for "
            "all parameters together, or takes matrices only. Leave optimizer= out and give them to another optimizer "
            "after the growth, or make a new one."
        )


def check_optimizer(optimizer: Optimizer | None, model: nn.Module) -> None:
    """Raises OptimizerError for what is no optimizer, or not one of this model."""
    if optimizer is None:
        return
    if not isinstance(optimizer, Optimizer):
        raise OptimizerError(
            f"optimizer is a {type(optimizer).__name__}; give a torch.optim.Optimizer, or leave it out: then its state "
            "is brought along at its next step."
        )
    known = {id(parameter) for parameter in model.parameters()}
    if not any(id(parameter) in known for group in optimizer.param_groups for parameter in group["params"]):
        raise OptimizerError(
            f"the {type(optimizer).__name__} holds none of the parameters of the {type(model).__name__}; give the "
            "one that trains this model, or leave it out."
        )


def check_steps(optimizer: Optimizer) -> None:
    """Raises OptimizerError for one whose ``step`` evaluates the loss itself."""
    closure = signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise OptimizerError(
            f"the step of a {type(optimizer).__name__} needs a closure that evaluates the loss; give an optimizer that "
            "takes one step for each batch, such as Adam, or write the training loop yourself."
        )


def _parameters(optimizer: Optimizer) -> Iterator[Tensor]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def _fits(parameter: Tensor, value: object) -> bool:
    """Whether state is one number, or has the shape of the parameter as it is or once was."""
    if not isinstance(value, Tensor) or value.ndim == 0 or not value.numel() or value.shape == parameter.shape:
        return True
    if value.shape == (1,) or parameter not in _log:
        return value.shape == (1,)
    return _log[parameter].start(value.shape, None) is not None


def _brought(parameter: Tensor, state: dict[str, Any], seen: int | None) -> dict[str, Any]:
    history = _log[parameter]

    def follow(value: Any) -> Any:
        return history.follow(value, seen) if isinstance(value, Tensor) and value.ndim else value

    return {key: tree_map(follow, value) for key, value in state.items()}
