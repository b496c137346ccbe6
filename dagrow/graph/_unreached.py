"""Parameters that no example runs, in no mode: which of them may read or write an axis that is said to grow.

What an unknown call would do cannot be known; what it could do can. A part can use an axis only if the sizes fit, if
some code of the model mentions it, and if that code comes near the axis: it handles what submodules give out.
"""

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from math import prod
from posixpath import commonpath

from torch import Tensor, fx, nn

from dagrow.axes import AxisLayout
from dagrow.graph._mentions import mentioned
from dagrow.layers import EdgeRule, LayerRule, LayerSite, LinearRule, rule_for

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
_SHOWN = 3  #: parts that a reason names


@dataclass(frozen=True)
class _Part:
    """A layer, or a tensor of no known layer, that no example runs.

    Attributes:
        name: its path in the model.
        scope: the path of the module whose code would run it.
        sizes: of its dimensions that may hold channels.
        flattened: the number of features that it reads, if it may read all positions at once; else 0.
    """

    name: str
    scope: str
    sizes: frozenset[int]
    flattened: int = 0


@dataclass(frozen=True, eq=False)
class Unreached:
    """What no example runs.

    Attributes:
        model: the model.
        tensors: names of its parameters and buffers that no example uses.
        rules: what is known of layers.
    """

    model: nn.Module
    tensors: Set[str]
    rules: Sequence[LayerRule]

    @cached_property
    def names(self) -> list[str]:
        """The largest modules of which nothing runs, and parameters of others."""
        parameters = dict(self.model.named_parameters())
        idle = [name for name in self.tensors if name in parameters]
        return list(dict.fromkeys(_within(name, self._idle_modules) or name for name in sorted(idle)))

    def obstacle(self, layout: AxisLayout, layers: Mapping[fx.Node, LayerSite]) -> str | None:
        """Why an axis cannot grow: its width may be used by parts that no example runs; or None.

        Args:
            layout: of the axis.
            layers: of all examples, by their nodes.

        Returns:
            The reason, with the names of the parts.
        """
        sizes, scope = _sizes(layout), self._scope_of(layout, layers)
        users = [
            part.name
            for part in self._parts
            if _related(part.scope, scope)
            and (part.sizes & sizes or (part.flattened and _is_flattened(part.flattened, layout, layers)))
        ]
        if not users:
            return None
        names = ", ".join(users[:_SHOWN]) + (f" and {len(users) - _SHOWN} more" if len(users) > _SHOWN else "")
        return (
            f"{names}, which no example runs, may read or write it: give an example that runs it, "
            "trace(..., also=[example]), or delete it if nothing does"
        )

    @cached_property
    def _idle_modules(self) -> set[str]:
        """Modules with tensors of which none is used."""
        idle = {path for name in self.tensors for path in _ancestors(name)}
        for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers()):
            if name not in self.tensors and tensor.is_floating_point():
                idle.difference_update(_ancestors(name))
        return idle - {""}

    @cached_property
    def _parts(self) -> list[_Part]:
        """Those that some code of the model mentions."""
        names = mentioned(self.model) if self.tensors else frozenset()
        return [part for part in self._all_parts if _after(part.scope, part.name) in names]

    @property
    def _all_parts(self) -> list[_Part]:
        parts = [part for name, module in self.model.named_modules() for part in self._of_module(name, module)]
        known = {part.name for part in parts}
        tensors = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        for name in sorted(self.tensors):
            owner = name.rpartition(".")[0]
            if _within(name, known) is None:
                is_table = isinstance(self.model.get_submodule(owner), (nn.Embedding, nn.EmbeddingBag))
                sizes = frozenset(tensors[name].shape[1 if is_table else 0 :]) - {1}
                parts.append(_Part(name, self._scope(_within(name, self._idle_modules) or name), sizes))
        return parts

    def _of_module(self, name: str, module: nn.Module) -> Iterator[_Part]:
        """The module as a layer that a rule knows, if nothing of it runs."""
        rule = rule_for(module, self.rules) if name in self._idle_modules else None
        if rule is None:
            return
        scope = self._scope(_within(name, self._idle_modules) or name)
        if isinstance(rule, EdgeRule):
            inputs, outputs = rule.widths(module)
            yield _Part(name, scope, frozenset((inputs, outputs)), inputs * isinstance(rule, LinearRule))
        else:
            yield _Part(name, scope, frozenset(tensor.shape[0] for tensor in _tensors(module) if tensor.ndim))

    def _scope(self, name: str) -> str:
        """The module whose code handles a part of the model."""
        path = name.rpartition(".")[0]
        while path and isinstance(self.model.get_submodule(path), _CONTAINERS):
            path = path.rpartition(".")[0]
        return path

    def _scope_of(self, layout: AxisLayout, layers: Mapping[fx.Node, LayerSite]) -> str:
        """The smallest module whose code handles all that writes, reads and carries an axis."""
        functions = {layer.name: layer.owner for layer in layers.values() if layer.paths}
        names = [*layout.rows, *layout.columns, *(rider.name for rider in layout.entries)]
        common = commonpath([f"/{functions.get(name, name.rpartition('.')[0]).replace('.', '/')}" for name in names])
        return self._scope(f"{common[1:].replace('/', '.')}.")


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _after(scope: str, name: str) -> str:
    """What a module's code calls a part by."""
    return name[len(scope) + 1 if scope else 0 :].partition(".")[0]


def _ancestors(name: str) -> Iterator[str]:
    """The paths of the modules that a tensor lies in."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def _within(name: str, modules: Set[str]) -> str | None:
    """The largest of some modules that something lies in, or that it is."""
    inside = [path for path in (name, *_ancestors(name)) if path in modules]
    return inside[-1] if inside else None


def _related(path: str, other: str) -> bool:
    """Whether one of two modules is part of the other, or both are one."""
    return f"{path}.".startswith(f"{other}." if other else "") or f"{other}.".startswith(f"{path}." if path else "")


def _sizes(layout: AxisLayout) -> set[int]:
    """How wide the axis, and what it is written and read with, looks to layers."""
    labelling = layout.labelling
    sizes = {len(labelling.rows[name]) for name in layout.rows} | {rows.numel() for rows in layout.rows.values()}
    sizes |= {len(labelling.columns[name]) for name in layout.columns}
    sizes |= {columns.numel() for columns in layout.columns.values()}
    return sizes | {len(labelling.entries[rider]) for rider in layout.entries if rider.rule is not None}


def _is_flattened(features: int, layout: AxisLayout, layers: Mapping[fx.Node, LayerSite]) -> bool:
    """Whether a layer with so many features may read all channels of the axis at several positions at once.

    An image may be pooled to any size before it is flattened; a sequence has its own length.

    Args:
        features: that the layer reads.
        layout: of the axis.
        layers: of all examples, by their nodes.

    Returns:
        Whether the number fits.
    """
    for node, layer in layers.items():
        if layer.name in layout.rows:
            shape = node.meta["val"].shape
            dim = layer.rule.channel_dim(len(shape))
            is_last = dim == len(shape) - 1
            if (features == prod(shape[1:])) if is_last else (features % shape[dim] == 0):
                return True
    return False
