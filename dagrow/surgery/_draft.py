"""A change in the making: a ray ``theta(gamma) = start + gamma * slope`` in the parameters of a grown network.

At gamma = 0 the grown network computes what the network computed before.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor, fx, nn

from dagrow.axes import DROPPED, Arguments, IndexMap, Rider, WideningPlan, changed_attributes
from dagrow.errors import GrowthError
from dagrow.graph import Axis, Dag, Edge
from dagrow.layers import LayerSite
from dagrow.surgery._new_layers import NewPath, insert_paths, parameters_of
from dagrow.tracing import Program, fixed_arguments, tensor_at, write_forward


@dataclass(frozen=True, eq=False)
class Change:
    """What a growth does to the model.

    Attributes:
        index_maps: parameter or buffer -> where its old and new entries lie, for each dimension that grows.
        fresh: parameter or buffer -> a tensor of the grown shape that holds the new entries at gamma = 0.
        slope: parameter -> its derivative in gamma, in the grown shape.
        attributes: module -> its attributes that state widths.
        literals: node of the graph -> its arguments with the sizes of the grown network.
        written: whether the forward is written anew, with the literals and the new paths in it.
        program: what the graph was when the change was drafted.
        layers: of the graphs of all examples, by their nodes.
        new_paths: new layers beside those that there are.
        narrowed: where units fade out as gamma goes to 1: what is written then, the same function without them.
    """

    index_maps: Mapping[str, tuple[IndexMap, ...]]
    fresh: Mapping[str, Tensor]
    slope: Mapping[str, Tensor]
    attributes: Mapping[str, Mapping[str, object]]
    literals: Mapping[fx.Node, Arguments]
    written: bool
    program: Program
    layers: Mapping[fx.Node, LayerSite]
    new_paths: tuple[NewPath, ...] = ()
    narrowed: "Change | None" = None

    @property
    def final(self) -> "Change":
        """What is written for good: of units that fade out, the model without them."""
        return self.narrowed or self

    @cached_property
    def added(self) -> dict[str, Tensor]:
        """Parameters that the model has not got yet, at gamma = 0."""
        return parameters_of(self.new_paths)

    @property
    def shared_sizes(self) -> list[str]:
        """Numbers that modules state, which become others at some of their uses only."""
        return sorted({f"{path}.{name}".removeprefix(".") for path, name, _ in changed_attributes(self.literals)})

    @property
    def notes(self) -> tuple[str, ...]:
        """What a forward that is written anew holds for."""
        fixed = fixed_arguments(self.program) if self.written else ""
        return (f"the forward is written anew, for calls with {fixed}, as in the examples",) if fixed else ()

    @property
    def names(self) -> list[str]:
        """The parameters and buffers that become others, new ones among them."""
        return list(dict.fromkeys((*self.index_maps, *self.slope)))

    def kind(self, model: nn.Module) -> type[nn.Module]:
        """The class of the grown model: its own, or one whose forward is written anew."""
        return self._written if self.written else type(model)

    @cached_property
    def _written(self) -> type[nn.Module]:
        return write_forward(
            self.program,
            self.literals,
            partial(insert_paths, new_paths=self.new_paths, layers=self.layers),
            [path.record for path in self.new_paths],
        )

    def start(self, model: nn.Module) -> dict[str, Tensor]:
        """Parameters and buffers that become others, in their grown shapes, at gamma = 0.

        Args:
            model: as it was when the change was drafted.

        Returns:
            New tensors by their names.

        Raises:
            GrowthError: the model has changed its widths since.
        """
        start = {}
        for name in self.names:
            tensor = self.added[name] if name in self.added else tensor_at(model, name)
            start[name] = pad(tensor.detach(), self.index_maps.get(name, ()), self.fresh.get(name))
            if name in self.slope and self.slope[name].shape != start[name].shape:
                raise GrowthError(f"{name} has changed its shape since the growth was measured; propose again.")
        return start

    def at(self, start: Mapping[str, Tensor], gamma: float) -> dict[str, Tensor]:
        """The same at another amplitude.

        Args:
            start: what :meth:`start` gave.
            gamma: the amplitude.

        Returns:
            New tensors, so that nothing that is done to them reaches ``start``.
        """
        with torch.no_grad():
            return {
                name: tensor + gamma * self.slope[name].to(tensor) if name in self.slope else tensor.clone()
                for name, tensor in start.items()
            }

    def tensors(self, model: nn.Module, gamma: float) -> dict[str, Tensor]:
        """Parameters and buffers that differ from the model's, at an amplitude."""
        return self.at(self.start(model), gamma)


