"""What a growth is for and what it does, by brute force: rows for all samples and positions at once.

Nothing here uses the package's moments or solvers.
"""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from dagrow._model_state import preserve_state
from dagrow.graph import Dag, Edge
from dagrow.layers import DEFAULT_RULES, EdgeRule, rule_for, with_constant
from dagrow.statistics import LayerHooks, Loss, Objective, sample_count
from dagrow.surgery import Change, Growth, NewPath, preview
from dagrow.tracing import Executor


@dataclass(frozen=True)
class Target:
    """One target of a growth.

    Attributes:
        samples: their number.
        energy: ``E |v|^2``.
        wanted: the goal ``v``, or ``v_perp``, ``[rows, o]``.
        written: what the growth adds to the pre-activation per unit of gamma ``[rows, o]``.
        new: the new features, less their mean where the bias can take it out ``[rows, f]``.
        offered: what the only producer reads, likewise ``[rows, p]``; None unless ``new`` is linear in it.
        certain: whether the rank of what the target reads is beyond doubt, for moments in float64 as well.
    """

    samples: int
    energy: float
    wanted: Tensor
    written: Tensor
    new: Tensor
    offered: Tensor | None
    certain: bool

    def fall(self, written: Tensor) -> float:
        """``E|t|^2 - E|t - written|^2``."""
        return float((self.wanted.square() - (self.wanted - written).square()).sum()) / self.samples


@dataclass(frozen=True)
class _Rows:
    """An edge in one run.

    Attributes:
        inputs: what it reads, as it comes.
        read: the same as rows ``[rows, i]``.
        goal: minus the gradient of each sample's loss at a zero that is added to what it writes ``[rows, o]``.
    """

    inputs: Tensor
    read: Tensor
    goal: Tensor


def targets_of(
    growth: Growth, batches: Sequence[Any], loss: Loss, mode: str, *, project: bool = True, paired: bool = False
) -> list[Target]:
    """The targets of a growth, from its change and two runs of every layer: as it is, and grown at gamma = 0.

    Args:
        growth: as it was proposed; its model has not changed since.
        batches: what to measure on.
        loss: a mean or a sum over samples.
        mode: of the model.
        project: whether the growth is after ``v_perp`` rather than ``v``.
        paired: whether every two new units are one feature, with opposite fan-in and fan-out.

    Returns:
        One for each target that the gain is of.
    """
    dag, change, layers = growth.dag, growth.change, {edge.name for edge in growth.dag.edges}
    names = [name for name in growth.gain_from if name in layers]
    objective = Objective(dag.model, batches, loss, mode=mode)
    samples = sum(map(sample_count, batches))
    if change.new_paths:
        return [_path_target(growth, branch, objective, samples) for branch in change.new_paths]
    edges = [dag.edge(name) for name in names]
    producer = _only_producer(dag, growth.where, len(names)) if project else None
    before = rows_of(objective, edges if producer is None or producer.name in names else [*edges, producer])
    with preview(dag, change, change.tensors(dag.model, 0.0)):
        grown = rows_of(objective, edges)
    offered = None if producer is None else (producer, before[producer.name].read)
    return [
        _edge_target(change, edge, before[edge.name], grown[edge.name].read, offered, samples, project, paired)
        for edge in edges
    ]


def _only_producer(dag: Dag, where: str, count: int) -> Edge | None:
    axis = next((axis for axis in dag.axes if axis.name == where), None)
    return axis.producers[0] if axis is not None and count == len(axis.producers) == 1 else None


def _edge_target(
    change: Change,
    edge: Edge,
    before: _Rows,
    read: Tensor,  # in the grown model
    offered: tuple[Edge, Tensor] | None,  # the only producer of the new features, and what that reads
    samples: int,
    project: bool,
    paired: bool,
) -> Target:
    """A layer that reads new features, or whose weights move."""
    reads, goal = before.read, before.goal
    if edge.bias:
        reads = torch.cat([reads, reads.new_ones(len(reads), 1)], 1)
    wanted = goal - regressed(reads, goal) if project and edge.trainable else goal
    new, written = _new_and_written(change, edge, read, goal, paired)
    centred = edge.trainable and edge.bias
    new = new - new.mean(0) if centred and len(new) else new
    return Target(
        samples,
        float(goal.square().sum()) / samples,
        wanted,
        written,
        new,
        None if offered is None else _linear(new, edge, *offered, centred),
        _certain(torch.cat([reads, new], 1)) if len(new) == len(reads) else _certain(reads),
    )


