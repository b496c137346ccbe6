"""The only writer: it applies a change all or nothing, and undoes it bit for bit.

Every parameter keeps its identity, so that optimizers, schedulers, hooks and losses still alive go on.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from dagrow._model_state import ModelState, all_or_nothing, replaced, restoring
from dagrow.axes import IndexMap
from dagrow.errors import GrowthError
from dagrow.graph import Dag, check_owners
from dagrow.surgery._draft import Change, pad
from dagrow.surgery._function_check import difference
from dagrow.surgery._new_layers import NewPath, attach, detach
from dagrow.surgery._optimizer_groups import adopt, log_added, log_removed, refuse_new, regroup
from dagrow.surgery._optimizers import (
    Optimizers,
    carry,
    first_entries,
    log_growth,
    log_undo,
    remember,
    sequence_of,
    settle,
    watch_steps,
)
from dagrow.tracing import tensor_at

T = TypeVar("T")


@contextlib.contextmanager
def preview(dag: Dag, change: Change, tensors: Mapping[str, Tensor] | None = None) -> Iterator[None]:
    """Inside, the model has the forward, the new layers and the stated widths of the grown network.

    Args:
        dag: of the model.
        change: what the growth does to it.
        tensors: stand where the model's own tensors of these names do; nothing is written into those.
    """
    structure, grown_class = _Structure(dag.model, change), change.kind(dag.model)
    with restoring(structure.restore):
        attach(dag.model, change.new_paths, copied=False)
        structure.write(grown_class)
        with replaced(dag.model, tensors or {}):
            yield


class _Structure:
    """Of what a change overwrites in a model all but tensors, as it was: its class, sizes, layers."""

    def __init__(self, model: nn.Module, change: Change) -> None:
        self.model, self.change, self.kind = model, change, type(model)
        self.attributes = {
            name: {key: getattr(model.get_submodule(name), key) for key in sizes}
            for name, sizes in change.attributes.items()
        }

    def write(self, kind: type[nn.Module]) -> None:
        """States the widths of the grown network, and puts its forward in place."""
        _set(self.model, self.change.attributes)
        self.model.__class__ = kind

    def restore(self) -> None:
        """Puts everything back, without new layers. May run twice."""
        self.model.__class__ = self.kind
        _set(self.model, self.attributes)
        detach(self.model, self.change.new_paths)


def _set(model: nn.Module, attributes: Mapping[str, Mapping[str, object]]) -> None:
    for name, sizes in attributes.items():
        for key, size in sizes.items():
            setattr(model.get_submodule(name), key, size)


@dataclass(frozen=True, eq=False)
class _OldTensor:
    """A parameter or buffer as it was.

    Attributes:
        values: its old storage where it gets a new shape, else a copy.
        index_maps: where its entries go, along the dimensions that grow.
    """

    tensor: Tensor
    values: Tensor
    gradient: Tensor | None
    index_maps: tuple[IndexMap, ...]

    @staticmethod
    def of(tensor: Tensor, index_maps: tuple[IndexMap, ...]) -> "_OldTensor":
        values = tensor.detach() if index_maps else tensor.detach().clone()
        return _OldTensor(tensor, values, tensor.grad, index_maps)

    def write(self, values: Tensor) -> None:
        """Other values, perhaps of a grown shape; then the gradient gets zeros where the tensor is new."""
        if not self.index_maps:
            self.tensor.copy_(values)
            return
        _resize(self.tensor, values)
        self.tensor.grad = None if self.gradient is None else pad(self.gradient, self.index_maps)
        log_growth(self.tensor, self.index_maps)

    def restore(self) -> None:
        if self.index_maps:
            _resize(self.tensor, self.values)
        elif not torch.equal(self.tensor, self.values):
            self.tensor.copy_(self.values)
        self.tensor.grad = self.gradient


def _resize(tensor: Tensor, values: Tensor) -> None:
    """Gives a tensor another storage and shape; it stays the same object, in the same kind of memory."""
    tensor.grad = None
    if tensor.device.type == "cpu" and tensor.is_shared():
        values = values.share_memory_()
    elif tensor.is_pinned():
        values = values.pin_memory()
    tensor.set_(values.untyped_storage(), values.storage_offset(), values.shape, values.stride())


class Overwritten:
    """What a change overwrites in a model, as it was."""

    def __init__(self, model: nn.Module, change: Change) -> None:
        self.structure = _Structure(model, change)
        self.tensors = {
            name: _OldTensor.of(tensor_at(model, name), change.index_maps.get(name, ()))
            for name in change.names
            if name not in change.added
        }
        self.added: list[Tensor] = []  #: parameters of new layers

    def write(self, tensors: Mapping[str, Tensor], kind: type[nn.Module]) -> None:
        """Puts grown tensors, new layers and the forward in place."""
        watch_steps()
        self._add(tensors)
        with torch.no_grad():
            for name, old in self.tensors.items():
                old.write(tensors[name])
        self.structure.write(kind)

    def _add(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts new layers in place, each to be optimized with the layer that it is added to."""
        model, new_paths = self.structure.model, self.structure.change.new_paths
        attach(model, new_paths, copied=True)
        for path in new_paths:
            added = model.get_submodule(path.name).to(tensor_at(model, path.beside))
            for name, parameter in added.named_parameters(path.name):
                with torch.no_grad():
                    parameter.copy_(tensors.get(name, parameter))
                self.added.append(parameter)
                log_added(parameter, _beside(model, path, name, parameter), model)

    def restore(self) -> None:
        """Puts everything back. May run twice."""
        with torch.no_grad():
            for old in self.tensors.values():
                old.restore()
        self.structure.restore()
        for parameter in self.added:
            log_removed(parameter)
        for old in self.growing:
            log_undo(old.tensor, old.index_maps)

    @property
    def growing(self) -> list[_OldTensor]:
        """Those that get a new shape."""
        return [old for old in self.tensors.values() if old.index_maps]