class Draft:
    """A change in the making: widths first, then weights.

    Args:
        dag: the dag to change.
        widenings: axes and how they widen; several at once go into one change.

    Attributes:
        read, written: layer -> where its old and new input and output channels lie.
        zeros: layer -> which slots of a new unit must start at zero.
    """

    def __init__(self, dag: Dag, widenings: Sequence[tuple[Axis, WideningPlan]] = ()) -> None:
        self.dag = dag
        self.index_maps: dict[str, tuple[IndexMap, ...]] = {}
        self.fresh: dict[str, Tensor] = {}
        self.slope: dict[str, Tensor] = {}
        self.attributes: dict[str, Mapping[str, object]] = {}
        self.literals: dict[fx.Node, Arguments] = {}
        self.new_paths: list[NewPath] = []
        self.forward_written = any(widening.written for _, widening in widenings)
        self.zeros: dict[str, Tensor] = {}
        self.read: dict[str, IndexMap] = {}
        self.written: dict[str, IndexMap] = {}
        riders: list[tuple[Rider, IndexMap]] = []
        for _, widening in widenings:
            self.literals |= widening.literals
            self.attributes |= widening.attributes
            self.zeros |= widening.zeros
            for name, rows in widening.rows.items():
                self._widen_edge(dag.edge(name), rows, 0)
            for name, columns in widening.columns.items():
                self._widen_edge(dag.edge(name), columns, 1)
            riders += widening.entries.items()
        for name in dict.fromkeys(name for _, plan in widenings for name in (*plan.rows, *plan.columns)):
            self._restate_widths(dag.edge(name))
        for rider, index_map in riders:
            self._widen_rider(rider, index_map)

    def _widen_edge(self, edge: Edge, index_map: IndexMap, side: int) -> None:
        (self.read if side else self.written)[edge.name] = index_map
        for parameter, dims in edge.rule.dims.items():
            dim = dims[side]
            if dim is not None and parameter in edge.parameters():
                name = edge.path(parameter)
                at = IndexMap(dim, index_map.size, index_map.old, index_map.new)
                self.index_maps[name] = (*self.index_maps.get(name, ()), at)

    def _restate_widths(self, edge: Edge) -> None:
        inputs, outputs = edge.rule.widths(edge.module)
        inputs = self.read[edge.name].size if edge.name in self.read else inputs
        outputs = self.written[edge.name].size if edge.name in self.written else outputs
        before = edge.rule.attributes(*edge.rule.widths(edge.module))
        self._restate(edge.layer.owner, before, edge.rule.attributes(inputs, outputs))

    def _restate(self, owner: str, before: Mapping[str, int], after: Mapping[str, int]) -> None:
        """Of a layer that is called as a function, the owner of the weight may state other things."""
        module = self.dag.model.get_submodule(owner)
        self.attributes[owner] = {
            **self.attributes.get(owner, {}),
            **{name: size for name, size in after.items() if getattr(module, name, None) == before[name]},
        }

    def _widen_rider(self, rider: Rider, index_map: IndexMap) -> None:
        if rider.rule is None:
            self.index_maps[rider.name] = (index_map,)
            self._fresh(rider.name).fill_(rider.neutral)
            return
        self.read[rider.name] = index_map
        assert rider.module is not None
        entries = rider.rule.passing(rider.module)
        for entry, path in rider.paths:
            value = entries[entry]
            self.index_maps[path] = (IndexMap(0, index_map.size, index_map.old, index_map.new),)
            fresh = self._fresh(path)
            if value.ndim:  # the entries of one group, as often as a unit has groups
                value = value.repeat(index_map.new.shape[1] // len(value), *[1] * (value.ndim - 1))
            fresh[index_map.new] = value.to(fresh)
        before, after = (rider.rule.attributes(rider.module, size) for size in (len(index_map.old), index_map.size))
        self._restate(rider.owner, before, after)

    def _fresh(self, name: str) -> Tensor:
        return self.fresh.setdefault(name, self._blank(name))

    def _slope(self, name: str) -> Tensor:
        return self.slope.setdefault(name, self._blank(name))

    def _blank(self, name: str) -> Tensor:
        tensor = tensor_at(self.dag.model, name)
        shape = list(tensor.shape)
        for index_map in self.index_maps.get(name, ()):
            shape[index_map.dim] = index_map.size
        return torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)

    def fan_in(self, edge: Edge, index_map: IndexMap, alpha: Tensor) -> None:
        """New rows of a producer: ``alpha [k, slots, i]``, the constant last if the edge has a bias.

        Slots that must start at zero do.
        """
        if edge.name in self.zeros:
            alpha = alpha * ~self.zeros[edge.name][:, None]
        self._write(self._fresh, edge, alpha.flatten(0, 1), index_map.new.flatten())

    def fan_out(self, edge: Edge, index_map: IndexMap, omega: Tensor) -> None:
        """New columns of a consumer per unit of gamma: ``omega [o, k, slots]``, with each slot's taps side by side."""
        weight = edge.matrix(self._slope(edge.path("weight")))
        rows = self._old(edge.path("weight"), edge.rule.dims["weight"][0], len(weight))
        columns = index_map.new.flatten()
        weight[rows[:, None], columns] = omega.reshape(len(rows), len(columns), *weight.shape[2:]).to(weight)

    def move(self, edge: Edge, delta: Tensor) -> None:
        """A move of an edge's old weights per unit of gamma: ``delta [o, i]``, the constant last if it has a bias."""
        rows = self._old(edge.path("weight"), edge.rule.dims["weight"][0], edge.rule.widths(edge.module)[1])
        self._write(self._slope, edge, delta, rows, added=True)

    def add_path(self, path: NewPath, last: nn.Module) -> None:
        """New layers. The last one, a part of them, grows from zero with gamma to the weights that it has."""
        names = {id(parameter): name for name, parameter in path.module.named_parameters(path.name)}
        for parameter in last.parameters():
            self.slope[names[id(parameter)]] = parameter.detach().clone()
            parameter.detach().zero_()
        self.new_paths.append(path)
        self.forward_written = True

    def rider(self, rider: Rider, index_map: IndexMap, values: Mapping[str, Tensor]) -> None:
        """New entries of a norm layer."""
        for entry, value in values.items():
            tensor = self._fresh(dict(rider.paths)[entry])
            tensor[index_map.new] = value.to(tensor).view(index_map.new.shape)

    def copy_rider(self, rider: Rider, index_map: IndexMap, units: Tensor, copied: Tensor) -> None:
        """New entries of a rider that repeat those of old units. ``units`` tells which unit each old entry is of."""
        pattern = units.movedim(index_map.dim, 0).reshape(units.shape[index_map.dim], -1)[:, 0]
        source = torch.cat([torch.nonzero(pattern == unit).flatten() for unit in copied.tolist()])
        for name in rider.tensors:
            old = tensor_at(self.dag.model, name).detach()
            self._fresh(name).index_copy_(
                index_map.dim, index_map.new.flatten(), old.index_select(index_map.dim, source)
            )

    def _write(
        self, target: Callable[[str], Tensor], edge: Edge, values: Tensor, rows: Tensor, *, added: bool = False
    ) -> None:
        """Values ``[row, i]`` in place of those of some rows of a layer, or added to them."""
        inputs = edge.rule.widths(edge.module)[0]
        weight = edge.matrix(target(edge.path("weight")))
        old = self._old(edge.path("weight"), edge.rule.dims["weight"][1], inputs)
        columns = inputs * edge.rule.taps(edge.module)
        values, rows = values[rows != DROPPED], rows[rows != DROPPED]
        entries = values[:, :columns].reshape(len(rows), inputs, *weight.shape[2:])[:, old != DROPPED].to(weight)
        at = rows[:, None], old[old != DROPPED]
        weight[at] = entries + (weight[at] if added else 0)
        if edge.bias and values.shape[1] > columns:
            bias = target(edge.path("bias"))
            bias[rows] = values[:, -1].to(bias) + (bias[rows] if added else 0)

    def _old(self, name: str, dim: int | None, size: int) -> Tensor:
        """Where the old entries of a tensor go along a dimension of this size."""
        return next((at.old for at in self.index_maps.get(name, ()) if at.dim == dim), torch.arange(size))

    def change(self) -> Change:
        """The finished change."""
        return Change(
            self.index_maps,
            self.fresh,
            self.slope,
            self.attributes,
            self.literals,
            self.forward_written,
            self.dag.program,
            self.dag.view.every_layer,
            tuple(self.new_paths),
        )