def _new_and_written(change: Change, edge: Edge, read: Tensor, goal: Tensor, paired: bool) -> tuple[Tensor, Tensor]:
    """The new features that a layer reads, and what it writes more per unit of gamma."""
    weight, bias = (change.slope.get(edge.path(name)) for name in ("weight", "bias"))
    if weight is None:
        return read[:, :0], torch.zeros_like(goal)
    index_maps = {index_map.dim: index_map for index_map in change.index_maps.get(edge.path("weight"), ())}
    weight, (o, i) = edge.matrix(weight), edge.rule.dims["weight"]
    rows = index_maps[o].old if o in index_maps else torch.arange(len(weight))
    written = read @ weight[rows].flatten(1).T
    written = written if bias is None else written + bias[rows]
    if i not in index_maps:
        return read[:, :0], written
    entries = torch.arange(weight[0].numel()).view(weight.shape[1:])[index_maps[i].new]
    new = read[:, entries.flatten(1)]  # [rows, k, slots]
    return (new[:, ::2] - new[:, 1::2] if paired else new).flatten(1), written


def _linear(new: Tensor, edge: Edge, producer: Edge, read: Tensor, centred: bool) -> Tensor | None:
    """What the producer reads, if the new features are linear in it."""
    read = read - read.mean(0) if centred and producer.bias else read
    exact = len(read) == len(new) and (producer.bias or not edge.bias)
    return read if exact and float((new - regressed(read, new)).norm()) <= 1e-9 * float(new.norm()) else None


def _path_target(growth: Growth, branch: NewPath, objective: Objective, samples: int) -> Target:
    """What new layers are added to, and the moves of layers that come with them."""
    dag, change = growth.dag, growth.change
    target, reader = dag.edge(branch.writes or branch.reads), dag.edge(branch.reads)
    still = [target] * (bool(branch.writes) and target.trainable)
    movers = [edge for edge in dag.edges if edge.path("weight") in change.slope] or still
    rows = rows_of(objective, {edge.name: edge for edge in (target, reader, *movers)}.values())
    columns = [rows[edge.name].read for edge in movers]
    goal = rows[target.name].goal if branch.writes else _residual_goal(growth, branch, objective)
    if any(edge.bias for edge in movers):
        columns.append(goal.new_ones(len(goal), 1))
    reads = torch.cat(columns, 1) if columns else goal[:, :0]
    read, written = _last_layer(branch, change, rows[reader.name].inputs)
    for edge in movers:
        weight, bias = change.slope.get(edge.path("weight")), change.slope.get(edge.path("bias"))
        if weight is not None:
            written = written + rows[edge.name].read @ edge.matrix(weight).flatten(1).T
            written = written if bias is None else written + bias
    return Target(
        samples,
        float(goal.square().sum()) / samples,
        goal - regressed(reads, goal),
        written,
        read - regressed(reads, read),
        None,
        _certain(torch.cat([reads, read], 1)) and _certain(_beside(reads, rows[reader.name].read)),
    )


def _beside(reads: Tensor, source: Tensor) -> Tensor:
    """What a path is made from, with what its target reads where both are at the same positions."""
    return torch.cat([reads, source], 1) if len(reads) == len(source) else source


