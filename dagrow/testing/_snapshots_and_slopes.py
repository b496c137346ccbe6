"""What the laws of :mod:`dagrow.testing` compare: bits, functions, and regressions by brute force.

Nothing here uses the package's moments or solvers.
"""

import copy
import pickle
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.optim import Optimizer

from dagrow._model_state import preserve_state
from dagrow.graph import Axis, Dag, Edge
from dagrow.layers import DEFAULT_RULES, EdgeRule, rule_for, with_constant
from dagrow.statistics import LayerHooks, Loss, Objective
from dagrow.surgery import Change, Growth, NewPath, preview
from dagrow.tracing import Executor, tensor_at


def close(actual: Tensor | float, expected: Tensor | float, what: str, *, rtol: float = 0.0, atol: float) -> None:
    """Raises AssertionError unless ``|actual - expected| <= atol + rtol * max |expected|`` everywhere."""
    a, e = (torch.as_tensor(value).detach().double() for value in (actual, expected))
    assert a.shape == e.shape, f"{what}: shape {tuple(a.shape)}, not {tuple(e.shape)}"
    if a.numel():
        apart, allowed = float((a - e).abs().max()), atol + rtol * float(e.abs().max())
        shown = f"{float(a):.10g}, not {float(e):.10g}" if a.ndim == 0 else "tensors"
        assert apart <= allowed, f"{what}: {shown}; apart by {apart:.3g}, allowed {allowed:.3g}"


def derivative(function: Callable[[float], float]) -> float:
    """f'(0) by central differences, at the two neighbouring steps out of six that agree best.

    Steps are smaller where f is so steep that it would change by more than its own size.
    """

    def difference(h: float) -> float:
        return (function(h) - function(-h)) / (2 * h)

    steep = _steepness(function)
    found = [difference(h / steep) for h in (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)]
    best = min(range(len(found) - 1), key=lambda i: abs(found[i] - found[i + 1]))
    return found[best + 1]


def kink(function: Callable[[float], float]) -> float:
    """Half of the jump of f' at 0: there units may be exactly where their activation bends, as behind dead ones.

    What autograd gives there is some number between the slopes on both sides.
    """
    h = 1e-7 / _steepness(function)
    return abs(function(h) + function(-h) - 2 * function(0.0)) / (2 * h)


def _steepness(function: Callable[[float], float]) -> float:
    """How much smaller steps have to be: f soon changes by more than its size, or has a large slope."""
    size, step = abs(function(0.0)) or 1.0, 1e-2
    while step > 1e-100 and max(abs(function(h) - function(0.0)) for h in (step, -step)) > size:
        step /= 10
    if step < 1e-2:
        return 1e-2 / step
    return max(1.0, abs(function(1e-9) - function(-1e-9)) / 2e-9 / size)


def snapshot(dag: Dag, optimizer: Optimizer | None = None) -> dict[str, Any]:
    """Every bit that a growth could leave changed: to be compared with :func:`same`."""
    model = dag.model
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    return {
        "tensors": {name: _bits(tensor) for name, tensor in tensors.items()},
        "modules": {name: _facts(module) for name, module in model.named_modules()},
        "dag": (str(dag), str(dag.graph), [repr(layer) for layer in (*dag.edges, *dag.axes)], len(dag.applied)),
        "random": (random.getstate(), str(np.random.get_state()), torch.get_rng_state(), torch.is_grad_enabled()),
        "optimizer": None
        if optimizer is None
        else {
            (i, j): (id(p), {key: _value(v) for key, v in optimizer.state.get(p, {}).items()})
            for i, group in enumerate(optimizer.param_groups)
            for j, p in enumerate(group["params"])
        },
    }


