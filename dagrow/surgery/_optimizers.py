"""Optimizers that follow the parameters of a growing model.

State that an optimizer keeps for an earlier version of a parameter is brought to the present one: old entries
bit-equal, new ones as the optimizer would begin with them. An optimizer that nobody passed is brought along just before
its next step.
"""

import gc
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from inspect import signature
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._pytree import tree_leaves, tree_map_with_path

from dagrow.axes import IndexMap
from dagrow.errors import OptimizerError, first_line
from dagrow.surgery._first_state import Path, first_state, objects_in, tensors_in
from dagrow.surgery._growth_log import GrowthLog, Resize, log_of, opened_log
from dagrow.surgery._optimizer_groups import logged, parameters_of, regroup

Optimizers = Optimizer | Sequence[Optimizer] | None  #: what users give
#: optimizer -> its groups when its state was last brought along: it has others once other state is loaded
_groups: WeakKeyDictionary[Optimizer, list[dict[str, Any]]] = WeakKeyDictionary()


def sequence_of(optimizer: Optimizers) -> tuple[Optimizer, ...]:
    """One optimizer, several or none, as several.

    Args:
        optimizer: what was given.

    Returns:
        Each once.
    """
    several = () if optimizer is None else (optimizer,) if isinstance(optimizer, Optimizer) else tuple(optimizer)
    return tuple(dict.fromkeys(several))


def log_growth(parameter: Tensor, index_maps: Sequence[IndexMap]) -> None:
    """Notes that a parameter has just grown to its present shape. Of buffers no optimizer keeps state."""
    if not (isinstance(parameter, nn.Parameter) or parameter.requires_grad):
        return
    before = list(parameter.shape)
    for index_map in index_maps:
        before[index_map.dim] = len(index_map.old)
    opened_log(parameter).add(Resize(torch.Size(before), parameter.shape, tuple(index_maps), False))


def log_undo(parameter: Tensor, index_maps: Sequence[IndexMap]) -> None:
    """Notes that a growth of a parameter has just been undone. May run twice."""
    log = log_of(parameter)
    if log is None or not log.resizes:
        return
    before = list(parameter.shape)
    for index_map in index_maps:
        before[index_map.dim] = index_map.size
    log.add(Resize(torch.Size(before), parameter.shape, tuple(index_maps), True))


@cache
def watch_steps() -> None:
    """From now on optimizers of what has grown are brought along before their next step.

    One hook without state, for good: torch goes through its hooks in every step, and where one is added or removed
    meanwhile, the threads that are stepping fail.
    """
    register_optimizer_step_pre_hook(torch.compiler.disable(_bring_along))


def _bring_along(optimizer: Optimizer, _args: object, _kwargs: object) -> None:
    this, logs = ref(optimizer), [log for _, log in logged(optimizer)]
    if logs and (_is_loaded(optimizer) or any(this not in log.informed for log in logs)):
        carry(optimizer)


def _is_loaded(optimizer: Optimizer) -> bool:
    """Whether other state may have come in since its own was brought along."""
    return _groups.get(optimizer) is not optimizer.param_groups


def _forget_loaded(optimizer: Optimizer) -> None:
    """Other state may be of any version."""
    if _is_loaded(optimizer):
        for _, log in logged(optimizer):
            log.versions.pop(optimizer, None)


def remember(parameters: Sequence[Tensor]) -> None:
    """Notes which optimizers have state of parameters as they are now, before entries of these go.

    Others may come in their place, so that a shape which was there before does not tell whose state it is.

    Args:
        parameters: that are going to lose entries.
    """
    for optimizer in [each for each in gc.get_objects() if issubclass(type(each), Optimizer)]:
        held = [parameter for parameter in parameters if _is_of(optimizer.state.get(parameter), parameter)]
        if held:
            _forget_loaded(optimizer)
            _groups[optimizer] = optimizer.param_groups
        for parameter in held:
            log = opened_log(parameter)
            log.versions.setdefault(optimizer, log.version)


def _is_of(state: object, parameter: Tensor) -> bool:
    """Whether some of the state has the parameter's shape."""
    return any(isinstance(value, Tensor) and value.shape == parameter.shape for value in tree_leaves(state))


def carry(optimizer: Optimizer, known: Mapping[Tensor, Mapping[Path, Tensor]] | None = None) -> None:
    """Brings all state of an optimizer to its parameters' present shapes, and new parameters into its groups.

    Args:
        optimizer: is changed.
        known: what :func:`first_entries` gave for some parameters already.

    Raises:
        OptimizerError: some state cannot follow; none has changed.
    """
    _forget_loaded(optimizer)
    regroup(optimizer)
    behind = {parameter: log for parameter, log in logged(optimizer) if log.is_behind(optimizer)}
    first = dict(known or {})
    first |= first_entries(optimizer, {p: p.detach() for p in behind if p not in first})
    states = {
        parameter: _brought(optimizer, parameter, log, first.get(parameter, {}))
        for parameter, log in behind.items()
        if parameter in optimizer.state
    }
    optimizer.state.update(states)
    settle(optimizer, behind)
    _groups[optimizer] = optimizer.param_groups
    for _, log in logged(optimizer):
        log.informed.add(ref(optimizer, log.informed.discard))


def settle(optimizer: Optimizer, parameters: Iterable[Tensor]) -> None:
    """Notes that the state of these parameters is that of their present versions."""
    for parameter in parameters:
        log = log_of(parameter)
        if log is not None:
            log.versions[optimizer] = log.version