def _last_layer(branch: NewPath, change: Change, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Rows that the last of the new layers reads, with the constant of its bias, and writes at gamma = 1."""
    module = copy.deepcopy(branch.module)
    with torch.no_grad():
        for name, parameter in module.named_parameters(branch.name):
            parameter.add_(change.slope.get(name, torch.zeros(())))
        layers = list(module.children()) or [module]
        for layer in layers[:-1]:
            inputs = layer(inputs)
        rule, outputs = rule_for(layers[-1], DEFAULT_RULES), layers[-1](inputs)
    assert isinstance(rule, EdgeRule)
    bias = getattr(layers[-1], "bias", None) is not None
    return with_constant(rule.features(layers[-1], inputs), bias), rule.rows(layers[-1], outputs)


def _residual_goal(growth: Growth, branch: NewPath, objective: Objective) -> Tensor:
    """Minus the gradient of each sample's loss at a zero that is added to an activation, as rows."""
    program, reader = growth.dag.program, growth.dag.edge(branch.reads)
    objective.probe()  # which runs the model, too
    goals: list[Tensor] = []

    class Probed(Executor):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n is not branch.source:
                return value
            probes.append(torch.zeros_like(value, requires_grad=True))
            return value + probes[-1]

    with preserve_state(objective.model), torch.enable_grad():
        objective.model.train(objective.mode == "train")
        for batch, n in objective:
            probes: list[Tensor] = []
            probed = cast(nn.Module, lambda *a, **k: program.run_with(Probed(program), a, k))
            objective.hold()
            loss = objective.function(probed, batch)
            (gradient,) = torch.autograd.grad(loss.sum() * objective.scale(n) * n, probes)
            goals.append(-gradient.movedim(reader.rule.channel_dim(gradient.ndim), -1).flatten(0, -2))
    return torch.cat(goals)


def _certain(x: Tensor) -> bool:
    """No direction is so weak, ``5e-5 > s > 1e-10`` of the largest, that its square in float64 is lost in noise."""
    # normal equations are off by about 2e-16 / s^2, less than 1e-7 of what they explain only for larger s
    s = torch.linalg.svdvals(x / x.norm(dim=0).clamp_min(torch.finfo(x.dtype).tiny))
    return not bool(((s < 5e-5 * s.max()) & (s > 1e-10 * s.max())).any()) if len(s) else True


def regressed(x: Tensor, y: Tensor) -> Tensor:
    """The part of y [rows, o] that x [rows, i] explains."""
    if not x.shape[1]:
        return torch.zeros_like(y)
    x = x / x.norm(dim=0).clamp_min(torch.finfo(x.dtype).tiny)
    u, s, _ = torch.linalg.svd(x, full_matrices=False)
    u = u[:, s > 1e-7 * s.max()]
    return u @ (u.T @ y)


def rows_of(objective: Objective, edges: Iterable[Edge]) -> dict[str, _Rows]:
    """The rows of edges.

    Args:
        objective: the loss and the batches.
        edges: which.

    Returns:
        Edge -> its rows, for all samples and positions.
    """
    edges = list(edges)
    objective.probe()  # which runs the model, too
    inputs: dict[str, list[Tensor]] = {edge.name: [] for edge in edges}
    goals: dict[str, list[Tensor]] = {edge.name: [] for edge in edges}
    probes: dict[str, Tensor] = {}

    def catch(name: str, arriving: Tensor, output: Tensor) -> Tensor:
        last[name] = arriving.detach().clone()
        probes[name] = torch.zeros_like(output, requires_grad=True)
        return output + probes[name]

    with preserve_state(objective.model), torch.enable_grad():
        objective.model.train(objective.mode == "train")
        for batch, n in objective:
            last: dict[str, Tensor] = {}
            with LayerHooks(objective.model, [edge.layer for edge in edges], catch):
                loss = objective.value(batch) * objective.scale(n) * n
            zeros = [probes[edge.name] for edge in edges]
            for edge, gradient in zip(edges, torch.autograd.grad(loss, zeros, materialize_grads=True), strict=True):
                inputs[edge.name].append(last[edge.name])
                goals[edge.name].append(edge.rule.rows(edge.module, -gradient))
    return {edge.name: _joined(edge, inputs[edge.name], torch.cat(goals[edge.name])) for edge in edges}


def _joined(edge: Edge, inputs: list[Tensor], goal: Tensor) -> _Rows:
    read = torch.cat([edge.rule.features(edge.module, x) for x in inputs])
    same = all(x.shape[1:] == inputs[0].shape[1:] for x in inputs)
    return _Rows(torch.cat(inputs) if same else inputs[0], read, goal)
