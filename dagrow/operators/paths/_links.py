"""Places for new paths: what the new layers read and write, and which weights move along.

What a new layer reads, ``p``, comes from an activation; it writes to a pre-activation that reads ``b`` already. Or to
the activation itself, as a residual block does.
"""

import itertools
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import skip_init

from dagrow.graph import Dag, Edge
from dagrow.layers import Geometry
from dagrow.solvers import Regression
from dagrow.statistics import ActivationGoal, Feature, InputFeatures, MeanInputs, OutputGoal, PatchInputs, Stacked
from dagrow.surgery import Draft, NewPath, zeroed

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_MEANS = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)


@dataclass(frozen=True, eq=False)
class PathSite:
    """From what a layer reads to a pre-activation.

    Attributes:
        reader: the layer.
        source, reading, writing: the nodes of the activation, of the reader and of the target.
        target: a layer that writes the pre-activation.
        members: all layers whose outputs are summed there, whose weights can move along; the target is one.
        geometry: how a new convolution slides over the activation; None for a linear layer.
        pooled: whether the activation is an image and the new layer reads its mean over positions.
        number: of the activation, among several that come from the same layer.
    """

    dag: Dag
    reader: Edge
    source: fx.Node
    reading: fx.Node
    target: Edge
    writing: fx.Node
    members: tuple[Edge, ...]
    geometry: Geometry | None = None
    pooled: bool = False
    number: int = 0

    @property
    def start(self) -> str:
        """The layer that the activation comes from; numbered if several do."""
        return _origin(self.source, self.dag) + (f"[{self.number}]" if self.number else "")

    @property
    def place(self) -> str:
        """Where it leads from and to."""
        return f"{self.start} -> {self.target.name}"

    @property
    def target_name(self) -> str:
        """What its gain is for."""
        return self.target.name

    def module_name(self, kind: str | None = None) -> str:
        """A name for the new module: where it leads from and to, or a kind with a number."""
        ends = _origin(self.source, self.dag), self.target.name
        plain = kind or "_to_".join(_short(end, self.dag) for end in ends)
        plain = plain if plain.isidentifier() else f"from_{plain}"
        model, count = self.dag.model, itertools.count(1 if kind else 2)
        names = itertools.chain([] if kind else [plain], (f"{plain}{'' if kind else '_'}{n}" for n in count))
        return next(name for name in names if name not in model._modules and not hasattr(model, name))

    @property
    def movable(self) -> tuple[Edge, ...]:
        """The members whose weights may move, one with a bias last if there is one."""
        free = [edge for edge in self.members if edge.trainable]
        return tuple(sorted(free, key=lambda edge: edge.bias))

    @property
    def bias(self) -> bool:
        """Whether the new layer needs a bias: only where no member has one that can move."""
        return not any(edge.bias for edge in self.movable)

    def features(self, bias: bool) -> Feature:
        """``p``: what the new layer reads, with the constant 1 or without."""
        if self.pooled:
            return MeanInputs(self.reader.name, bias)
        if self.geometry is not None:
            return PatchInputs(self.reader.name, bias, geometry=self.geometry)
        return InputFeatures(self.reader.name, bias)

    @cached_property
    def reads(self) -> InputFeatures | Stacked | None:
        """``b``: what can follow the goal already, the constant 1 last."""
        parts = [InputFeatures(edge.name, edge.bias and edge is self.movable[-1]) for edge in self.movable]
        if len(parts) > 1:
            return Stacked(tuple(parts))
        return parts[0] if parts else None

    @property
    def goal(self) -> Feature:
        return OutputGoal(self.target.name)

    def regression(self, features: Feature) -> Regression:
        """New features at the pre-activation: what it reads already is regressed out of them, and moves along."""
        return Regression(features, self.reads, self.goal, "all", constant=self.reads is not None and self.reads.bias)

    def layer(self, outputs: int, bias: bool) -> nn.Module:
        """A new layer that reads the activation, all zero."""
        if self.geometry is None:
            return self._blank(nn.Linear, self._inputs, outputs, bias=bias)
        margins = tuple(before for before, _ in self.geometry.margins)
        kind, *slides = _CONVOLUTIONS[self.geometry.space - 1], self.geometry.kernel, self.geometry.stride, margins
        return self._blank(kind, self._inputs, outputs, *slides, bias=bias)

    def further(self, inputs: int) -> nn.Module:
        """A new layer that reads another new one and writes the pre-activation, all zero and without a bias."""
        if self.geometry is None:
            return self._blank(nn.Linear, inputs, self.outputs, bias=False)
        return self._blank(_CONVOLUTIONS[self.geometry.space - 1], inputs, self.outputs, 1, bias=False)

    def _blank(self, kind: type[nn.Module], *sizes: int | tuple[int, ...], bias: bool) -> nn.Module:
        layer: nn.Module = skip_init(kind, *sizes, bias=bias)  # draws no random numbers
        return zeroed(layer).to(self.target.parameters()["weight"])

    @property
    def outputs(self) -> int:
        return self.target.rule.widths(self.target.module)[1]

    @property
    def _inputs(self) -> int:
        rule, value = self.reader.rule, self.source.meta["val"]
        return value.shape[rule.channel_dim(value.ndim)]

    def new_path(self, name: str, layers: Mapping[str, nn.Module]) -> NewPath:
        """The new layers by their names, at their place."""
        if self.pooled:
            mean = _MEANS[self.source.meta["val"].ndim - 3](1)
            layers = {"mean": mean, "flatten": nn.Flatten(1), **layers}
        several = nn.Sequential(OrderedDict(layers))
        module = several if len(layers) > 1 else several[0]
        return NewPath(
            name,
            module,
            self.reading,
            self.writing,
            self.source,
            self.reader.name,
            self.target.name,
            (*self.movable, self.target)[0].path("weight"),
        )

    def compensate(self, draft: Draft, delta: Tensor) -> None:
        """Moves the members' weights ``[o, i]``, laid out as in :attr:`reads`."""
        sizes = [edge.rule.widths(edge.module)[0] * edge.rule.taps(edge.module) for edge in self.movable]
        sizes[-1] = delta.shape[1] - sum(sizes[:-1])
        for edge, part in zip(self.movable, delta.split(sizes, 1), strict=True):
            draft.move(edge, part)