def same(before: object, after: object, what: str, path: str = "") -> None:
    """Raises AssertionError at the first difference between two snapshots."""
    if isinstance(before, dict) and isinstance(after, dict):
        assert before.keys() == after.keys(), f"{what}: {path} has {list(after)}, had {list(before)}"
        for key in before:
            same(before[key], after[key], what, f"{path}.{key}" if path else str(key))
    elif isinstance(before, (tuple, list)) and isinstance(after, (tuple, list)) and len(before) == len(after):
        for index, pair in enumerate(zip(before, after, strict=True)):
            same(*pair, what, f"{path}[{index}]")
    else:
        if isinstance(before, Tensor) and isinstance(after, Tensor):
            equal = torch.equal(before, after)
        else:
            equal = bool(before == after)
        assert equal, f"{what}: {path} is {after}, was {before}"


def _bits(tensor: Tensor) -> tuple[Any, ...]:
    gradient = None if tensor.grad is None else tensor.grad.clone()
    return id(tensor), tensor.requires_grad, tensor.detach().clone(), gradient


def _facts(module: nn.Module) -> tuple[Any, ...]:
    plain = {name: value for name, value in vars(module).items() if isinstance(value, (int, float, str, tuple))}
    hooks = {name: list(value) for name, value in vars(module).items() if name.endswith("_hooks")}
    return id(type(module)), plain, hooks


def _value(value: object) -> object:
    return value.clone() if isinstance(value, Tensor) else value


def is_picklable(model: nn.Module) -> bool:
    """Whether the user's own model can be pickled (a class inside a function cannot)."""
    try:
        pickle.dumps(model)
    except (pickle.PicklingError, AttributeError, TypeError):
        return False
    return True


def sample(batch: Any, n: int) -> Any:
    """The batch of one that holds sample n of a tensor, or of a tuple or dict of them."""
    if isinstance(batch, dict):
        return {key: sample(value, n) for key, value in batch.items()}
    return tuple(sample(value, n) for value in batch) if isinstance(batch, tuple) else batch[n : n + 1]


def permute(dag: Dag, axis: Axis, order: Tensor) -> None:
    """Puts unit ``order[u]`` of an axis in the place of unit u, in producers, consumers and riders."""

    def moved(tensor: Tensor, places: Tensor, dim: int) -> None:
        chosen = tensor.detach().index_select(dim, places[order].flatten())
        tensor.index_copy_(dim, places.flatten(), chosen)

    with torch.no_grad():
        for edges, places, side in ((axis.producers, axis.layout.rows, 0), (axis.consumers, axis.layout.columns, 1)):
            for edge in edges:
                for name, parameter in edge.parameters().items():
                    dim = edge.rule.dims[name][side]
                    if dim is not None:
                        moved(parameter, places[edge.name], dim)
        for rider, units in axis.layout.entries.items():
            positions = torch.stack([torch.nonzero(units.flatten() == u).flatten() for u in range(axis.width)])
            for name in rider.tensors:
                tensor = tensor_at(dag.model, name)
                entries = tensor.detach().clone() if rider.rule else tensor.detach().flatten()
                entries[positions] = entries[positions[order]]
                tensor.copy_(entries.view_as(tensor))


