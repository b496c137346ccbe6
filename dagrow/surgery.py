"""The only writer. A change is a ray ``theta(gamma) = start + gamma * slope`` in the parameters of a grown network.

At gamma = 0 the grown network computes what the network computed before. Applying a change keeps the identity of
every parameter; it is all or nothing, and can be undone bit for bit.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from dagrow.axes import Landing, Widening
from dagrow.dag import Axis, Dag, Edge
from dagrow.errors import GrowthError
from dagrow.generated import wear
from dagrow.labels import Rider
from dagrow.objective import Undisturbed
from dagrow.optimizers import carry, log_growth, log_undo, refusal, settle
from dagrow.trace import Program

__all__ = ["Change", "Draft", "Preview", "Saved", "Undo", "apply", "pad", "transaction", "whole", "widen_copy"]

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Change:
    """What a growth does to the model.

    Attributes:
        landings: parameter or buffer -> where its old and new entries lie, per dimension that grows.
        fresh: parameter or buffer -> a tensor of the grown shape that holds the new entries at gamma = 0.
        slope: parameter -> its derivative in gamma, in the grown shape.
        attributes: module -> its attributes that state widths.
        literals: node of the graph -> its arguments with the sizes of the grown network.
        widths: axis -> units added.
        program: what the graph was when the change was drafted.
    """

    landings: Mapping[str, tuple[Landing, ...]]
    fresh: Mapping[str, Tensor]
    slope: Mapping[str, Tensor]
    attributes: Mapping[str, Mapping[str, int]]
    literals: Mapping[fx.Node, tuple[Any, ...]]
    widths: Mapping[str, int]
    program: Program

    def tensors(self, model: nn.Module, gamma: float) -> dict[str, Tensor]:
        """Parameters and buffers that differ from the model's, at an amplitude."""
        found = {}
        with torch.no_grad():
            for name in dict.fromkeys((*self.landings, *self.slope)):
                tensor = pad(_tensor(model, name).detach(), self.landings.get(name, ()), self.fresh.get(name))
                if name in self.slope:
                    slope = self.slope[name]
                    if slope.shape != tensor.shape:
                        raise GrowthError(f"{name} has changed its shape since the growth was measured; propose again.")
                    tensor = tensor + gamma * slope.to(tensor)
                found[name] = tensor
        return found

    def where(self) -> dict[str, dict[int, list[int]]]:
        """Parameter or buffer -> for each grown dimension the positions of its new entries."""
        return {
            name: {landing.dim: landing.new.flatten().tolist() for landing in at} for name, at in self.landings.items()
        }


