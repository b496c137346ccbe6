"""The only writer: it applies a change all or nothing, and undoes it bit for bit.

Every parameter keeps its identity, so that optimizers, schedulers, hooks and losses still alive go on.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from dagrow._model_state import ModelState
from dagrow.errors import GrowthError
from dagrow.graph import Dag
from dagrow.surgery._draft import Change, pad
from dagrow.surgery._function_check import difference
from dagrow.surgery._new_layers import attach, attached, detach
from dagrow.surgery._optimizers import (
    adopt,
    carry,
    log_added,
    log_growth,
    log_removed,
    log_undo,
    refuse,
    refuse_new,
    regroup,
    settle,
)
from dagrow.tracing import tensor_at

T = TypeVar("T")
Attributes = Mapping[str, Mapping[str, Any]]  #: module -> its attributes that state widths


@contextlib.contextmanager
def preview(dag: Dag, change: Change) -> Iterator[None]:
    """Inside, the model has the forward, the branches and the stated widths of the grown network."""
    model, found, before = dag.model, type(dag.model), _stated(dag.model, change.attributes)
    grown = change.kind(dag.model)
    try:
        with attached(model, change.branches):
            model.__class__ = grown
            _state(model, change.attributes)
            yield
    finally:
        model.__class__ = found
        try:
            _state(model, before)
        except BaseException:  # an interrupt while cleaning up: finish the cleaning first
            _state(model, before)
            raise


def _stated(model: nn.Module, attributes: Attributes) -> Attributes:
    """The attributes that state widths, as they are."""
    return {
        name: {key: getattr(model.get_submodule(name), key) for key in stated} for name, stated in attributes.items()
    }


def _state(model: nn.Module, attributes: Attributes) -> None:
    for name, stated in attributes.items():
        for key, size in stated.items():
            setattr(model.get_submodule(name), key, size)


class Overwritten:
    """What a change overwrites in a model, as it was: old storages, not copies, where a tensor gets a new shape."""

    def __init__(self, model: nn.Module, change: Change) -> None:
        self.model, self.change = model, change
        names = [name for name in dict.fromkeys((*change.landings, *change.slope)) if name not in change.added]
        self.tensors = {name: tensor_at(model, name) for name in names}
        self.storages = {name: tensor.detach() for name, tensor in self.tensors.items()}
        self.values = {
            name: tensor.detach().clone() for name, tensor in self.tensors.items() if name not in change.landings
        }
        self.gradients = {name: tensor.grad for name, tensor in self.tensors.items()}
        self.added: list[Tensor] = []  #: parameters of new layers
        self.attributes = _stated(model, change.attributes)
        self.kind = type(model)

    def restore(self) -> None:
        """Puts everything back. May run twice."""
        with torch.no_grad():
            for name, tensor in self.tensors.items():
                if name in self.change.landings:
                    _resize(tensor, self.storages[name])
                elif not torch.equal(tensor, self.values[name]):
                    tensor.copy_(self.values[name])
                tensor.grad = self.gradients[name]
        _state(self.model, self.attributes)
        self.model.__class__ = self.kind
        for parameter in self.added:
            log_removed(parameter)
        detach(self.model, self.change.branches)
        for name, landings in self.change.landings.items():
            log_undo(self.tensors[name], landings)

    def write(self, tensors: Mapping[str, Tensor], kind: type[nn.Module]) -> None:
        """Puts grown tensors and their forward in place; gradients get zeros where tensors are new."""
        self._add(tensors)
        with torch.no_grad():
            for name, value in tensors.items():
                if name in self.change.added:
                    continue
                tensor, landings = self.tensors[name], self.change.landings.get(name)
                if landings is None:
                    tensor.copy_(value)
                    continue
                _resize(tensor, value)
                gradient = self.gradients[name]
                tensor.grad = None if gradient is None else pad(gradient, landings)
                log_growth(tensor, landings)
        _state(self.model, self.change.attributes)
        self.model.__class__ = kind

    def _add(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts new layers in place, each to be optimized with the layer that it is added to."""
        attach(self.model, self.change.branches, copied=True)
        for branch in self.change.branches:
            for name, parameter in self.model.get_submodule(branch.name).named_parameters(branch.name):
                with torch.no_grad():
                    parameter.copy_(tensors.get(name, parameter))
                self.added.append(parameter)
                log_added(parameter, tensor_at(self.model, branch.beside))


def _resize(tensor: Tensor, value: Tensor) -> None:
    """Gives a tensor another storage and shape; it stays the same object."""
    tensor.grad = None
    tensor.set_(value.untyped_storage(), value.storage_offset(), value.shape, value.stride())


def all_or_nothing(work: Callable[[], T], restore: Callable[[], None]) -> T:
    """Does some work, or restores what it found if it does not end, whatever the reason."""
    try:
        return work()
    except BaseException:
        try:
            restore()
        except BaseException:  # an interrupt while cleaning up: finish the cleaning first
            restore()
            raise
        raise


class UndoRecord:
    """Everything that a growth overwrote, as it was."""

    def __init__(self, dag: Dag, change: Change, optimizer: Optimizer | None, kind: type[nn.Module]) -> None:
        self.dag, self.change, self.optimizer = dag, change, optimizer
        self.saved, self.view, self.kind = Overwritten(dag.model, change), dag.view(), kind
        self.stage = dag.applied.stage
        self.receipt: Any = None  #: weak reference to the receipt that can call this
        self.state: dict[Tensor, dict[str, Any]] = {}
        held = {} if optimizer is None else optimizer.state
        for name, tensor in self.saved.tensors.items():
            if tensor in held:
                self.state[tensor] = _kept(held[tensor], name in change.landings)

    def restore(self) -> None:
        """Puts everything back. May run twice."""
        self.saved.restore()
        if self.optimizer is not None:
            regroup(self.optimizer)
            for tensor in self.saved.tensors.values():
                if tensor in self.state:
                    self.optimizer.state[tensor] = _kept(self.state[tensor], False)
                else:
                    self.optimizer.state.pop(tensor, None)
            settle(self.optimizer, [self.saved.tensors[name] for name in self.change.landings])
        self.dag.show(self.view)
        self.dag.applied.stage = self.stage
        if self in self.dag.applied:
            self.dag.applied.remove(self)


