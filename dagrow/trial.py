"""Trying out whether an axis grows as it says: for models of one's own, and for the architectures of others."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dagrow.dag import Axis, Dag
from dagrow.draft import Change, Draft
from dagrow.sharing import tensor_at
from dagrow.surgery import apply
from dagrow.trace import bind
from dagrow.trees import leaves
from dagrow.undisturbed import undisturbed

__all__ = ["try_axis"]


def try_axis(dag: Dag, axis: str, inputs: Sequence[Any], *, k: int = 2, tolerance: float = 1e-10) -> str | None:
    """Grows an axis by k units with random fan-in at gamma = 0, and takes it back.

    The outputs must stay what they were, gradients must reach the new entries, and undo must restore every bit. Give a
    model in float64.

    Args:
        inputs: example inputs, as for :func:`dagrow.trace`; of several batch sizes.
        tolerance: of the outputs, relative to the largest entry where that is above 1.

    Returns:
        What is wrong, or None.
    """
    wrong = None
    with undisturbed(dag.model):
        for sign in (1, -1):  # units behind a rectifier may be dead for one of them
            wrong = _tried(dag, dag.axis(axis), inputs, sign * k, tolerance)
            if wrong != _DEAD:
                return wrong
    return wrong


_DEAD = "no gradient reaches the new entries"


def _tried(dag: Dag, axis: Axis, inputs: Sequence[Any], k: int, tolerance: float) -> str | None:
    with torch.no_grad():
        before = [_outputs(dag.model, given) for given in inputs]
    change = _random(dag, axis, k)
    state = {name: tensor.detach().clone() for name, tensor in _touched(dag.model, change).items()}
    undo = apply(dag, change, 0.0)
    try:
        reached = False
        for given, expected in zip(inputs, before, strict=True):
            with torch.enable_grad():
                found = _outputs(dag.model, given)
            if not _close(found, expected, tolerance):
                return "the output changes"
            reached = reached or _reached(dag.model, change, found)
    finally:
        undo.restore()
    same = all(torch.equal(tensor, state[name]) for name, tensor in _touched(dag.model, change).items())
    with torch.no_grad():
        again = _outputs(dag.model, inputs[0])
    if not same or not all(torch.equal(a, b) for a, b in zip(again, before[0], strict=True)):
        return "undo does not restore every bit"
    return None if reached else _DEAD


def _random(dag: Dag, axis: Axis, k: int) -> Change:
    """|k| new units with random fan-in as large as that of the old ones; its sign is that of k."""
    widening, generator = dag.widening(axis, abs(k)), torch.Generator().manual_seed(0)
    draft = Draft(dag, [(axis, widening)])
    for edge in axis.producers:
        landing = widening.rows[edge.name]
        columns = edge.rule.widths(edge.module)[0] * edge.rule.taps(edge.module) + edge.bias
        weight = edge.matrix(tensor_at(dag.model, edge.path("weight")).detach())
        noise = torch.randn(*landing.new.shape, columns, generator=generator, dtype=torch.float64)
        draft.fan_in(edge, landing, (noise * float(weight.std()) * (1 if k > 0 else -1)).to(weight))
    return draft.change()


def _touched(model: nn.Module, change: Change) -> dict[str, Tensor]:
    return {name: tensor_at(model, name) for name in change.landings}


def _outputs(model: nn.Module, given: Any) -> list[Tensor]:
    """The same random numbers each time; without gradients unless they are switched on."""
    args, kwargs = bind(given)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return [leaf for _, leaf in leaves(model(*args, **kwargs)) if isinstance(leaf, Tensor)]


def _close(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> bool:
    if [a.shape for a in found] != [b.shape for b in expected]:
        return False
    return all(_near(a.detach(), b.detach(), tolerance) for a, b in zip(found, expected, strict=True))


def _near(a: Tensor, b: Tensor, tolerance: float) -> bool:
    if not b.is_floating_point():
        return torch.equal(a, b)
    finite = b[torch.isfinite(b)].abs()
    scale = max(1.0, float(finite.max())) if finite.numel() else 1.0
    return bool(torch.isclose(a, b, rtol=0.0, atol=tolerance * scale, equal_nan=True).all())


def _reached(model: nn.Module, change: Change, outputs: Sequence[Tensor]) -> bool:
    """Whether the gradient of a random combination of the outputs reaches new entries."""
    generator = torch.Generator().manual_seed(1)
    total = sum(
        (o * torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o)).sum()
        for o in outputs if o.is_floating_point()
    )  # fmt: skip
    tensors = {name: tensor for name, tensor in _touched(model, change).items() if tensor.requires_grad}
    gradients = torch.autograd.grad(total, list(tensors.values()), allow_unused=True)  # type: ignore[arg-type]
    return any(
        bool(gradient.index_select(at.dim, at.new.flatten()).any())
        for name, gradient in zip(tensors, gradients, strict=True) if gradient is not None
        for at in change.landings[name]
    )  # fmt: skip