class Draft:
    """A change in the making: widths first, then weights.

    Args:
        dag: the dag to change.
        widenings: axes and how they widen; several at once go into one change.
    """

    def __init__(self, dag: Dag, widenings: Sequence[tuple[Axis, Widening]] = ()) -> None:
        self.dag = dag
        self.landings: dict[str, tuple[Landing, ...]] = {}
        self.fresh: dict[str, Tensor] = {}
        self.slope: dict[str, Tensor] = {}
        self.attributes: dict[str, Mapping[str, int]] = {}
        self.literals: dict[fx.Node, tuple[Any, ...]] = {}
        self.widths = {axis.name: widening.k for axis, widening in widenings}
        self.read: dict[str, Landing] = {}
        self.written: dict[str, Landing] = {}
        riders: list[tuple[Rider, Landing]] = []
        for axis, widening in widenings:
            self.literals |= widening.literals
            for edge in axis.producers:
                self._land(edge, widening.rows[edge.name], 0)
            for edge in axis.consumers:
                self._land(edge, widening.columns[edge.name], 1)
            riders += widening.entries.items()
        for edge in {edge.name: edge for axis, _ in widenings for edge in (*axis.producers, *axis.consumers)}.values():
            self._attributes(edge)
        for rider, landing in riders:
            self._ride(rider, landing)

    def _land(self, edge: Edge, landing: Landing, side: int) -> None:
        (self.read if side else self.written)[edge.name] = landing
        for parameter, dims in edge.rule.dims.items():
            dim = dims[side]
            if dim is not None and parameter in edge.parameters():
                name = f"{edge.name}.{parameter}"
                at = Landing(dim, landing.size, landing.old, landing.new)
                self.landings[name] = (*self.landings.get(name, ()), at)

    def _attributes(self, edge: Edge) -> None:
        inputs, outputs = edge.rule.widths(edge.module)
        inputs = self.read[edge.name].size if edge.name in self.read else inputs
        outputs = self.written[edge.name].size if edge.name in self.written else outputs
        self.attributes[edge.name] = edge.rule.attributes(inputs, outputs)

    def _ride(self, rider: Rider, landing: Landing) -> None:
        if rider.rule is None:
            self.landings[rider.name] = (landing,)
            self._fresh(rider.name).fill_(rider.neutral)
            return
        self.read[rider.name] = landing
        mean, variance = torch.tensor([0.0, 1.0], dtype=torch.float64)
        passing = rider.rule.calibrated(self.dag.model.get_submodule(rider.name), mean, variance)
        for entry in rider.rule.neutral:
            self.landings[f"{rider.name}.{entry}"] = (Landing(0, landing.size, landing.old, landing.new),)
            self._fresh(f"{rider.name}.{entry}").fill_(float(passing[entry]))
        self.attributes[rider.name] = rider.rule.attributes(landing.size)

    def _fresh(self, name: str) -> Tensor:
        return self.fresh.setdefault(name, self._blank(name))

    def _slope(self, name: str) -> Tensor:
        return self.slope.setdefault(name, self._blank(name))

    def _blank(self, name: str) -> Tensor:
        tensor = _tensor(self.dag.model, name)
        shape = list(tensor.shape)
        for landing in self.landings.get(name, ()):
            shape[landing.dim] = landing.size
        return torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)

    def fan_in(self, edge: Edge, landing: Landing, alpha: Tensor) -> None:
        """New rows of a producer: ``alpha [k, slots, i]``, the constant last if the edge has a bias."""
        self._write(self._fresh, edge, alpha.flatten(0, 1), landing.new.flatten(), None)

    def fan_out(self, edge: Edge, landing: Landing, omega: Tensor) -> None:
        """New columns of a consumer per unit of gamma: ``omega [o, k, slots]``."""
        weight = self._slope(f"{edge.name}.weight")
        rows = self._old(f"{edge.name}.weight", 0, weight.shape[0])
        weight[rows[:, None], landing.new.flatten()] = omega.flatten(1).to(weight)

    def move(self, edge: Edge, delta: Tensor) -> None:
        """A move of an edge's old weights per unit of gamma: ``delta [o, i]``, the constant last if it has a bias."""
        rows = self._old(f"{edge.name}.weight", 0, edge.rule.widths(edge.module)[1])
        self._write(self._slope, edge, delta, rows, delta)

    def rider(self, name: str, landing: Landing, values: Mapping[str, Tensor]) -> None:
        """New entries of a norm layer."""
        for entry, value in values.items():
            tensor = self._fresh(f"{name}.{entry}")
            tensor[landing.new] = value.to(tensor).view(landing.new.shape)

    def copy_rider(self, rider: Rider, landing: Landing, units: Tensor, copied: Tensor) -> None:
        """New entries of a rider that repeat those of old units. ``units`` tells which unit each old entry is of."""
        names = [rider.name] if rider.rule is None else [f"{rider.name}.{entry}" for entry in rider.rule.neutral]
        pattern = units.movedim(landing.dim, 0).reshape(units.shape[landing.dim], -1)[:, 0]
        source = torch.cat([torch.nonzero(pattern == unit).flatten() for unit in copied.tolist()])
        for name in names:
            old = _tensor(self.dag.model, name).detach()
            self._fresh(name).index_copy_(landing.dim, landing.new.flatten(), old.index_select(landing.dim, source))

    def _write(self, target: Any, edge: Edge, values: Tensor, rows: Tensor, add: Tensor | None) -> None:
        parameters = edge.parameters()
        inputs = edge.rule.widths(edge.module)[0]
        weight = target(f"{edge.name}.weight")
        columns = self._old(f"{edge.name}.weight", 1, inputs)
        weight[rows[:, None], columns] = values[:, :inputs].to(weight) + (
            weight[rows[:, None], columns] if add is not None else 0
        )
        if "bias" in parameters and values.shape[1] > inputs:
            bias = target(f"{edge.name}.bias")
            bias[rows] = values[:, -1].to(bias) + (bias[rows] if add is not None else 0)

    def _old(self, name: str, dim: int, size: int) -> Tensor:
        return next((at.old for at in self.landings.get(name, ()) if at.dim == dim), torch.arange(size))

    def change(self) -> Change:
        return Change(
            self.landings, self.fresh, self.slope, self.attributes, self.literals, self.widths, self.dag.program
        )