def _kept(state: Mapping[str, Any], replaced: bool) -> dict[str, Any]:
    """State to come back to: copied, unless the growth puts another tensor in its place."""

    def kept(value: Any) -> Any:
        return value.clone() if isinstance(value, Tensor) and (value.numel() == 1 or not replaced) else value

    return tree_map(kept, dict(state))


def _unreachable(undo: UndoRecord) -> bool:
    """Whether nobody can undo the growth any more, so that what it overwrote need not be kept."""
    return undo.receipt is not None and undo.receipt() is None


class _DagState:
    """The model and the dag as they were found."""

    def __init__(self, dag: Dag) -> None:
        dag.applied[:] = [None if undo is None or _unreachable(undo) else undo for undo in dag.applied]
        self.dag, self.count = dag, len(dag.applied)
        self.state, self.view = ModelState(dag.model), dag.view()

    def restore(self) -> None:
        """Undoes growths and puts everything else back. May run twice."""
        for undo in reversed(self.dag.applied[self.count :]):
            undo.restore()
        self.dag.show(self.view)
        self.state.restore()


def transaction(dag: Dag, work: Callable[[], T]) -> T:
    """Does some work that may grow the model. If it does not end, the model and the dag are as they were found."""
    return all_or_nothing(work, _DagState(dag).restore)


def apply(dag: Dag, change: Change, gamma: float, optimizer: Optimizer | None = None) -> UndoRecord:
    """Writes a change at an amplitude into the model. All or nothing.

    Raises:
        GrowthError: the model is not the one that was measured, or it depends on its widths in a way that the graph
            does not show, so that it would not be the same function at gamma = 0.
        OptimizerError: the optimizer holds state that cannot follow.
    """
    wrong = difference(dag.model, dag.example_inputs, lambda: grown(dag, change, 0.0))
    if wrong is not None:
        grows = ", ".join((*change.landings, *change.added))
        raise GrowthError(
            f"the model cannot grow {grows}: {wrong.text}, although nothing new is connected yet. Its forward depends "
            "on the width in a way that its graph does not show. Leave this axis out."
        ) from wrong.cause
    tensors = change.tensors(dag.model, gamma)
    kind = change.kind(dag.model)
    undo = UndoRecord(dag, change, optimizer, kind)
    if optimizer is not None:
        refuse(optimizer, [undo.saved.tensors[name] for name in change.landings])
        refuse_new(optimizer, change.added)

    def write() -> None:
        undo.saved.write(tensors, kind)
        if optimizer is not None:
            carry(optimizer)
            adopt(optimizer, undo.saved.added, dag.model.parameters())
        dag.applied.append(undo)
        dag.applied.stage = object()
        dag.retrace()

    all_or_nothing(write, undo.restore)
    return undo


@contextlib.contextmanager
def grown(dag: Dag, change: Change, gamma: float) -> Iterator[None]:
    """Inside, the model is grown in place; the dag still shows what it was."""
    tensors, saved = change.tensors(dag.model, gamma), Overwritten(dag.model, change)
    try:
        saved.write(tensors, change.kind(dag.model))
        yield
    finally:
        try:
            saved.restore()
        except BaseException:  # an interrupt while cleaning up: finish the cleaning first
            saved.restore()
            raise


def widen_copy(change: Change, gamma: float, copy: nn.Module, kind: type[nn.Module]) -> Overwritten:
    """Gives a copy of the model as it was the shapes of the grown one. All or nothing.

    Old entries keep the copy's own values, new ones are those that the growth wrote.

    Raises:
        GrowthError: the copy is not one of the model as it was before the growth.
    """
    _check_copy(change, copy)
    tensors = {}
    for name, landings in change.landings.items():
        old, fresh, slope = tensor_at(copy, name).detach(), change.fresh.get(name), change.slope.get(name)
        if slope is not None:
            fresh = gamma * slope.to(old) + (0 if fresh is None else fresh.to(old))
        tensors[name] = pad(old, landings, fresh)
    tensors |= {name: value + gamma * change.slope.get(name, 0) for name, value in change.added.items()}
    saved = Overwritten(copy, replace(change, slope={}))
    all_or_nothing(lambda: saved.write(tensors, kind if change.written else type(copy)), saved.restore)
    return saved


def _check_copy(change: Change, copy: nn.Module) -> None:
    there = [branch.name for branch in change.branches if branch.name in copy._modules]
    if there:
        raise GrowthError(f"the copy has {', '.join(there)} already; carry each copy along once after each growth.")
    moved = {name: slope.shape for name, slope in change.slope.items() if name not in {*change.added, *change.landings}}
    for name in (*change.landings, *moved, *(branch.beside for branch in change.branches)):
        landings = change.landings.get(name, ())
        try:
            shape = tensor_at(copy, name).shape
        except AttributeError as error:
            raise GrowthError(
                f"a {type(copy).__name__} without {name} is no copy of the grown model; give copy.deepcopy(model), or "
                "AveragedModel(model).module, made before the growth."
            ) from error
        if any(shape[at.dim] != len(at.old) for at in landings) or shape != moved.get(name, shape):
            raise GrowthError(
                f"{name} of the copy has shape {tuple(shape)}, not that of the model before the growth; carry each "
                "copy along once after each growth, in order."
            )
