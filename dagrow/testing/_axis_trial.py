"""Trying out whether an axis grows as it says: for models of one's own, and for the architectures of others."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn

from dagrow._comparison import FACTOR, close, largest
from dagrow._model_state import NoDropout, preserve_state
from dagrow._pytree import tensors_in
from dagrow.axes import WideningPlan, disjoint
from dagrow.errors import GrowthError, first_line
from dagrow.graph import Axis, Dag
from dagrow.surgery import Change, Draft, grown
from dagrow.tracing import bind, tensor_at

Widened = tuple[Axis, WideningPlan]
AT_ONCE = 100_000_000  #: weights beside axes that are grown at once


def try_axis(dag: Dag, axis: str, inputs: Sequence[Any], *, k: int = 2, tolerance: float = 1e-10) -> str | None:
    """Grows an axis by k units with random fan-in at gamma = 0, and takes it back.

    The outputs must stay what they were, gradients must reach the new entries, and undo must restore every bit. Give a
    model in float64.

    Args:
        dag: of the model, in evaluation mode or not.
        axis: its name.
        inputs: example inputs, as for :func:`dagrow.trace`; of several batch sizes.
        k: how many units.
        tolerance: of the outputs, relative to the largest entry where that is above 1. Where rounding alone changes
            them by more than a tenth of it, ten times what it changes, up to the square root of ``tolerance``.

    Returns:
        What is wrong, or None.
    """
    with preserve_state(dag.model):
        trial = _Trial(dag, inputs, tolerance)
        wrong, _ = trial.of([(dag.axis(axis), dag.widening(dag.axis(axis), k))])
        return wrong or trial.residue()


def try_axes(dag: Dag, inputs: Sequence[Any], *, k: int = 2, tolerance: float = 1e-10) -> dict[str, str | None]:
    """:func:`try_axis` for every axis that says it can grow.

    Axes that share no layer's side are grown at once, as many as memory allows; if something is wrong with some of
    them, these again in halves, down to single ones.

    Args:
        dag: of the model.
        inputs: as for :func:`try_axis`.
        k: as for :func:`try_axis`.
        tolerance: as for :func:`try_axis`.

    Returns:
        Axis -> what is wrong with it, or None.
    """
    faults: dict[str, str | None] = {}
    widened: list[Widened] = []
    for axis in dag.axes:
        if axis.growable:
            try:
                widened.append((axis, dag.widening(axis, k)))
            except GrowthError as error:
                faults[axis.name] = str(error)
    with preserve_state(dag.model):
        trial = _Trial(dag, inputs, tolerance)
        for group in _portions(disjoint(widened, lambda pair: pair[1])):
            faults |= _faults(trial, group)
        residue = trial.residue()
    return {axis: fault or residue for axis, fault in faults.items()}


def _faults(trial: "_Trial", group: Sequence[Widened]) -> dict[str, str | None]:
    """What is wrong with each axis of a group."""
    fault, suspects = trial.of(group)
    faults = {axis.name: None for axis, _ in group} | {axis.name: fault for axis, _ in suspects}
    middle = (len(suspects) + 1) // 2
    for half in (suspects[:middle], suspects[middle:]):
        if half and len(group) > 1:
            faults |= _faults(trial, half)
    return faults


def _portions(groups: Sequence[Sequence[Widened]]) -> Iterator[Sequence[Widened]]:
    """Groups of axes beside which there are no more weights than fit into memory several times."""
    for group in groups:
        portion: list[Widened] = []
        total = 0
        for axis, widening in group:
            size = sum(edge.parameters()["weight"].numel() for edge in (*axis.producers, *axis.consumers))
            if portion and total + size > AT_ONCE:
                yield portion
                portion, total = [], 0
            portion, total = [*portion, (axis, widening)], total + size
        yield portion


def rounding(dag: Dag, inputs: Sequence[Any]) -> float:
    """How much outputs change when every weight changes in its last bit.

    Args:
        dag: of the model.
        inputs: that it is called with, each as its example inputs.

    Returns:
        The largest change, relative to the largest entry of its output.
    """
    model, generator = dag.model, torch.Generator().manual_seed(2)
    with preserve_state(model, weights=True), torch.no_grad():
        before = [output for arguments in inputs for output in _outputs(model, arguments)]
        for parameter in model.parameters():
            if parameter.is_floating_point():
                signs = torch.randint(2, parameter.shape, generator=generator).to(parameter) * 2 - 1
                parameter.mul_(1 + signs * torch.finfo(parameter.dtype).eps)
        after = [output for arguments in inputs for output in _outputs(model, arguments)]
    changes = [
        largest(a - b) / max(1.0, largest(b)) for a, b in zip(after, before, strict=True) if b.is_floating_point()
    ]
    return max(changes, default=0.0)


_DEAD = "no gradient reaches the new entries"
_CHANGED = "the output changes"
_UNDONE = "undo does not restore every bit"


class _Trial:
    """What the model gives for some inputs, to be compared with what it gives when it is grown."""

    def __init__(self, dag: Dag, inputs: Sequence[Any], tolerance: float) -> None:
        self.dag, self.inputs, self._strict = dag, inputs, tolerance
        with torch.no_grad():
            self.before = [_outputs(dag.model, arguments) for arguments in inputs]

    @cached_property
    def _tolerance(self) -> float:
        return max(self._strict, min(FACTOR * rounding(self.dag, self.inputs), self._strict**0.5))

    def residue(self) -> str | None:
        """What is wrong with the model after all that was tried, or None."""
        with torch.no_grad():
            now = [_outputs(self.dag.model, arguments) for arguments in self.inputs]
        return None if all(map(_equal, self.before, now, [0.0] * len(now))) else _UNDONE

    def of(self, axes: Sequence[Widened]) -> tuple[str | None, Sequence[Widened]]:
        """What is wrong with axes that are grown at once, or None, and with which of them it may be."""
        dead = axes
        for sign in (1, -1):  # units behind a rectifier may be dead for one of them
            try:
                change = _random(self.dag, dead, sign)
                fault, unreached = self._with(dead, change, self._strict)
                if fault == _CHANGED and self._tolerance > self._strict:
                    fault, unreached = self._with(dead, change, self._tolerance)
            except Exception as error:  # the user's forward may raise anything
                return f"the grown model fails: {first_line(error)}", dead
            if fault:
                return fault, dead
            dead = unreached
            if not dead:
                return None, ()
        return _DEAD, dead

    def _with(self, axes: Sequence[Widened], change: Change, tolerance: float) -> tuple[str | None, Sequence[Widened]]:
        """What is wrong, and the axes whose new entries no gradient reaches."""
        model, dead = self.dag.model, axes
        state = {name: tensor.detach().clone() for name, tensor in _touched(model, change).items()}
        with grown(self.dag, change, 0.0):
            for arguments, expected in zip(self.inputs, self.before, strict=True):
                with torch.set_grad_enabled(bool(dead)):
                    outputs = _outputs(model, arguments)
                if not _equal(expected, outputs, tolerance):
                    return _CHANGED, axes
                dead = _unreached(model, dead, change, outputs) if dead else ()
        if not all(torch.equal(tensor, state[name]) for name, tensor in _touched(model, change).items()):
            return _UNDONE, axes
        return None, dead


def _random(dag: Dag, axes: Sequence[Widened], sign: int) -> Change:
    """New units on each axis, with random fan-in as large as that of the old ones, whatever else is grown."""
    draft = Draft(dag, axes)
    for axis, widening in axes:
        generator = torch.Generator().manual_seed(crc32(axis.name.encode()))
        for edge in axis.producers:
            rows = widening.rows[edge.name]
            columns = edge.rule.widths(edge.module)[0] * edge.rule.taps(edge.module) + edge.bias
            weight = edge.matrix(tensor_at(dag.model, edge.path("weight")).detach())
            noise = torch.randn(*rows.new.shape, columns, generator=generator, dtype=torch.float64)
            draft.fan_in(edge, rows, (noise * float(weight.std()) * sign).to(weight))
    return draft.change()


def _touched(model: nn.Module, change: Change) -> dict[str, Tensor]:
    return {name: tensor_at(model, name) for name in change.index_maps}


def _outputs(model: nn.Module, arguments: Any) -> list[Tensor]:
    """The same random numbers each time, and no dropout."""
    args, kwargs = bind(arguments)
    with torch.random.fork_rng(), NoDropout():
        torch.manual_seed(0)
        return tensors_in(model(*args, **kwargs))


def _equal(expected: Sequence[Tensor], outputs: Sequence[Tensor], tolerance: float) -> bool:
    """Whether outputs are the same up to a tolerance, relative to the largest entry of each where that is above 1."""
    return len(expected) == len(outputs) and all(
        close(before.detach(), now.detach(), tolerance * max(1.0, largest(before)))
        for before, now in zip(expected, outputs, strict=True)
    )


def _unreached(
    model: nn.Module, axes: Sequence[Widened], change: Change, outputs: Sequence[Tensor]
) -> Sequence[Widened]:
    """Axes of which the gradient of a random combination of the outputs does not reach any new entries."""
    generator, floating = torch.Generator().manual_seed(1), [o for o in outputs if o.is_floating_point()]
    if not floating:
        return ()
    total = sum((o * torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o)).sum() for o in floating)
    tensors = {name: tensor for name, tensor in _touched(model, change).items() if tensor.requires_grad}
    gradients = torch.autograd.grad(total, list(tensors.values()), allow_unused=True)  # type: ignore[arg-type]
    alive = {
        (name, at.dim)
        for name, gradient in zip(tensors, gradients, strict=True)
        if gradient is not None
        for at in change.index_maps[name]
        if bool(gradient.index_select(at.dim, at.new.flatten()).any())
    }
    return [(axis, widening) for axis, widening in axes if not alive & set(_sides(axis))]


def _sides(axis: Axis) -> Iterator[tuple[str, int | None]]:
    """The weights, and their dimensions, that an axis widens."""
    for edges, side in ((axis.producers, 0), (axis.consumers, 1)):
        yield from ((edge.path("weight"), edge.rule.dims["weight"][side]) for edge in edges)
