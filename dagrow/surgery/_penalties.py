"""What a loss takes of weights by themselves, beside what layers compute: its slope along a growth."""

from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn

from dagrow._model_state import preserve_state, restoring
from dagrow.errors import LossError
from dagrow.graph import Dag
from dagrow.statistics import LayerHooks, gradients_of
from dagrow.surgery._apply import preview
from dagrow.surgery._draft import Change
from dagrow.surgery._growth import Growth
from dagrow.tracing import tensor_at

ROUNDING = 100  #: a slope that is smaller, relative to the loss and what its type tells apart, is none
TINY = 1e-12  #: of new entries where the slope is taken: just above 0, where norms and magnitudes have a kink


def completed(growth: Growth) -> Growth:
    """The growth as the whole loss has it, where closed forms see a part of it.

    Args:
        growth: with a gain from moments.

    Returns:
        The growth with the slope of penalties in its gain, and with notes.

    Raises:
        LossError: the loss takes parameters by references of its own, not through the model.
    """
    objective = growth.objective
    growth = _noted(growth, objective.findings.detached)
    if not (objective.findings.penalty or growth.preserving) or not growth.change.slope:
        return growth
    gain = -_penalty_slope(growth) / objective.reported(1.0)  # of a sum, a constant is a part in so many
    if not gain and not objective.findings.penalty:
        return growth
    note = (
        f"{gain or 0.0:.4g} of the gain is that of a penalty on weights, which directions and held-out gains leave "
        "out, and which new fan-in weights add to the loss at any amplitude"
    )
    gain_from = {**growth.gain_from, f"penalty at {growth.where}": gain}
    return replace(growth, gain=growth.gain + gain, gain_from=gain_from, notes=(*growth.notes, note))


def _noted(growth: Growth, detached: AbstractSet[str]) -> Growth:
    """With a note where it rests on gradients that are not slopes of the loss."""
    layers = {edge.name for edge in growth.dag.edges}
    concerned = detached & growth.gain_from.keys() if growth.gain_from.keys() <= layers else detached
    if not concerned:
        return growth
    note = (
        f"the gain is that of autograd's gradient, which for {', '.join(sorted(concerned))} need not be the slope of "
        "the loss: something in the loss is detached or straight-through, or changes gradients"
    )
    return replace(growth, notes=(*growth.notes, note))


def _penalty_slope(growth: Growth) -> float:
    """The slope in gamma at 0+ of what is left of a batch's loss when layers' outputs are cut from their weights."""
    try:
        return _slope(growth, cut=True)
    except Exception:
        if not growth.preserving:
            raise
        return _slope(growth, cut=False)  # the step needs the graph of what layers compute, which has no slope here


def _slope(growth: Growth, *, cut: bool) -> float:
    dag, change, objective = growth.dag, growth.change, growth.objective
    with preserve_state(dag.model, objective.others), torch.inference_mode(False), torch.enable_grad():
        dag.model.train(objective.mode == "train")
        batch = next(iter(objective))[0]
        largest = max(float(slope.abs().max()) for slope in change.slope.values())
        gamma = torch.tensor(TINY / (largest or 1.0), dtype=torch.float64, requires_grad=True)
        start, old = change.start(dag.model), _old(dag.model, change)
        tensors = {n: t + (gamma * change.slope[n]).to(t) if n in change.slope else t for n, t in start.items()}
        with preview(dag, change, tensors), _cut(dag, change) if cut else nullcontext():
            loss = objective.value(batch)
        slopes = gradients_of(loss, [gamma, *old.values()])
    held = [name for name, slope in zip(old, slopes[1:], strict=True) if slope is not None]
    if held:
        raise LossError(
            f"the loss or step reaches {', '.join(held)} by a reference that it keeps, not through the model that it "
            "is given, so that it does not see what would become of them. Take parameters from the model in it: "
            "step(model, batch), with model.parameters()."
        )
    slope = 0.0 if slopes[0] is None else float(slopes[0])
    rounding = ROUNDING * torch.finfo(loss.dtype).eps * abs(float(loss.detach()))
    return slope if abs(slope) > rounding or not growth.preserving else 0.0


def _old(model: nn.Module, change: Change) -> dict[str, Tensor]:
    """The trainable parameters that others stand in for."""
    tensors = {name: tensor_at(model, name) for name in change.names if name not in change.added}
    return {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}


@contextmanager
def _cut(dag: Dag, change: Change) -> Iterator[None]:
    """Inside, the outputs of layers, new ones among them, do not depend on their weights."""

    def cut(_: object, __: object, output: Tensor) -> Tensor:
        return output.detach().requires_grad_().clone()

    handles = [path.module.register_forward_hook(cut) for path in change.new_paths]

    def restore() -> None:
        for handle in handles:
            handle.remove()

    layers = {layer.name: layer for layer in dag.layers.values()}
    with restoring(restore), LayerHooks(dag.model, layers.values(), cut):
        yield
