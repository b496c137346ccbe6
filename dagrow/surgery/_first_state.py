"""What an optimizer keeps of a parameter that it has not moved yet: learnt from a twin of the optimizer.

The twin is of the same class and has the same settings, but one parameter only, which it has never seen. It takes a
step with a gradient of zero, at two different weights. State that is the same both times is a constant, such as the
step size of Rprop; state that follows the weight is a copy of it, such as the average of ASGD.
"""

import copy
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import signature
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten_with_path, tree_leaves

from dagrow._model_state import random_state, restoring
from dagrow.surgery._draft import laid_out

STEPS = 16  #: of the twin, at most: some state comes only with a later step, as the slow weights of Lookahead do
NEAR = 0.25  #: to 0 or 1: a step may already have changed state a little, as by weight decay
_EMPTY = frozenset(("empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided"))

Path = tuple[Any, ...]  #: where a tensor is in the state of a parameter


def tensors_in(state: object) -> dict[Path, Tensor]:
    """The tensors in a nest of containers by their places."""
    return {path: leaf for path, leaf in tree_flatten_with_path(state)[0] if isinstance(leaf, Tensor)}


def objects_in(state: object) -> list[Path]:
    """The places of objects that are no tensors, but have some."""
    leaves = tree_flatten_with_path(state)[0]
    return [path for path, leaf in leaves if not isinstance(leaf, Tensor) and tensors_in(getattr(leaf, "__dict__", {}))]


@dataclass(frozen=True, eq=False)
class FirstState:
    """What an optimizer keeps of a new parameter.

    Attributes:
        tensors: of its shape, by their places in its state.
        others: the shapes of tensors that do not have its shape.
        failure: what the twin's step raised, if it did.
        constructed: whether it only steps with what its constructor puts down.
    """

    tensors: Mapping[Path, Tensor]
    others: Mapping[Path, torch.Size]
    failure: Exception | None
    constructed: bool = False


def first_state(
    optimizer: Optimizer, beside: Tensor, value: Tensor, wanted: Iterable[Path] = (), *, wide: bool = False
) -> FirstState:
    """What an optimizer would keep of a parameter if it were new.

    Args:
        optimizer: is not changed.
        beside: one of its parameters, of the group that the new one would be in.
        value: of the new parameter.
        wanted: places in the state that are asked for; steps are taken until they are there.
        wide: whether the twin's parameter is larger where a size is 1, so that no state has its shape by accident.

    Returns:
        What was learnt, perhaps not all that is wanted.
    """
    wanted, learnt = set(wanted), list[FirstState]()
    held = [name for name, attribute in vars(optimizer).items() if any(map(_is_module, tree_leaves(attribute)))]
    if held:  # which a step of the twin would reach
        return FirstState({}, {}, TypeError(f"it holds a module, as {held[0]!r}, and is not tried"))
    generators = random_state()

    def restore() -> None:
        for setter, state in generators:
            setter(state)

    ways = ((torch.zeros_like, False), (_no_rows, False), (torch.zeros_like, True))
    with restoring(restore), torch.inference_mode(False):
        for gradient, constructed in ways:
            learn = partial(_learn, optimizer, beside, value.detach(), wanted, gradient, constructed)
            learnt.append(learn([max(size, 2) for size in value.shape] if wide else value.shape))
            if learnt[-1].failure is None or (wanted and wanted <= {*learnt[-1].tensors, *learnt[-1].others}):
                return learnt[-1]
    return learnt[0]


def constructed_state(optimizer: Optimizer, beside: Tensor, parameter: Tensor) -> dict[str, Any]:
    """What an optimizer of this kind puts down of a parameter when it is made: nothing, for most."""
    twin = _twin(optimizer, beside, parameter)
    known = {**vars(twin), **(_group_of(twin, parameter) or {}), "params": [parameter]}
    names = [name for name in signature(type(optimizer)).parameters if name in known]
    try:
        return dict(type(optimizer)(**{name: known[name] for name in names}).state.get(parameter, {}))
    except Exception:  # its constructor may take anything
        return {}