def first_entries(optimizer: Optimizer, growing: Mapping[Tensor, Tensor]) -> dict[Tensor, Mapping[Path, Tensor]]:
    """What the state of parameters starts with where they are new.

    Args:
        optimizer: is not changed.
        growing: parameter -> it, grown. Others than the optimizer's do not count.

    Returns:
        Parameter -> place in its state -> a tensor of the grown shape; where there is none, state does not grow.

    Raises:
        OptimizerError: some state cannot follow.
    """
    mine = {id(p) for p in parameters_of(optimizer)}
    grown = {id(parameter): value for parameter, value in growing.items() if id(parameter) in mine}
    if not grown:
        return {}
    _refuse_tensors_of_its_own(optimizer, growing)
    first: dict[Tensor, Mapping[Path, Tensor]] = {}
    for parameter in parameters_of(optimizer):
        grows = id(parameter) in grown
        entries = _first_entries(optimizer, parameter, grown[id(parameter)] if grows else parameter.detach(), grows)
        if grows:
            first[parameter] = entries
    return first


def _first_entries(optimizer: Optimizer, parameter: Tensor, grown: Tensor, grows: bool) -> dict[Path, Tensor]:
    state = optimizer.state.get(parameter, {})
    for path in objects_in(state) if grows else ():
        raise _unknown(optimizer, path, ", an object with tensors in it,", parameter, None)
    shaped = {path: value for path, value in tensors_in(state).items() if value.ndim and value.numel()}
    if (not grows and all(value.shape == grown.shape for value in shaped.values())) or not shaped:
        return {}
    learnt, entries = first_state(optimizer, parameter, grown, shaped, wide=grows), dict[Path, Tensor]()
    for path, value in shaped.items():
        first = learnt.tensors.get(path)
        if first is not None and _has_been(parameter, value) and _is_plain(value):
            entries[path] = first
        elif learnt.others.get(path) != value.shape or not _is_plain(value):
            failure = learnt.failure if first is None else None
            raise _unknown(optimizer, path, f" of shape {tuple(value.shape)}", parameter, failure) from failure
    return entries


def _unknown(
    optimizer: Optimizer, path: Path, kind: str, parameter: Tensor, failure: Exception | None
) -> OptimizerError:
    tried = "" if failure is None else f" (its step on a new parameter fails: {first_line(failure)})"
    return OptimizerError(
        f"{type(optimizer).__name__} keeps {path[0].key!r}{kind} for a parameter of shape {tuple(parameter.shape)}: "
        f"nothing says where new entries belong, or what they start with{tried}. Make a new optimizer after the "
        "growth, or use one whose state has the parameter's shape (SGD, Adam, AdamW, ...)."
    )


def _is_plain(value: Tensor) -> bool:
    """Whether each entry of state stands for itself; not so where it is quantised or spread over devices."""
    return type(value) in (Tensor, nn.Parameter) and (value.dtype is torch.bool or value.dtype.itemsize > 1)


def _has_been(parameter: Tensor, value: Tensor) -> bool:
    """Whether state has the shape of the parameter as it is or once was."""
    log = log_of(parameter)
    past = log is not None and bool(log.resizes) and log.start(value.shape) is not None
    return past or value.shape == parameter.shape


def _refuse_tensors_of_its_own(optimizer: Optimizer, growing: Mapping[Tensor, Tensor]) -> None:
    """Tensors beside the state of parameters do not say whose they are."""
    others = {name: value for name, value in vars(optimizer).items() if name not in ("state", "param_groups")}
    others |= {str(key): value for key, value in optimizer.state.items() if not isinstance(key, Tensor)}
    for group in optimizer.param_groups:
        others |= {name: value for name, value in group.items() if name != "params"}
    for name, value in others.items():
        tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.ndim]
        own = [tensor for tensor in tensors if not isinstance(tensor, nn.Parameter)]
        if any(_has_been(parameter, tensor) for tensor in own for parameter in growing):
            raise OptimizerError(
                f"{type(optimizer).__name__} keeps tensors in {name!r} of the shape of a parameter that grows: nothing "
                "says which of its parameters they are for. Make a new optimizer after the growth, or use one that "
                "keeps them in its state."
            )


def check_optimizer(optimizer: Optimizers, model: nn.Module) -> None:
    """Checks that something is an optimizer of a model, several of them, or None.

    Args:
        optimizer: what was given.
        model: whose parameters each should hold.

    Raises:
        OptimizerError: one is no optimizer, or holds none of them.
    """
    several = optimizer if isinstance(optimizer, (list, tuple)) else [] if optimizer is None else [optimizer]
    known = {id(parameter) for parameter in model.parameters()}
    for one in several:
        if not isinstance(one, Optimizer):
            raise OptimizerError(
                f"optimizer is a {type(one).__name__}; give a torch.optim.Optimizer or a list of them, or leave it "
                "out: then its state is brought along at its next step."
            )
        if not any(id(parameter) in known for parameter in parameters_of(one)):
            raise OptimizerError(
                f"the {type(one).__name__} holds none of the parameters of the {type(model).__name__}; give the "
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


def _brought(optimizer: Optimizer, parameter: Tensor, log: GrowthLog, first: Mapping[Path, Tensor]) -> dict[str, Any]:
    """State of a version of a parameter, brought to the present one."""
    version = log.versions.get(optimizer)

    def follow(path: Path, value: Any) -> Any:
        return log.follow(value, version, first[path]) if path in first else value

    return dict(tree_map_with_path(follow, dict(optimizer.state[parameter])))
