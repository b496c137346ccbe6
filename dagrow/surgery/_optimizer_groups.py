"""New parameters of new layers, in the groups of optimizers.

They are optimized along with one that was there: they join its group, and leave it again when the growth is undone.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any
from warnings import warn
from weakref import ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dagrow.errors import OptimizerError
from dagrow.surgery._first_state import FirstState, constructed_state, first_state
from dagrow.surgery._growth_log import GrowthLog, log_of, opened_log


def log_added(parameter: Tensor, beside: Tensor, model: nn.Module) -> None:
    """Notes that a parameter of a model is new, and which one it is optimized with."""
    log, other = opened_log(parameter), opened_log(beside)
    _forget(parameter, log)
    log.beside, log.model = ref(beside), ref(model)
    other.new.append(ref(parameter))
    other.informed.clear()


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


def parameters_of(optimizer: Optimizer) -> Iterator[Tensor]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def logged(optimizer: Optimizer) -> Iterator[tuple[Tensor, GrowthLog]]:
    """The optimizer's parameters to which something has happened."""
    for parameter in parameters_of(optimizer):
        log = log_of(parameter)
        if log is not None:
            yield parameter, log


def adopt(optimizers: Sequence[Optimizer], new: Iterable[Tensor], model: nn.Module) -> None:
    """New parameters that would be optimized with none of the optimizers', as beside a frozen layer, join one of them.

    They join the first of the model's parameters that an optimizer has which takes them. No other optimizer takes them
    then.
    """
    for parameter in new:
        if not any(_holds(one, parameter) for one in optimizers):
            beside = _first_beside(optimizers, model, parameter)
            if beside is not None:
                log_added(parameter, beside, model)
    for one in optimizers:
        regroup(one)


def _first_beside(optimizers: Iterable[Optimizer], model: nn.Module, parameter: Tensor) -> Tensor | None:
    """The first of a model's parameters that an optimizer has which takes another one beside it."""
    for one in optimizers:
        beside = next((p for p in model.parameters() if p is not parameter and _holds(one, p)), None)
        if beside is not None and _learnt(one, beside, parameter) is not None:
            return beside
    return None


def regroup(optimizer: Optimizer) -> None:
    """New parameters join the group of those that they are optimized with; those that were taken out leave."""
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    for parameter, beside in new_beside(parameters_of(optimizer)):
        group = groups.get(id(beside))
        if id(parameter) in groups or group is None:
            continue
        learnt = _learnt(optimizer, beside, parameter)
        if learnt is None:
            warn(_refusal(optimizer, [f"of shape {tuple(parameter.shape)}"]), stacklevel=2)
            continue
        groups[id(parameter)] = group
        _join(group, parameter, beside)
        if learnt.constructed:
            optimizer.state[parameter] = constructed_state(optimizer, beside, parameter)
    for parameter in [parameter for parameter, log in logged(optimizer) if log.removed]:
        group = groups[id(parameter)]
        at = next(index for index, other in enumerate(group["params"]) if other is parameter)
        for entries in (group["params"], *([group["param_names"]] if "param_names" in group else ())):
            del entries[at]
        optimizer.state.pop(parameter, None)


def _join(group: dict[str, Any], parameter: Tensor, beside: Tensor) -> None:
    """A parameter gets the place in a group that it has in its model: files of state know it by its place."""
    log, present = opened_log(parameter), {id(p): index for index, p in enumerate(group["params"])}
    model = None if log.model is None else log.model()
    named = [] if model is None else list(model.named_parameters())
    order = [id(p) for _, p in named]
    before = order[: order.index(id(parameter))] if id(parameter) in order else list(present)
    at = 1 + max((present[p] for p in before if p in present), default=len(present) - 1)
    group["params"].insert(at, parameter)
    if "param_names" in group:
        names = {id(p): name for name, p in named}
        name, other = names.get(id(parameter), ""), names.get(id(beside), "")
        group["param_names"].insert(at, group["param_names"][present[id(beside)]].removesuffix(other) + name)


def _learnt(optimizer: Optimizer, beside: Tensor, parameter: Tensor) -> FirstState | None:
    """What an optimizer keeps of a parameter that it did not have from the start; None if it cannot step on it."""
    if isinstance(optimizer, torch.optim.LBFGS):
        return None
    learnt = first_state(optimizer, beside, parameter)
    return learnt if learnt.failure is None else None


def refuse_new(optimizers: Sequence[Optimizer], new: Mapping[str, Tensor], model: nn.Module) -> None:
    """Checks that one of the optimizers can take each new parameter.

    Raises:
        OptimizerError: none takes some of them.
    """
    refused = [name for name, p in new.items() if _first_beside(optimizers, model, p) is None]
    if refused and optimizers:
        raise OptimizerError(_refusal(optimizers[0], refused))


def _holds(optimizer: Optimizer, parameter: Tensor) -> bool:
    return any(p is parameter for p in parameters_of(optimizer))


def _refusal(optimizer: Optimizer, names: Sequence[str]) -> str:
    return (
        f"{type(optimizer).__name__} cannot take the new parameters {', '.join(names)}: it keeps one state for all "
        "parameters together, or takes matrices only. Leave optimizer= out and give them to another optimizer after "
        "the growth, or make a new one."
    )
