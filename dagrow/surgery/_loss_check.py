"""Whether the loss of a batch stays what it was where a change says so: the last net under the label rules."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dagrow._comparison import close, jittered, rounding_between
from dagrow._model_state import preserve_state, replaced
from dagrow._pytree import leaves
from dagrow.errors import GrowthError
from dagrow.graph import Dag
from dagrow.statistics import ForwardProbe, Objective
from dagrow.surgery._apply import preview
from dagrow.surgery._draft import Change
from dagrow.surgery._growth import Growth


def check_preserved(dag: Dag, objective: Objective, change: Change, where: str) -> None:
    """New channels with zero fan-out do not change the loss.

    Args:
        dag: of the model.
        objective: the loss, of which one batch is looked at.
        change: the widening.
        where: the axes that are wider, for the message.

    Raises:
        GrowthError: they do.
    """
    before, after, same = _losses(dag, objective, change, 0.0)
    if not same:
        raise GrowthError(
            f"the model computes something else when {where} is wider, although nothing reads the new channels: loss "
            f"{before:.9g} becomes {after:.9g}. Its forward uses the width where its graph does not show it, or a step "
            "that does not call the model itself reads hidden activations or weights; leave the axis out with axes=."
        )


def check_unchanged(growth: Growth) -> None:
    """A growth that says that it preserves the function does so at its full amplitude.

    Where units go, the model without them gives the loss of the one in which nothing reads them.

    Raises:
        GrowthError: it does not.
    """
    if growth.removes:
        _check_removed(growth)
        return
    before, after, same = _losses(growth.dag, growth.objective, growth.change, 1.0)
    if not same:
        raise GrowthError(
            f"{growth.operator!r} at {growth.where} would change the loss of a batch from {before:.9g} to {after:.9g}: "
            "on the way to the consumers a zero does not stay zero, which this init needs, or a step that does not "
            "call the model itself reads hidden activations or weights. Use another init, or leave the axis out with "
            "axes=."
        )


def _check_removed(growth: Growth) -> None:
    dag, faded = growth.dag, growth.change.tensors(growth.dag.model, 1.0)
    final = growth.change.final
    narrowed = final.tensors(dag.model, 1.0)
    with preview(dag, growth.change, faded):
        before, after, same = _losses_of(dag, growth.objective, final, narrowed)
    if not same:
        raise GrowthError(
            f"{growth.operator!r} at {growth.where} would change the loss of a batch from {before:.9g} to {after:.9g}, "
            "although nothing reads the units that go. The forward uses the width where its graph does not show it, or "
            "a step that does not call the model itself reads hidden activations or weights; leave the axis out with "
            "axes=."
        )


def noted_draws(growth: Growth) -> Growth:
    """With a note where a wider model draws other random numbers, as dropout does in train mode.

    Args:
        growth: whose loss at gamma = 0 is that of the model, but for such numbers.

    Returns:
        The growth.
    """
    if growth.objective.mode != "train" or _losses(growth.dag, growth.objective, growth.change, 0.0, training=True)[2]:
        return growth
    note = (
        "where it is wider the model draws other random numbers in train mode, as dropout does: the gain is the slope "
        "of the loss on average over draws, not for those of a single evaluation; mode='eval' measures without them"
    )
    return replace(growth, notes=(*growth.notes, note))


def _losses(
    dag: Dag, objective: Objective, change: Change, gamma: float, *, training: bool = False
) -> tuple[float, float, bool]:
    """The loss of a batch before and after a change, and whether they differ by rounding alone."""
    return _losses_of(dag, objective, change, change.tensors(dag.model, gamma), training=training)


def _losses_of(
    dag: Dag, objective: Objective, change: Change, tensors: Mapping[str, Tensor], *, training: bool = False
) -> tuple[float, float, bool]:
    """The same for the tensors of a change."""
    with preserve_state(objective.model, objective.others), torch.no_grad():
        objective.model.train(training)
        batch = next(iter(objective))[0]
        before = objective.value(batch)
        with preview(dag, change, tensors):
            after = objective.value(batch)
        allowed = max(1e-9, 100 * torch.finfo(before.dtype).eps) * abs(float(before)) + 1e-12
        same = close(before, after, allowed)
        if not same:
            same = close(before, after, rounding_between(before, _jittered_losses(dag, objective, batch)))
        if not same:  # the model's outputs decide: a loss may take weights by themselves, as a penalty does
            outputs = _outputs(objective, batch)
            with preview(dag, change, tensors):
                same = bool(outputs) and _alike(outputs, _outputs(objective, batch))
    return float(before), float(after), same


def _outputs(objective: Objective, batch: object) -> list[Any]:
    """What the model's own forward gives, each time that the loss of a batch runs it."""
    outputs: list[Any] = []

    def kept(forward: Callable[..., object], *args: object, **kwargs: object) -> object:
        outputs.append(forward(*args, **kwargs))
        return outputs[-1]

    with ForwardProbe(objective.model, kept):
        objective.value(batch)
    return [leaf for _, leaf in leaves(outputs)]


def _alike(before: Sequence[Any], after: Sequence[Any]) -> bool:
    return len(before) == len(after) and all(map(close, before, after))


def _jittered_losses(dag: Dag, objective: Objective, batch: object) -> Iterator[Tensor]:
    """The loss of a batch where weights are off in their last digit."""
    for weights in jittered(dag.model):
        with replaced(dag.model, weights):
            loss = objective.value(batch)
        yield loss