def pad(tensor: Tensor, index_maps: Sequence[IndexMap], fresh: Tensor | None = None) -> Tensor:
    """The tensor in its other shape: entries that stay where they land, new ones from ``fresh`` or zero."""
    if not index_maps:
        return tensor
    if tensor.layout is torch.sparse_coo:  # gradients of embeddings may be
        return pad(tensor.to_dense(), index_maps, fresh).to_sparse(tensor.sparse_dim())
    shape = list(tensor.shape)
    for index_map in index_maps:
        if len(index_map.old) != tensor.shape[index_map.dim]:
            raise GrowthError("the model has changed its widths since the growth was measured; propose again.")
        shape[index_map.dim] = index_map.size
    grown = laid_out(tensor, shape)
    grown = grown.zero_() if fresh is None else grown.copy_(fresh)
    return _place(grown, tensor, index_maps)


def laid_out(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Memory for a tensor of another shape, its dimensions in the order in which they lie in this one's memory."""
    strides = tensor.stride()
    order = sorted(range(tensor.ndim), key=lambda dim: -strides[dim])
    return torch.empty_permuted(torch.Size(shape), order, dtype=tensor.dtype, device=tensor.device)


def _place(grown: Tensor, tensor: Tensor, index_maps: Sequence[IndexMap]) -> Tensor:
    """Writes the entries of a tensor to where they land, one dimension after the other."""
    index_map, *others = index_maps
    kept, landed = (places.to(tensor.device) for places in (index_map.kept, index_map.landed))
    if len(kept) < len(index_map.old):
        tensor = tensor.index_select(index_map.dim, kept)
    if others:
        tensor = _place(grown.index_select(index_map.dim, landed), tensor, others)
    return grown.index_copy_(index_map.dim, landed, tensor)
