"""Optimizers that follow the parameters of a growing model.

State that an optimizer keeps for an earlier version of a parameter is brought to the present one: old entries
bit-equal, new ones zero. An optimizer that nobody passed is brought along just before its next step.

New parameters of new layers are optimized along with one that was there: they join its group, and leave it again when
the growth is undone.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from inspect import signature
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._pytree import tree_leaves, tree_map

from dagrow.axes import IndexMap
from dagrow.errors import OptimizerError
from dagrow.surgery._growth_log import GrowthLog, Resize, log_of, opened_log

#: one entry per row or column, in Adafactor: of one neuron it has the parameter's shape by accident
FACTORED = {"row_var", "col_var", "exp_avg_sq_row", "exp_avg_sq_col"}


def log_growth(parameter: Tensor, index_maps: Sequence[IndexMap]) -> None:
    """Notes that a parameter has just grown to its present shape. Of buffers no optimizer keeps state."""
    if not (isinstance(parameter, nn.Parameter) or parameter.requires_grad):
        return
    before = list(parameter.shape)
    for index_map in index_maps:
        before[index_map.dim] = len(index_map.old)
    opened_log(parameter).add(Resize(torch.Size(before), parameter.shape, tuple(index_maps), False))
    _watch_steps()


def log_undo(parameter: Tensor, index_maps: Sequence[IndexMap]) -> None:
    """Notes that a growth of a parameter has just been undone. May run twice."""
    log = log_of(parameter)
    if log is None or not log.resizes:
        return
    before = list(parameter.shape)
    for index_map in index_maps:
        before[index_map.dim] = index_map.size
    log.add(Resize(torch.Size(before), parameter.shape, tuple(index_maps), True))


def log_added(parameter: Tensor, beside: Tensor) -> None:
    """Notes that a parameter is new, and which one it is optimized with."""
    log, other = opened_log(parameter), opened_log(beside)
    _forget(parameter, log)
    log.beside = ref(beside)
    other.new.append(ref(parameter))
    other.informed.clear()
    _watch_steps()


def log_removed(parameter: Tensor) -> None:
    """Notes that a new parameter has just been taken out again. May run twice."""
    log = opened_log(parameter)
    _forget(parameter, log)
    log.removed = True
    log.informed.clear()


def _forget(parameter: Tensor, log: GrowthLog) -> None:
    """It is no longer optimized with another one."""
    beside = None if log.beside is None else log.beside()
    other = None if beside is None else log_of(beside)
    if other is not None:
        other.new = [new for new in other.new if new() is not None and new() is not parameter]
    log.beside = None


def new_beside(parameters: Iterable[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """(new parameter, the one that it is optimized with), oldest first, also of those that are new themselves."""
    queue = list(parameters)
    pairs: dict[int, tuple[GrowthLog, Tensor, Tensor]] = {}
    for beside in queue:
        log = log_of(beside)
        for parameter in [new() for new in log.new] if log else ():
            if parameter is not None and id(parameter) not in pairs:
                pairs[id(parameter)] = opened_log(parameter), parameter, beside
                queue.append(parameter)
    return [(parameter, beside) for _, parameter, beside in sorted(pairs.values(), key=lambda pair: pair[0].since)]


@cache
def _watch_steps() -> None:
    """From now on optimizers of what has grown are brought along before their next step.

    One hook without state, for good: torch goes through its hooks in every step, and where one is added or removed
    meanwhile, the threads that are stepping fail.
    """
    register_optimizer_step_pre_hook(torch.compiler.disable(_bring_along))


def _bring_along(optimizer: Optimizer, _args: object, _kwargs: object) -> None:
    this = ref(optimizer)
    if any(this not in log.informed for _, log in _logged(optimizer)):
        carry(optimizer)


def _parameters(optimizer: Optimizer) -> Iterator[Tensor]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def _logged(optimizer: Optimizer) -> Iterator[tuple[Tensor, GrowthLog]]:
    """The optimizer's parameters to which something has happened."""
    for parameter in _parameters(optimizer):
        log = log_of(parameter)
        if log is not None:
            yield parameter, log


def adopt(optimizer: Optimizer, new: Iterable[Tensor], others: Iterable[Tensor]) -> None:
    """New parameters that would be optimized with none of the optimizer's, as beside a frozen layer, join it.

    They join the first of the others that it has. No other optimizer takes them then.
    """
    mine = {id(p) for p in _parameters(optimizer)}
    neighbour = next(p for p in others if id(p) in mine)
    for parameter in new:
        if id(parameter) not in mine:
            log_added(parameter, neighbour)
    regroup(optimizer)