@dataclass(frozen=True)
class Target:
    """One target edge of a growth, with rows for all samples and positions.

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
class Look:
    """What an edge reads, as it comes and as rows; and minus the gradient of each sample's loss at a zero that is added
    to what it writes, as rows."""

    inputs: Tensor
    read: Tensor
    goal: Tensor


def observe(
    growth: Growth, batches: Sequence[Any], loss: Loss, mode: str, *, project: bool = True, paired: bool = False
) -> list[Target]:
    """The targets of a growth, from its change and two looks at every layer: as it is, and grown at gamma = 0.

    Args:
        project: whether the growth is after ``v_perp`` rather than ``v``.
        paired: whether every two new units are one feature, with opposite fan-in and fan-out.
    """
    dag, names = growth.dag, list(growth.gain_from)
    objective = Objective(dag.model, batches, loss, mode=mode)
    if growth.change.new_paths:
        return [_joined(growth, branch, objective) for branch in growth.change.new_paths]
    edges = [dag.edge(name) for name in names]
    producer = _only_producer(dag, growth.where, len(names)) if project else None
    before = _look(objective, edges if producer is None or producer.name in names else [*edges, producer])
    with preview(dag, growth.change):
        grown = _look(objective, edges, growth.change.tensors(dag.model, 0.0))
    samples = sum(n for _, n in objective)
    return [
        _target(growth.change, edge, before, grown[edge.name].read, producer, samples, project, paired)
        for edge in edges
    ]


def _only_producer(dag: Dag, where: str, targets: int) -> Edge | None:
    axis = next((axis for axis in dag.axes if axis.name == where), None)
    return axis.producers[0] if axis is not None and targets == len(axis.producers) == 1 else None


def _target(
    change: Change,
    edge: Edge,
    before: Mapping[str, Look],
    read: Tensor,
    producer: Edge | None,
    samples: int,
    project: bool,
    paired: bool,
) -> Target:
    reads, goal = before[edge.name].read, before[edge.name].goal
    if edge.bias:
        reads = torch.cat([reads, reads.new_ones(len(reads), 1)], 1)
    wanted = goal - regressed(reads, goal) if project and edge.trainable else goal
    slope, written = change.slope.get(edge.path("weight")), torch.zeros_like(goal)
    new, (o, i) = read[:, :0], edge.rule.dims["weight"]
    landings = {landing.dim: landing for landing in change.index_maps.get(edge.path("weight"), ())}
    if slope is not None:
        weight = edge.matrix(slope)
        rows = landings[o].old if o in landings else torch.arange(len(weight))
        written = read @ weight[rows].flatten(1).T
        bias = change.slope.get(edge.path("bias"))
        written = written if bias is None else written + bias[rows]
        if i in landings:
            entries = torch.arange(weight[0].numel()).view(weight.shape[1:])[landings[i].new]
            new = read[:, entries.flatten(1)]  # [rows, k, slots]
            new = (new[:, ::2] - new[:, 1::2] if paired else new).flatten(1)
    centred = edge.trainable and edge.bias
    new = new - new.mean(0) if centred and len(new) else new
    offered = None if producer is None else before[producer.name].read
    if offered is not None and producer is not None:
        offered = offered - offered.mean(0) if centred and producer.bias else offered
        exact = len(offered) == len(new) and (producer.bias or not edge.bias)
        if not exact or float((new - regressed(offered, new)).norm()) > 1e-9 * float(new.norm()):
            offered = None
    return Target(
        samples,
        float(goal.square().sum()) / samples,
        wanted,
        written,
        new,
        offered,
        _certain(torch.cat([reads, new], 1)) if len(new) == len(reads) else _certain(reads),
    )


def _joined(growth: Growth, branch: NewPath, objective: Objective) -> Target:
    """What a branch is added to, and the moves of layers that come with it."""
    dag, change = growth.dag, growth.change
    target, reader = dag.edge(branch.writes or branch.reads), dag.edge(branch.reads)
    still = [target] * (bool(branch.writes) and target.trainable)
    movers = [edge for edge in dag.edges if edge.path("weight") in change.slope] or still
    seen = _look(objective, {edge.name: edge for edge in (target, reader, *movers)}.values())
    known = [seen[edge.name].read for edge in movers]
    goal = seen[target.name].goal if branch.writes else _looped(growth, branch, objective)
    if any(edge.bias for edge in movers):
        known.append(goal.new_ones(len(goal), 1))
    reads = torch.cat(known, 1) if known else goal[:, :0]
    module = copy.deepcopy(branch.module)
    with torch.no_grad():
        for name, parameter in module.named_parameters(branch.name):
            parameter.add_(change.slope.get(name, torch.zeros(())))
    read, written = _run(module, seen[reader.name].inputs)
    for edge in movers:
        slope, bias = change.slope.get(edge.path("weight")), change.slope.get(edge.path("bias"))
        if slope is not None:
            written = written + seen[edge.name].read @ edge.matrix(slope).flatten(1).T
            written = written if bias is None else written + bias
    samples = sum(n for _, n in objective)
    new = read - regressed(reads, read)
    return Target(
        samples,
        float(goal.square().sum()) / samples,
        goal - regressed(reads, goal),
        written,
        new,
        None,
        _certain(torch.cat([reads, read], 1)),
    )


def _looped(growth: Growth, branch: NewPath, objective: Objective) -> Tensor:
    """Minus the gradient of each sample's loss at a zero that is added to an activation, as rows."""
    program, reader, found = growth.dag.program, growth.dag.edge(branch.reads), []
    scale = objective.reduction == "mean"

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
            loss = objective.function(lambda *a, **k: program._run(Probed(program), a, k), batch)  # type: ignore
            (gradient,) = torch.autograd.grad(loss.sum() * (n if scale else 1), probes)
            found.append(-gradient.movedim(reader.rule.channel_dim(gradient.ndim), -1).flatten(0, -2))
    return torch.cat(found)