def _no_rows(weight: Tensor) -> Tensor:
    """A sparse gradient of zero."""
    places = torch.zeros(1, 0, dtype=torch.long, device=weight.device)
    return torch.sparse_coo_tensor(places, weight.new_zeros(0, *weight.shape[1:]), weight.shape, check_invariants=False)


def _learn(
    optimizer: Optimizer,
    beside: Tensor,
    value: Tensor,
    wanted: set[Path],
    gradient: Callable[[Tensor], Tensor],
    constructed: bool,
    shape: Sequence[int],
) -> FirstState:
    zero = laid_out(value, shape).zero_()
    numbers = torch.arange(zero.numel(), device=value.device).reshape(zero.shape) % 7 - 3.5  # none of them is 0
    weights = zero, torch.empty_like(zero).copy_(numbers)
    corner = tuple(slice(size) for size in value.shape)
    at_zero, at_weight = (_Trial(optimizer, beside, w, wanted, gradient, constructed) for w in weights)
    tensors = {}
    for path, after in at_zero.after.items():
        if after.shape != zero.shape:
            continue
        follows = _share(at_weight.after.get(path), after, weights[1])
        first, other = at_zero.first.get(path), at_weight.first.get(path)
        if abs(follows - 1) < NEAR:
            tensors[path] = value.to(after.dtype)
        elif abs(follows) >= NEAR:
            continue
        elif first is not None and other is not None and torch.equal(first, other):  # so that no NaN is in there
            tensors[path] = first[corner]
        elif bool(after.isfinite().all()):
            tensors[path] = after[corner]
    others = {path: after.shape for path, after in at_zero.after.items() if after.shape != zero.shape}
    return FirstState(tensors, others, at_zero.failure, constructed)


def _share(at_weight: Tensor | None, at_zero: Tensor, weight: Tensor) -> float:
    """How much of the weight is in state of its shape: 1 in a copy, 0 in a constant."""
    if at_weight is None or not at_weight.shape == at_zero.shape == weight.shape:
        return float("nan")
    kind = torch.complex128 if weight.is_complex() else torch.float64
    w, difference = weight.to(kind), at_weight.to(kind) - at_zero.to(kind)
    return float((difference * w.conj()).sum().real / w.abs().square().sum())


class _Trial:
    """A twin's steps from one weight.

    Attributes:
        after: its state after the steps.
        first: what was put there first; NaN where that was memory not yet written.
        failure: what it raised, if it did.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        beside: Tensor,
        weight: Tensor,
        wanted: set[Path],
        gradient: Callable[[Tensor], Tensor],
        constructed: bool,
    ) -> None:
        parameter = nn.Parameter(weight.clone(), requires_grad=False)
        twin, self.failure = _twin(optimizer, beside, parameter), None
        if constructed:
            twin.state[parameter].update(constructed_state(optimizer, beside, parameter))
        try:
            if callable(getattr(twin, "train", None)):  # some have modes, and step in one of them only
                twin.train()  # type: ignore[attr-defined]
            for _ in range(STEPS):
                with _UnwrittenIsNaN():
                    _step(twin, parameter, gradient)
                if wanted <= tensors_in(dict(twin.state[parameter])).keys():
                    break
        except Exception as error:  # the step may do anything
            self.failure = error
        state = twin.state[parameter]
        self.after = {path: tensor.detach() for path, tensor in tensors_in(dict(state)).items()}
        self.first = state.first if isinstance(state, _FirstValues) else {}


def _step(twin: Optimizer, parameter: nn.Parameter, gradient: Callable[[Tensor], Tensor]) -> None:
    """A step with a gradient of zero, past the hooks on all optimizers."""

    def closure() -> Tensor:
        parameter.grad = gradient(parameter.detach())
        return parameter.new_zeros(())

    closure()
    step: Any = type(twin).step
    while getattr(step, "hooked", False) and hasattr(step, "__wrapped__"):
        step = step.__wrapped__
    if "closure" in signature(step).parameters:
        step(twin, closure=closure)
    else:
        step(twin)


class _FirstValues(dict[Any, Any]):
    """The state of a parameter, which keeps what was put there first."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.first: dict[Path, Tensor] = {}
        self.update(*args, **kwargs)

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, value)
        for path, tensor in tensors_in({key: value}).items():
            self.first.setdefault(path, tensor.detach().clone())

    def setdefault(self, key: Any, default: Any = None) -> Any:
        if key not in self:
            self[key] = default
        return self[key]

    def update(self, *args: Any, **kwargs: Any) -> None:
        for key, value in dict(*args, **kwargs).items():
            self[key] = value


