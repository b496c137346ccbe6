"""A growth is a proposed change, printable before it happens; a receipt is what it became."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from dagrow.axes import Landing
from dagrow.dag import Dag, Edge
from dagrow.errors import GrowthError
from dagrow.objective import Objective
from dagrow.surgery import Change, Preview, Undo, apply

__all__ = ["Cost", "Growth", "Receipt", "cost_of"]


@dataclass(frozen=True)
class Cost:
    """What a growth adds: parameters, and floating point operations of one sample's forward pass."""

    parameters: int = 0
    flops: int = 0


@dataclass(frozen=True, eq=False)
class Growth:
    """A proposed change of one place of a dag. Nothing happens before :meth:`apply`.

    Attributes:
        operator: what proposed it.
        where: the axis or edge.
        neurons: new units.
        gain: minus the slope of the loss in gamma at 0, on the measured samples.
        gain_from: target edge -> its part of the gain.
        heldout_gain: what a fit on the other folds explains of each fold, mean over folds; None without folds.
        heldout_error: its standard error over folds.
        drop: by how much the bottleneck at the targets falls.
        cost: parameters and FLOPs added.
        singular_values: of the whitened goal, one per direction that was considered.
        significant: whether the held-out gain is more than chance; not asked where the number of neurons was given.
        preserving: whether the function stays the same at every amplitude, so that there is nothing to search.
        notes: fallbacks that the solution needed.
    """

    operator: Any
    where: str
    neurons: int
    gain: float
    gain_from: Mapping[str, float]
    cost: Cost
    heldout_gain: float | None = None
    heldout_error: float | None = None
    drop: float = 0.0
    singular_values: Tensor | None = None
    significant: bool = True
    preserving: bool = False
    notes: tuple[str, ...] = ()
    change: Change = field(repr=False, kw_only=True)
    dag: Dag = field(repr=False, kw_only=True)
    objective: Objective = field(repr=False, kw_only=True)

    def loss(self, gamma: float, objective: Objective | None = None) -> float:
        """The loss of the grown network at an amplitude, without growing it."""
        with Preview(self.dag, self.change):
            return (objective or self.objective).mean(self.change.tensors(self.dag.model, gamma))

    def apply(self, gamma: float = 1.0, *, optimizer: Optimizer | None = None) -> "Receipt":
        """Grows the model in place.

        Args:
            gamma: the amplitude; at 0 the function does not change.
            optimizer: its state is brought along at once (otherwise at its next step).

        Raises:
            GrowthError: the model is no longer the one that was measured.
            OptimizerError: the optimizer's state cannot follow. Nothing has changed.
        """
        before = self.objective.mean()
        after = self.loss(gamma)
        return self.commit(gamma, before, after, optimizer)

    def commit(self, gamma: float, before: float, after: float, optimizer: Optimizer | None) -> "Receipt":
        """Applies the growth when the losses are known already."""
        if self.preserving and abs(after - before) > 1e-4 * abs(before):
            raise GrowthError(
                f"{self.operator!r} at {self.where} would change the loss from {before:.6g} to {after:.6g}: on the "
                "way to the consumers a zero does not stay zero, which this init needs. Use another init."
            )
        undo = apply(self.dag, self.change, gamma, optimizer)
        return Receipt(self.where, self.neurons, gamma, before, after, self.gain, self.change.where(), (), self, undo)

    def __str__(self) -> str:
        held = "" if self.heldout_gain is None else f", held out {self.heldout_gain:.4g} ± {self.heldout_error:.2g}"
        doubt = "" if self.significant else " (not more than chance)"
        return (
            f"{self.operator!r} at {self.where}: {self.neurons} neurons, gain {self.gain:.4g}{held}{doubt}, "
            f"{self.cost.parameters:+,} parameters, {self.cost.flops:+,} FLOPs"
        )


@dataclass(frozen=True, eq=False)
class Receipt:
    """An applied growth.

    Attributes:
        where: the axis or edge, or "" if nothing was worth adding.
        neurons: new units.
        gamma: the amplitude that was chosen.
        loss_before, loss_after: the loss on the batches that chose the amplitude.
        gain: the predicted gain.
        parameters: name -> for each dimension that grew the positions of the new entries.
        parts: the receipts of several growths applied in a row.
        growth: the growth that was applied.
    """

    where: str
    neurons: int
    gamma: float
    loss_before: float
    loss_after: float
    gain: float
    parameters: Mapping[str, Mapping[int, list[int]]]
    parts: tuple["Receipt", ...] = ()
    growth: Growth | None = field(default=None, repr=False)
    _undo: Undo | None = field(default=None, repr=False)

    @property
    def drop(self) -> float:
        """By how much the loss fell."""
        return self.loss_before - self.loss_after

    def undo(self) -> None:
        """Restores every bit that the growth changed: parameters, buffers, forward, optimizer state.

        Raises:
            GrowthError: later growths are still in place, or it was undone already.
        """
        for part in reversed(self.parts):
            part.undo()
        if self._undo is None:
            return
        applied = self._undo.dag.applied
        if self._undo not in applied:
            raise GrowthError(f"the growth at {self.where} is not in place any more; it was undone already.")
        if applied[-1] is not self._undo:
            raise GrowthError(
                f"a later growth is still in place; undo growths in reverse order, the one at {self.where} after it."
            )
        try:
            self._undo.restore()
        except BaseException:  # an interrupt while cleaning up: finish the cleaning first
            self._undo.restore()
            raise

    def __str__(self) -> str:
        if self.parts:
            return "\n".join(map(str, self.parts))
        if not self.where:
            return f"nothing added; loss {self.loss_before:.6g}"
        return (
            f"{self.where}: {self.neurons} neurons at gamma {self.gamma:.3g}, gain {self.gain:.4g}, "
            f"loss {self.loss_before:.6g} -> {self.loss_after:.6g}"
        )


def cost_of(dag: Dag, change: Change) -> Cost:
    """Counted from shapes: a weight entry costs one multiplication and one addition per position."""
    parameters = dict(dag.model.named_parameters())
    added = {
        n: _grown(parameters[n].shape, at) - parameters[n].numel()
        for n, at in change.landings.items()
        if n in parameters
    }
    flops = sum(2 * added.get(f"{edge.name}.weight", 0) * positions(dag, edge) for edge in dag.edges)
    return Cost(sum(added.values()), flops)


def _grown(shape: Sequence[int], landings: Sequence[Landing]) -> int:
    sizes = {landing.dim: landing.size for landing in landings}
    return prod(sizes.get(dim, size) for dim, size in enumerate(shape))


def positions(dag: Dag, edge: Edge) -> int:
    """Rows per sample of an edge, in the example that was traced."""
    value = next(n.meta["val"] for n in dag.graph.nodes if n.op == "call_module" and n.target == edge.name)
    channels = edge.rule.widths(edge.module)[1]
    return max(1, value.numel() // channels // value.shape[0])