def pad(tensor: Tensor, landings: Sequence[Landing], fresh: Tensor | None = None) -> Tensor:
    """The tensor in its grown shape: old entries where they land, new ones from ``fresh`` or zero."""
    if not landings:
        return tensor
    shape, index = list(tensor.shape), [torch.arange(size) for size in tensor.shape]
    for landing in landings:
        if len(landing.old) != tensor.shape[landing.dim]:
            raise GrowthError("the model has changed its widths since the growth was measured; propose again.")
        shape[landing.dim], index[landing.dim] = landing.size, landing.old
    grown = tensor.new_zeros(shape) if fresh is None else fresh.detach().clone()
    grown[torch.meshgrid(*(i.to(tensor.device) for i in index), indexing="ij")] = tensor
    return grown


class Preview:
    """While it is entered, the model runs the forward that the grown network needs."""

    def __init__(self, dag: Dag, change: Change) -> None:
        self.model, self.found = dag.model, type(dag.model)
        self.forward = wear(dag.program, change.literals) if change.literals else self.found

    def __enter__(self) -> "Preview":
        self.model.__class__ = self.forward
        return self

    def __exit__(self, *_: object) -> None:
        self.model.__class__ = self.found


class Saved:
    """What a change overwrites in a model, as it was: old storages, not copies, where a tensor gets a new shape."""

    def __init__(self, model: nn.Module, change: Change) -> None:
        self.model, self.change = model, change
        names = dict.fromkeys((*change.landings, *change.slope))
        self.tensors = {name: _tensor(model, name) for name in names}
        self.storages = {name: tensor.detach() for name, tensor in self.tensors.items()}
        self.values = {
            name: tensor.detach().clone() for name, tensor in self.tensors.items() if name not in change.landings
        }
        self.gradients = {name: tensor.grad for name, tensor in self.tensors.items()}
        modules = {name: model.get_submodule(name) for name in change.attributes}
        self.attributes = [
            (modules[n], a, getattr(modules[n], a)) for n, values in change.attributes.items() for a in values
        ]
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
        for module, attribute, value in self.attributes:
            setattr(module, attribute, value)
        self.model.__class__ = self.kind
        for name, landings in self.change.landings.items():
            log_undo(self.tensors[name], landings)

    def write(self, tensors: Mapping[str, Tensor], kind: type[nn.Module]) -> None:
        """Puts grown tensors and their forward in place; gradients get zeros where tensors are new."""
        with torch.no_grad():
            for name, value in tensors.items():
                tensor, landings = self.tensors[name], self.change.landings.get(name)
                if landings is None:
                    tensor.copy_(value)
                    continue
                _resize(tensor, value)
                gradient = self.gradients[name]
                tensor.grad = None if gradient is None else pad(gradient, landings)
                log_growth(tensor, landings)
        for name, values in self.change.attributes.items():
            for attribute, size in values.items():
                setattr(self.model.get_submodule(name), attribute, size)
        self.model.__class__ = kind


def _resize(tensor: Tensor, value: Tensor) -> None:
    """Gives a tensor another storage and shape; it stays the same object."""
    tensor.grad = None
    tensor.set_(value.untyped_storage(), value.storage_offset(), value.shape, value.stride())


def whole(work: Callable[[], T], restore: Callable[[], None]) -> T:
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


class Undo:
    """Everything that a growth overwrote, as it was."""

    def __init__(self, dag: Dag, change: Change, optimizer: Optimizer | None, kind: type[nn.Module]) -> None:
        self.dag, self.change, self.optimizer = dag, change, optimizer
        self.saved, self.view, self.kind = Saved(dag.model, change), dag.view(), kind
        self.receipt: Any = None  #: weak reference to the receipt that can call this
        self.state: dict[Tensor, dict[str, Any]] = {}
        for name, tensor in self.saved.tensors.items() if optimizer is not None else ():
            if tensor in optimizer.state:  # type: ignore[union-attr]
                self.state[tensor] = _kept(optimizer.state[tensor], name in change.landings)  # type: ignore[union-attr]

    def restore(self) -> None:
        """Puts everything back. May run twice."""
        self.saved.restore()
        if self.optimizer is not None:
            for tensor in self.saved.tensors.values():
                if tensor in self.state:
                    self.optimizer.state[tensor] = _kept(self.state[tensor], False)
                else:
                    self.optimizer.state.pop(tensor, None)
            settle(self.optimizer, [self.saved.tensors[name] for name in self.change.landings])
        self.dag.show(self.view)
        if self in self.dag.applied:
            self.dag.applied.remove(self)