@dataclass(frozen=True, eq=False)
class ResidualSite(PathSite):
    """From an activation to itself: a residual block, ``x <- x + f(x)``, for all that read it.

    The target is a layer that does; nothing moves along.
    """

    @property
    def place(self) -> str:
        return f"{self.start} -> itself"

    @property
    def target_name(self) -> str:
        return self.place

    @property
    def goal(self) -> Feature:
        return ActivationGoal(self.reader.name)

    @property
    def outputs(self) -> int:
        return self._inputs

    def new_path(self, name: str, layers: Mapping[str, nn.Module]) -> NewPath:
        return replace(super().new_path(name, layers), writes="")


def _origin(node: fx.Node, dag: Dag) -> str:
    """The layer that an activation comes from, or the input; of several the last, new connections aside."""
    waiting, seen, origins = [node], set(), list[tuple[fx.Node, str]]()
    while waiting:
        source = waiting.pop()
        if source in seen:
            continue
        seen.add(source)
        if source.op == "placeholder":
            origins.append((source, str(source.target).lstrip("*")))
        elif source in dag.layers:
            origins.append((source, dag.layers[source].name))
        else:
            waiting += source.all_input_nodes
    new = {name for name, *_ in dag.added_paths}
    return max(origins, key=lambda origin: (origin[1] not in new, origin[0]))[1] if origins else node.name


def _short(name: str, dag: Dag) -> str:
    """A layer's name as part of another: of new layers the name of their path."""
    new = {path for path, *_ in dag.added_paths}
    first = name.partition(".")[0]
    return first if first in new else name.replace(".", "_").strip("_")


def filled(layer: nn.Module, matrix: Tensor) -> nn.Module:
    """Writes weights into a new layer.

    Args:
        layer: linear or a convolution.
        matrix: ``[o, i]``, the constant's column last where the layer has a bias.

    Returns:
        The layer.
    """
    weight, bias = layer.get_parameter("weight"), dict(layer.named_parameters()).get("bias")
    with torch.no_grad():
        weight.copy_(matrix[:, : weight[0].numel()].reshape(weight.shape))
        if bias is not None:
            bias.copy_(matrix[:, -1])
    return layer
