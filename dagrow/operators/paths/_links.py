"""A place for a new path: what it reads and writes, and its best last layer in closed form.

What a new layer reads is regressed on what a pre-activation still wants. With ``p`` what the new layer reads, ``b``
what the pre-activation reads already and ``P' = P - C S^-1 C^T``, the best weights are ``X = N^T P'^-1``; the old
weights move by ``-X C S^-1`` along, so that only what is new in ``p`` acts. A path of rank K has the leading K singular
directions of ``P'^-1/2 N``.
"""

import itertools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import skip_init

from dagrow.graph import Dag, Edge
from dagrow.layers import Geometry
from dagrow.operators._base import Candidate, Judged
from dagrow.solvers import (
    Fit,
    Moments,
    MomentView,
    Pair,
    Regression,
    fan_out,
    validate_fan_out,
    with_cross_validated_ridge,
)
from dagrow.statistics import (
    ActivationGoal,
    Feature,
    InputFeatures,
    MeanInputs,
    Objective,
    OutputGoal,
    PatchInputs,
    SampleScores,
    Stacked,
    fan_out_score,
)
from dagrow.surgery import Draft, Growth, NewPath, blank, cost_of
from dagrow.tracing import added_paths

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
    def fed(self) -> str:
        """What its gain is for."""
        return self.target.name

    def named(self, kind: str | None = None) -> str:
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

    def block(self, features: Feature) -> Regression:
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

    def _blank(self, kind: type[nn.Module], *sizes: Any, bias: bool) -> nn.Module:
        made: nn.Module = skip_init(kind, *sizes, bias=bias)  # draws no random numbers
        return blank(made).to(self.target.parameters()["weight"])

    @property
    def outputs(self) -> int:
        return self.target.rule.widths(self.target.module)[1]

    @property
    def _inputs(self) -> int:
        rule, value = self.reader.rule, self.source.meta["val"]
        return value.shape[rule.channel_dim(value.ndim)]

    def branch(self, name: str, layers: Mapping[str, nn.Module]) -> NewPath:
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

    The target is a layer that does; nothing moves along."""

    @property
    def place(self) -> str:
        return f"{self.start} -> itself"

    @property
    def fed(self) -> str:
        return self.place

    @property
    def goal(self) -> Feature:
        return ActivationGoal(self.reader.name)

    @property
    def outputs(self) -> int:
        return self._inputs

    def branch(self, name: str, layers: Mapping[str, nn.Module]) -> NewPath:
        return replace(super().branch(name, layers), writes="")


def _origin(node: fx.Node, dag: Dag) -> str:
    """The layer that an activation comes from, or the input; of several the last, new connections aside."""
    waiting, seen, found = [node], set(), []
    while waiting:
        one = waiting.pop()
        if one in seen:
            continue
        seen.add(one)
        if one.op == "placeholder":
            found.append((one, str(one.target).lstrip("*")))
        elif one in dag.layers:
            found.append((one, dag.layers[one].name))
        else:
            waiting += one.all_input_nodes
    bypasses = {name for name, *_ in added_paths(dag.model)}
    return max(found, key=lambda one: (one[1] not in bypasses, one[0]))[1] if found else node.name


def _short(name: str, dag: Dag) -> str:
    """A layer's name as part of another: of new layers the name of their branch."""
    branches = {branch for branch, *_ in added_paths(dag.model)}
    first = name.partition(".")[0]
    return first if first in branches else name.replace(".", "_").strip("_")


def filled(layer: nn.Module, matrix: Tensor) -> nn.Module:
    """A layer with the weights ``[o, i]``, the constant's last where it has a bias."""
    weight, bias = layer.get_parameter("weight"), dict(layer.named_parameters()).get("bias")
    with torch.no_grad():
        weight.copy_(matrix[:, : weight[0].numel()].reshape(weight.shape))
        if bias is not None:
            bias.copy_(matrix[:, -1])
    return layer


#: what is fitted, from moments and a ridge: combinations ``A [p, q]`` of the features, or the indices of some ``[q]``
Basis = Callable[[MomentView, Regression, float], Tensor]
#: the layers of a path with ``a += X A^T p``, from A and ``X [o, q]``; all but the last as they will be
LayerBuilder = Callable[[PathSite, Tensor, Tensor], Mapping[str, nn.Module]]


def everything(m: MomentView, block: Regression, ridge: float) -> Tensor:
    """All features, each by itself."""
    p = m[block.features, block.features]
    return torch.arange(len(p), device=p.device)


@dataclass(frozen=True, eq=False)
class PathCandidate(Candidate):
    """A path whose last layer is fitted.

    Attributes:
        features: what the fit is on: what the last layer reads, the constant last if it has a bias.
        basis: which combinations of them.
        layout: builds the layers, the last with its weights at gamma = 1.
        neurons: new hidden units.
        kind: what the new module is called, with a number; by where it leads if None.
        ridges: to choose from.
        drawn: those of the features that do not depend on the goals, unless all are such.
    """

    operator: Any
    link: PathSite
    features: Feature
    basis: Basis
    layout: LayerBuilder
    neurons: int = 0
    kind: str | None = None
    ridges: tuple[float, ...] = (0.0,)
    invariant: bool = True
    drawn: Feature | None = None

    @property
    def block(self) -> Regression:
        return self.link.block(self.features)

    def pairs(self) -> list[Pair]:
        return self.block.pairs()

    def solve(self, moments: Moments, objective: Objective) -> "Growth | Candidate | None":
        if not float(moments[self.features, self.features].diagonal().sum()):
            return None
        split = moments.split()
        block = with_cross_validated_ridge(split, self.block)
        basis = self.basis(moments, block, self.ridges[0])
        if not basis.shape[-1]:
            return None
        if moments.folds == 1:
            return self._growth(basis, fan_out(moments, block, basis, self.ridges[0]), objective)
        held = validate_fan_out(split, block, basis, self.ridges)
        growth = self._growth(basis, fan_out(moments, block, basis, held.ridge), objective)
        scores = fan_out_score(split, block, lambda train: self.basis(train, block, self.ridges[0]), held.ridge)
        return Judged(growth, SampleScores([scores]))

    def _growth(self, basis: Tensor, fit: Fit, objective: Objective) -> Growth:
        link, draft = self.link, Draft(self.link.dag)
        layers = self.layout(link, basis, fit.weights)
        draft.add_path(link.branch(link.named(self.kind), layers), [*layers.values()][-1])
        if fit.compensation is not None:
            link.compensate(draft, fit.compensation)
        change = draft.change()
        return Growth(
            self.operator,
            link.place,
            self.neurons,
            fit.gain,
            {link.fed: fit.gain},
            cost_of(link.dag, change),
            drop=fit.drop,
            invariant=self.invariant,
            notes=(fit.note,) if fit.note else (),
            change=change,
            dag=link.dag,
            objective=objective,
        )
