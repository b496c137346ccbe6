"""What the laws compare: numbers, slopes of a loss, and all that a growth could leave changed."""

import pickle
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dagrow.graph import Axis, Dag
from dagrow.surgery import Growth
from dagrow.tracing import tensor_at


def assert_close(
    actual: Tensor | float, expected: Tensor | float, what: str, *, rtol: float = 0.0, atol: float
) -> None:
    """Raises AssertionError unless ``|actual - expected| <= atol + rtol * max |expected|`` everywhere."""
    a, e = (torch.as_tensor(value).detach().double() for value in (actual, expected))
    assert a.shape == e.shape, f"{what}: shape {tuple(a.shape)}, not {tuple(e.shape)}"
    if a.numel():
        apart, allowed = float((a - e).abs().max()), atol + rtol * float(e.abs().max())
        numbers = f"{float(a):.10g}, not {float(e):.10g}" if a.ndim == 0 else "tensors"
        assert apart <= allowed, f"{what}: {numbers}; apart by {apart:.3g}, allowed {allowed:.3g}"


def amplitude(growth: Growth, wanted: float) -> float:
    """The amplitude that is wanted; 1 of units that go, as they have no other."""
    return 1.0 if growth.removes else wanted


def derivative(function: Callable[[float], float]) -> float:
    """f'(0) by central differences, at the two neighbouring steps out of six that agree best."""

    def difference(h: float) -> float:
        return (function(h) - function(-h)) / (2 * h)

    steep = _steepness(function)
    slopes = [difference(h / steep) for h in (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)]
    best = min(range(len(slopes) - 1), key=lambda i: abs(slopes[i] - slopes[i + 1]))
    return slopes[best + 1]


def kink(function: Callable[[float], float]) -> float:
    """Half of the jump of f' at 0, where autograd gives some number between the slopes on both sides."""
    # units may be exactly where their activation bends, as behind dead ones
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


def snapshot(dag: Dag, optimizer: Optimizer | None = None) -> dict[str, object]:
    """Every bit that a growth could leave changed.

    Args:
        dag: of the model.
        optimizer: whose state counts too, if any.

    Returns:
        What there is by name, to be compared with another snapshot.
    """
    model = dag.model
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    return {
        "tensors": {name: _bits(tensor) for name, tensor in tensors.items()},
        "modules": {name: _facts(module) for name, module in model.named_modules()},
        "dag": (str(dag), str(dag.program.graph), [repr(layer) for layer in (*dag.edges, *dag.axes)], len(dag.applied)),
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


def _bits(tensor: Tensor) -> tuple[object, ...]:
    gradient = None if tensor.grad is None else tensor.grad.clone()
    return id(tensor), tensor.requires_grad, tensor.detach().clone(), gradient


def _facts(module: nn.Module) -> tuple[object, ...]:
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
        units = tensor.detach().index_select(dim, places[order].flatten())
        tensor.index_copy_(dim, places.flatten(), units)

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