def _kept(state: Mapping[str, Any], replaced: bool) -> dict[str, Any]:
    """State to come back to: copied, unless the growth puts another tensor in its place."""

    def kept(value: Any) -> Any:
        return value.clone() if isinstance(value, Tensor) and (value.numel() == 1 or not replaced) else value

    return tree_map(kept, dict(state))


def _unreachable(undo: Undo) -> bool:
    """Whether nobody can undo the growth any more, so that what it overwrote need not be kept."""
    return undo.receipt is not None and undo.receipt() is None


class _Found:
    """The model and the dag as they were found."""

    def __init__(self, dag: Dag) -> None:
        dag.applied[:] = [None if undo is None or _unreachable(undo) else undo for undo in dag.applied]
        self.dag, self.count = dag, len(dag.applied)
        self.state, self.view = Undisturbed(dag.model), dag.view()

    def restore(self) -> None:
        """Undoes growths and puts everything else back. May run twice."""
        for undo in reversed(self.dag.applied[self.count :]):
            undo.restore()
        self.dag.show(self.view)
        self.state.restore()


def transaction(dag: Dag, work: Callable[[], T]) -> T:
    """Does some work that may grow the model. If it does not end, the model and the dag are as they were found."""
    return whole(work, _Found(dag).restore)


def apply(dag: Dag, change: Change, gamma: float, optimizer: Optimizer | None = None) -> Undo:
    """Writes a change at an amplitude into the model. All or nothing.

    Raises:
        GrowthError: the model is not the one that was measured.
        OptimizerError: the optimizer holds state that cannot follow.
    """
    tensors = change.tensors(dag.model, gamma)
    kind = wear(dag.program, change.literals) if change.literals else type(dag.model)
    undo = Undo(dag, change, optimizer, kind)
    if optimizer is not None:
        refusal(optimizer, [undo.saved.tensors[name] for name in change.landings])

    def write() -> None:
        undo.saved.write(tensors, kind)
        if optimizer is not None:
            carry(optimizer)
        dag.retrace()
        dag.applied.append(undo)

    whole(write, undo.restore)
    return undo


def widen_copy(change: Change, gamma: float, copy: nn.Module, kind: type[nn.Module]) -> Saved:
    """Gives a copy of the model as it was the shapes of the grown one. All or nothing.

    Old entries keep the copy's own values, new ones are those that the growth wrote.

    Raises:
        GrowthError: the copy is not one of the model as it was before the growth.
    """
    _check_copy(change, copy)
    tensors = {}
    for name, landings in change.landings.items():
        old, fresh, slope = _tensor(copy, name).detach(), change.fresh.get(name), change.slope.get(name)
        if slope is not None:
            fresh = gamma * slope.to(old) + (0 if fresh is None else fresh.to(old))
        tensors[name] = pad(old, landings, fresh)
    saved = Saved(copy, replace(change, slope={}))
    whole(lambda: saved.write(tensors, kind if change.literals else type(copy)), saved.restore)
    return saved


def _check_copy(change: Change, copy: nn.Module) -> None:
    for name, landings in change.landings.items():
        try:
            shape = _tensor(copy, name).shape
        except AttributeError as error:
            raise GrowthError(
                f"a {type(copy).__name__} without {name} is no copy of the grown model; give copy.deepcopy(model), or "
                "AveragedModel(model).module, made before the growth."
            ) from error
        if any(shape[at.dim] != len(at.old) for at in landings):
            raise GrowthError(
                f"{name} of the copy has shape {tuple(shape)}, not that of the model before the growth; carry each "
                "copy along once after each growth, in order."
            )


def _tensor(model: nn.Module, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(owner), leaf)