def regroup(optimizer: Optimizer) -> None:
    """New parameters join the group of those that they are optimized with; those that were taken out leave."""
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    for parameter, beside in new_beside(_parameters(optimizer)):
        group = groups.get(id(beside))
        if id(parameter) not in groups and group is not None and _takes(optimizer, parameter):
            groups[id(parameter)] = group
            group["params"].append(parameter)
            optimizer.state.update(_first_state(optimizer, parameter))
    for parameter in [parameter for parameter, log in _logged(optimizer) if log.removed]:
        group = groups[id(parameter)]
        group["params"][:] = [other for other in group["params"] if other is not parameter]
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

    Raises:
        OptimizerError: some state cannot follow; none has changed.
    """
    regroup(optimizer)
    behind = {parameter: log for parameter, log in _logged(optimizer) if log.is_behind(optimizer)}
    refuse(optimizer, behind)
    states = {
        parameter: _brought(optimizer.state[parameter], log, log.versions.get(optimizer))
        for parameter, log in behind.items()
        if parameter in optimizer.state
    }
    optimizer.state.update(states)
    settle(optimizer, behind)
    for _, log in _logged(optimizer):
        log.informed.add(ref(optimizer, log.informed.discard))


def settle(optimizer: Optimizer, parameters: Iterable[Tensor]) -> None:
    """Notes that the state of these parameters is that of their present versions."""
    for parameter in parameters:
        log = log_of(parameter)
        if log is not None:
            log.versions[optimizer] = log.version


def refuse(optimizer: Optimizer, growing: Iterable[Tensor]) -> None:
    """Checks that the optimizer's state can follow its parameters among those that grow.

    Raises:
        OptimizerError: some of it cannot.
    """
    mine = {id(p) for p in _parameters(optimizer)}
    if not any(id(p) in mine for p in growing):
        return
    for parameter in _parameters(optimizer):
        for key, value in optimizer.state.get(parameter, {}).items():
            wrong = next((leaf for leaf in tree_leaves(value) if key in FACTORED or not _fits(parameter, leaf)), None)
            if wrong is not None:
                raise OptimizerError(
                    f"{type(optimizer).__name__} keeps {key!r} of shape {tuple(wrong.shape)} for a parameter of shape "
                    f"{tuple(parameter.shape)}: nothing says where new entries belong. Make a new optimizer after the "
                    "growth, or use one whose state has the parameter's shape (SGD, Adam, AdamW, ...)."
                )


def refuse_new(optimizer: Optimizer, new: Mapping[str, Tensor]) -> None:
    """Checks that an optimizer can take new parameters.

    Raises:
        OptimizerError: it cannot take some of them.
    """
    refused = [name for name, parameter in new.items() if not _takes(optimizer, parameter)]
    if refused:
        raise OptimizerError(
            f"{type(optimizer).__name__} cannot take the new parameters {', '.join(refused)}: it keeps one state for "
            "all parameters together, or takes matrices only. Leave optimizer= out and give them to another optimizer "
            "after the growth, or make a new one."
        )


def check_optimizer(optimizer: Optimizer | None, model: nn.Module) -> None:
    """Checks that something is an optimizer of a model, or None.

    Args:
        optimizer: what was given.
        model: whose parameters it should hold.

    Raises:
        OptimizerError: it is no optimizer, or holds none of them.
    """
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
    """Checks that an optimizer takes a step for each batch.

    Args:
        optimizer: is not changed.

    Raises:
        OptimizerError: its ``step`` evaluates the loss itself.
    """
    closure = signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise OptimizerError(
            f"the step of a {type(optimizer).__name__} needs a closure that evaluates the loss; give an optimizer that "
            "takes one step for each batch, such as Adam, or write the training loop yourself."
        )


def _fits(parameter: Tensor, value: object) -> bool:
    """Whether state is one number, or has the shape of the parameter as it is or once was."""
    if not isinstance(value, Tensor) or value.ndim == 0 or not value.numel() or value.shape == parameter.shape:
        return True
    log = log_of(parameter)
    return value.shape == (1,) or (log is not None and bool(log.resizes) and log.start(value.shape) is not None)


def _brought(state: Mapping[str, Any], log: GrowthLog, version: int | None) -> dict[str, Any]:
    """State of a version of a parameter, brought to the present one."""

    def follow(value: Any) -> Any:
        return log.follow(value, version) if isinstance(value, Tensor) and value.ndim else value

    return {key: tree_map(follow, value) for key, value in state.items()}