def _run(module: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """What the last of some layers reads, with the constant of its bias, and what it writes, as rows."""
    layers = list(module.children()) or [module]
    with torch.no_grad():
        for layer in layers[:-1]:
            inputs = layer(inputs)
        last, outputs = rule_for(layers[-1], DEFAULT_RULES), layers[-1](inputs)
    assert isinstance(last, EdgeRule)
    bias = getattr(layers[-1], "bias", None) is not None
    return with_constant(last.features(layers[-1], inputs), bias), last.rows(layers[-1], outputs)


def _certain(x: Tensor) -> bool:
    """No direction is so weak, ``5e-5 > s > 1e-10`` of the largest, that its square in float64 is lost in noise.

    Normal equations are off by about ``2e-16 / s^2``, less than 1e-7 of what they explain only for larger s."""
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


def _look(objective: Objective, edges: Iterable[Edge], tensors: Mapping[str, Tensor] | None = None) -> dict[str, Look]:
    edges, reduction = list(edges), objective.reduction
    found: dict[str, list[tuple[Tensor, Tensor]]] = {edge.name: [] for edge in edges}
    with preserve_state(objective.model), torch.enable_grad():
        objective.model.train(objective.mode == "train")
        for batch, n in objective:
            caught: dict[str, tuple[Tensor, Tensor]] = {}
            with LayerHooks(objective.model, [edge.layer for edge in edges], _probe(caught)):
                loss = objective.value(batch, tensors)
            probes = [caught[edge.name][1] for edge in edges]
            slopes = torch.autograd.grad(loss * (n if reduction == "mean" else 1), probes, materialize_grads=True)
            for edge, gradient in zip(edges, slopes, strict=True):
                found[edge.name].append((caught[edge.name][0], edge.rule.rows(edge.module, -gradient)))
    return {edge.name: _joined_look(edge, found[edge.name]) for edge in edges}


def _joined_look(edge: Edge, parts: Sequence[tuple[Tensor, Tensor]]) -> Look:
    inputs = [x for x, _ in parts]
    read = torch.cat([edge.rule.features(edge.module, x) for x in inputs])
    same = all(x.shape[1:] == inputs[0].shape[1:] for x in inputs)
    return Look(torch.cat(inputs) if same else inputs[0], read, torch.cat([v for _, v in parts]))


def _probe(caught: dict[str, tuple[Tensor, Tensor]]) -> Callable[..., Tensor]:
    def catch(name: str, inputs: Tensor, output: Tensor) -> Tensor:
        probe = torch.zeros_like(output, requires_grad=True)
        caught[name] = inputs.detach().clone(), probe
        return output + probe

    return catch