def _beside(model: nn.Module, path: NewPath, name: str, parameter: Tensor) -> Tensor:
    """What a new parameter is optimized with: a weight with that of the layer it is added to, a bias with a bias."""
    weight = tensor_at(model, path.beside)
    if parameter.ndim > 1:
        return weight
    owner, kind = path.beside.rpartition(".")[0], name.rpartition(".")[2]
    named = [(at, p) for at, p in model.named_parameters() if not at.startswith(f"{path.name}.")]
    place = next(index for index, (_, p) in enumerate(named) if p is weight)
    alike = [
        (at.rpartition(".")[0] != owner, abs(index - place), index)
        for index, (at, p) in enumerate(named)
        if p.ndim == parameter.ndim and p.requires_grad and at.rpartition(".")[2] == kind
    ]
    return named[min(alike)[2]][1] if alike else weight


class UndoRecord:
    """Everything that a growth overwrote, as it was."""

    def __init__(self, dag: Dag, change: Change, optimizer: Optimizers, kind: type[nn.Module]) -> None:
        self.dag, self.view, self.optimizers, self.kind = dag, dag.view, sequence_of(optimizer), kind
        self.overwritten = Overwritten(dag.model, change)
        #: of each optimizer its state of what was overwritten
        self.states: list[dict[Tensor, dict[str, Any]]] = [
            {
                old.tensor: _copied(optimizer.state[old.tensor], replaced=bool(old.index_maps))
                for old in self.overwritten.tensors.values()
                if old.tensor in optimizer.state
            }
            for optimizer in self.optimizers
        ]

    @torch.inference_mode(False)
    def restore(self) -> None:
        """Puts everything back. May run twice."""
        self.overwritten.restore()
        for optimizer, state in zip(self.optimizers, self.states, strict=True):
            regroup(optimizer)
            for old in self.overwritten.tensors.values():
                if old.tensor in state:
                    optimizer.state[old.tensor] = _copied(state[old.tensor], replaced=False)
                else:
                    optimizer.state.pop(old.tensor, None)
            settle(optimizer, [old.tensor for old in self.overwritten.growing])
        self.dag.remove_growth(self, self.view)


def _copied(state: Mapping[str, Any], *, replaced: bool) -> dict[str, Any]:
    """State to come back to: copied, unless the growth puts another tensor in its place."""

    def copied(value: Any) -> Any:
        return value.clone() if isinstance(value, Tensor) and (value.numel() == 1 or not replaced) else value

    return tree_map(copied, dict(state))


class _Transaction:
    """The model and the dag as they were found, and what undoes the growths since."""

    def __init__(self, dag: Dag) -> None:
        self.dag, self.view, self.outer = dag, dag.view, dag.undos
        self.undos: list[UndoRecord] = []
        self.state = ModelState(dag.model)

    def restore(self) -> None:
        """Undoes growths and puts everything else back. May run twice."""
        for undo in reversed(self.undos):
            undo.restore()
        self.dag.view, self.dag.undos = self.view, self.outer
        self.state.restore()


def transaction(dag: Dag, work: Callable[[], T]) -> T:
    """Does some work that may grow the model. If it does not end, the model and the dag are as they were found.

    Args:
        dag: of the model.
        work: may apply growths through the dag, and nothing else that lasts.

    Returns:
        What the work gives.
    """
    opened = _Transaction(dag)
    with all_or_nothing(opened.restore):
        dag.undos = opened.undos
        result = work()
        dag.undos = opened.outer
        if opened.outer is not None:
            opened.outer.extend(opened.undos)
    return result