class _UnwrittenIsNaN(TorchDispatchMode):
    """Inside, new memory holds NaN until something is written there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in _EMPTY and output.is_floating_point():
            output.fill_(float("nan"))
        return output


def _is_module(value: object) -> bool:
    return isinstance(value, nn.Module)


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def _group_of(optimizer: Optimizer, parameter: Tensor) -> dict[str, Any] | None:
    groups = (group for group in optimizer.param_groups if any(p is parameter for p in group["params"]))
    return next(groups, None)


def _twin(optimizer: Optimizer, beside: Tensor, parameter: Tensor) -> Optimizer:
    """An optimizer like this one, of one parameter that it has not seen. It writes to nothing that others hold."""
    copies: dict[int, Any] = {id(beside): parameter}
    for one in _within(optimizer):
        group = _group_of(one, beside)
        if group is not None and id(group) not in copies:
            copies[id(group)] = {}
            copies[id(group)].update({key: _copied(value, copies) for key, value in group.items() if key != "params"})
            copies[id(group)]["params"] = [parameter]
        copies[id(one.param_groups)] = [] if group is None else [copies[id(group)]]
        if id(one.state) not in copies:
            others = {key: _copied(value, copies) for key, value in one.state.items() if not _is_tensor(key)}
            copies[id(one.state)] = defaultdict(_FirstValues, others)
    twin: Optimizer = _copied(optimizer, copies)
    return twin


def _within(optimizer: Optimizer) -> list[Optimizer]:
    """An optimizer and those that it works with."""
    found = [optimizer]
    for one in found:
        inner = (value for value in vars(one).values() if isinstance(value, Optimizer))
        found += [other for other in inner if not any(other is known for known in found)]
    return found


def _copied(value: Any, copies: dict[int, Any]) -> Any:
    """What a step may write to is copied: tensors, containers, optimizers. All else is shared."""
    if id(value) in copies:
        return copies[id(value)]
    if isinstance(value, Optimizer):
        copies[id(value)] = twin = object.__new__(type(value))
        for name, attribute in vars(value).items():
            if name.startswith("_optimizer_"):  # hooks
                vars(twin)[name] = OrderedDict()
            elif name != "step":  # a scheduler puts one there that steps the original
                vars(twin)[name] = _copied(attribute, copies)
        return twin
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, MethodType) and id(value.__self__) in copies:
        return MethodType(value.__func__, copies[id(value.__self__)])
    if type(value) in (dict, OrderedDict, defaultdict):
        copied = copy.copy(value)
        copied.clear()
        keys = (key for key in value if _is_known(key, copies))
        copied.update({copies.get(id(key), key): _copied(value[key], copies) for key in keys})
        return copied
    if type(value) in (list, tuple, set, deque):
        return type(value)(_copied(item, copies) for item in value if _is_known(item, copies))
    return value


def _is_known(value: object, copies: dict[int, Any]) -> bool:
    """Not so for parameters that the twin has not got."""
    return not isinstance(value, nn.Parameter) or id(value) in copies