@torch.inference_mode(False)
def apply(dag: Dag, change: Change, gamma: float, optimizer: Optimizers = None) -> UndoRecord:
    """Writes a change at an amplitude into the model. All or nothing.

    Args:
        dag: of the model.
        change: what is written; of units that fade out, the model without them, at amplitude 1.
        gamma: the amplitude.
        optimizer: one or several, whose state is brought along.

    Returns:
        What undoes it.

    Raises:
        GrowthError: the model is not the one that was measured, or it depends on its widths in a way that the graph
            does not show, so that it would not be the same function at gamma = 0, or where units went that nothing
            read; or a wrapper is bound to it.
        OptimizerError: the optimizer holds state that cannot follow.
    """
    check_owners(dag.model)
    _check_function(dag, change)
    change = change.final
    kind, tensors = change.kind(dag.model), change.tensors(dag.model, gamma)
    undo = UndoRecord(dag, change, optimizer, kind)
    growing = {old.tensor: tensors[name] for name, old in undo.overwritten.tensors.items() if old.index_maps}
    first = [first_entries(one, growing) for one in undo.optimizers]
    refuse_new(undo.optimizers, change.added, dag.model)
    losing = [
        old.tensor for old in undo.overwritten.growing if any(len(at.kept) < len(at.old) for at in old.index_maps)
    ]
    if losing:
        remember(losing)
    with all_or_nothing(undo.restore):
        undo.overwritten.write(tensors, kind)
        for one, entries in zip(undo.optimizers, first, strict=True):
            carry(one, entries)
        adopt(undo.optimizers, undo.overwritten.added, dag.model)
        dag.add_growth(undo)
    return undo


def _check_function(dag: Dag, change: Change) -> None:
    """Raises GrowthError unless the example shows the same function, what is new unconnected, what goes unread."""
    before: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    final = change.final
    if final is change:
        how, why, tensors = "grow", "nothing new is connected yet", change.tensors(dag.model, 0.0)
    else:
        how, why, tensors = "lose entries of", "nothing reads these any more", final.tensors(dag.model, 1.0)
        before = preview(dag, change, change.tensors(dag.model, 1.0))
    with before:
        changed = difference(dag.model, (dag.example_inputs, *dag.also), lambda: _grown(dag.model, final, tensors))
    if changed is not None:
        names = ", ".join((*final.index_maps, *final.added))
        raise GrowthError(
            f"the model cannot {how} {names}: {changed.text}, although {why}. Its forward depends on the width in a "
            "way that its graph does not show. Leave this axis out."
        ) from changed.cause


def grown(dag: Dag, change: Change, gamma: float) -> contextlib.AbstractContextManager[None]:
    """Inside, the model is grown in place; the dag still shows what it was.

    Args:
        dag: of the model.
        change: what the growth does to it.
        gamma: the amplitude.

    Returns:
        A context manager that leaves the model as it was found.
    """
    return _grown(dag.model, change.final, change.final.tensors(dag.model, gamma))


@contextlib.contextmanager
def _grown(model: nn.Module, change: Change, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    overwritten, kind = Overwritten(model, change), change.kind(model)
    with restoring(overwritten.restore):
        overwritten.write(tensors, kind)
        yield


@torch.inference_mode(False)
def widen_copy(change: Change, gamma: float, copy: nn.Module, kind: type[nn.Module]) -> Overwritten:
    """Gives a copy of the model as it was the shapes of the grown one. All or nothing.

    Old entries keep the copy's own values, moved as the growth moved those of the model; new ones are those that the
    growth wrote.

    Returns:
        What puts the copy back.

    Raises:
        GrowthError: the copy is not one of the model as it was before the growth.
    """
    _check_copy(change, copy)
    tensors, trained = change.tensors(copy, gamma), any(parameter.requires_grad for parameter in copy.parameters())
    overwritten = Overwritten(copy, change)
    with all_or_nothing(overwritten.restore):
        overwritten.write(tensors, kind if change.written else type(copy))
        for parameter in overwritten.added:
            parameter.requires_grad_(trained)
    return overwritten


def _check_copy(change: Change, copy: nn.Module) -> None:
    present = [path.name for path in change.new_paths if path.name in copy._modules]
    if present:
        raise GrowthError(f"the copy has {', '.join(present)} already; carry each copy along once after each growth.")
    moved = {
        name: slope.shape for name, slope in change.slope.items() if name not in {*change.added, *change.index_maps}
    }
    for name in (*change.index_maps, *moved, *(path.beside for path in change.new_paths)):
        index_maps = change.index_maps.get(name, ())
        try:
            shape = tensor_at(copy, name).shape
        except AttributeError as error:
            raise GrowthError(
                f"a {type(copy).__name__} without {name} is no copy of the grown model; give copy.deepcopy(model), or "
                "AveragedModel(model).module, made before the growth."
            ) from error
        if any(shape[at.dim] != len(at.old) for at in index_maps) or shape != moved.get(name, shape):
            raise GrowthError(
                f"{name} of the copy has shape {tuple(shape)}, not that of the model before the growth; carry each "
                "copy along once after each growth, in order."
            )
