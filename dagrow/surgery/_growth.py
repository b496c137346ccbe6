"""A growth is a proposed change, printable before it happens; a receipt is what it became."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import ceil, prod
from types import NoneType

from torch import Tensor, nn

from dagrow._log import LOG
from dagrow._model_state import all_or_nothing
from dagrow._text import Printable
from dagrow.axes import DROPPED, IndexMap
from dagrow.errors import GrowthError, check_real
from dagrow.graph import Dag, check_owners, weight_uses
from dagrow.solvers import LEVEL, Verdict, upper_tail
from dagrow.statistics import Objective
from dagrow.surgery._apply import Overwritten, UndoRecord, apply, preview, transaction, widen_copy
from dagrow.surgery._draft import Change
from dagrow.surgery._optimizers import Optimizers, check_optimizer


@dataclass(frozen=True)
class Cost:
    """What a growth adds, less than 0 where it takes.

    Attributes:
        parameters: how many.
        flops: floating point operations of one sample's forward pass.
    """

    parameters: int = 0
    flops: int = 0


@dataclass(frozen=True, eq=False)
class Growth(Printable):
    """A proposed change of one place of a dag. Nothing happens before :meth:`apply`.

    Attributes:
        operator: what proposed it.
        where: the axis or edge.
        neurons: new units; less than 0 where units go.
        gain: minus the slope of the loss in gamma at 0, on the measured samples.
        gain_from: target edge (or the activation of a residual block) -> its part of the gain.
        heldout_gain: what fits on the other folds explain of samples that they have not seen, on average; None without
            folds. Where units go, minus the predicted rise of the loss, also without folds.
        heldout_error: its standard error over samples.
        samples: how many the held-out gain was measured on, or groups of samples; 0 without folds.
        z: what they explain of such samples in standard deviations of what chance would explain; None without folds.
        p_value: the probability that by chance alone any of the places that were looked at in the same call came to so
            large a z; None where nobody asked: without folds, where ``AddNeurons`` was given k, and where nothing is
            to be gained.
        drop: by how much the bottleneck at the targets falls.
        cost: parameters and FLOPs added.
        singular_values: of the whitened goal, one per direction that was considered.
        significant: whether the held-out gain is more than chance: its p-value is at most 5 %. True where nobody asked.
        preserving: whether the function stays the same at every amplitude, so that there is nothing to search.
        invariant: whether permuted units or other units of measurement lead to the same growth; not so where something
            is drawn at random, or where a new unit has several channels with directions of their own.
        notes: fallbacks that the solution needed.
    """

    operator: object
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
    invariant: bool = True
    notes: tuple[str, ...] = ()
    samples: int = 0
    z: float | None = None
    p_value: float | None = None
    change: Change = field(repr=False, kw_only=True)
    dag: Dag = field(repr=False, kw_only=True)
    objective: Objective = field(repr=False, kw_only=True)

    @property
    def removes(self) -> bool:
        """Whether units go: they fade out as gamma goes to 1, and only there the model can do without them."""
        return self.neurons < 0

    @property
    def is_whole(self) -> bool:
        """Whether it comes in whole, at amplitude 1, so that there is nothing to search."""
        return self.preserving or self.removes

    def judged(self, verdict: Verdict, z: float, tested: bool) -> "Growth":
        """With held-out gain, error and z from scores; its p-value as if it were the only place that was looked at."""
        p_value = upper_tail(z) if tested else None
        return replace(
            self,
            heldout_gain=verdict.gain,
            heldout_error=verdict.error,
            samples=verdict.samples,
            z=z,
            p_value=p_value,
            significant=not tested or (verdict.gain > 0 and upper_tail(z) <= LEVEL),
        )

    def samples_for(self, relative_error: float) -> int:
        """How many samples to measure for a held-out gain with a given standard error, relative to the gain.

        The error falls with the root of the number of samples: ``n (error / gain / wanted)^2``, at least 1.

        Args:
            relative_error: the standard error over the gain that is wanted.

        Returns:
            The number of samples.

        Raises:
            GrowthError: the error that is wanted is not a positive number, or the gain is not known to be one: it was
                measured without folds, or is not above zero.
        """
        check_real("samples_for", above=0, relative_error=relative_error)
        if self.heldout_gain is None or self.heldout_error is None or not self.heldout_gain > 0:
            how = "without folds" if self.heldout_gain is None else f"and is {self.heldout_gain:.3g} held out"
            raise GrowthError(
                f"samples_for: the gain at {self.where} was measured {how}, so there is no error relative to it. "
                "Measure it with folds of at least 2, on more samples."
            )
        return max(1, ceil(self.samples * (self.heldout_error / self.heldout_gain / relative_error) ** 2))

    def loss(self, gamma: float, objective: Objective | None = None) -> float:
        """The loss of the grown network at an amplitude, without growing it.

        Args:
            gamma: the amplitude.
            objective: the loss on other batches, ``growth.objective.with_batches(batches)``.

        Returns:
            The loss as a mean over samples, of which the gain is minus the slope; a sum counts for each sample.
        """
        check_real("loss", gamma=gamma)
        return self.losses(objective)(gamma)

    def losses(self, objective: Objective | None = None) -> Callable[[float], float]:
        """The loss of the grown network as a function of the amplitude, while the model stays as it is.

        Args:
            objective: as for :meth:`loss`.

        Returns:
            A function from the amplitude to the loss; its tensors are built once.

        Raises:
            GrowthError: the model is no longer the one that was measured, or the objective is none.
        """
        self.check_fresh()
        if not isinstance(objective, (Objective, NoneType)):
            raise GrowthError(
                f"loss(objective=...): a {type(objective).__name__} was given; leave it out, or for other batches give "
                "growth.objective.with_batches(batches)."
            )
        judge, start = objective or self.objective, self.change.start(self.dag.model)

        def loss(gamma: float) -> float:
            with preview(self.dag, self.change, self.change.at(start, gamma)):
                return judge.mean()

        return loss

    def check_fresh(self) -> None:
        """Makes sure that the model is still the one that was measured.

        Raises:
            GrowthError: another growth was applied or undone since.
        """
        if self.change.program is not self.dag.program:
            raise GrowthError(
                f"the growth at {self.where} is stale: another one was applied or undone since it was measured. Call "
                "propose again, or undo what was applied since."
            )
        self.dag.check()

    def apply(self, gamma: float = 1.0, *, optimizer: Optimizers = None) -> "Receipt":
        """Grows the model in place.

        Args:
            gamma: the amplitude; at 0 the function does not change. Units that go have no other than 1.
            optimizer: one or a list, whose state is brought along at once (otherwise at its next step).

        Returns:
            What became of it, to be printed and undone.

        Raises:
            GrowthError: the model is no longer the one that was measured, or units would go at another amplitude.
            OptimizerError: the optimizer's state cannot follow. Nothing has changed.
        """
        check_real("apply", gamma=gamma)
        if self.removes and gamma != 1:
            raise GrowthError(
                f"apply(gamma={gamma}): the units at {self.where} are gone at amplitude 1 only. Apply it at 1, or look "
                "at the loss on the way there with growth.loss(gamma)."
            )
        self.check_fresh()
        check_optimizer(optimizer, self.dag.model)
        return transaction(self.dag, lambda: self._applied(gamma, optimizer))

    def _applied(self, gamma: float, optimizer: Optimizers) -> "Receipt":
        before, after = self.objective.mean(), self.loss(gamma)
        reported = self.objective.reported
        return self.commit(gamma, reported(before), reported(after), optimizer)

    def commit(self, gamma: float, before: float, after: float, optimizer: Optimizers, note: str = "") -> "Receipt":
        """Applies the growth when the losses are known already.

        Args:
            gamma: the amplitude.
            before: the user's loss of the model as it is, see ``Objective.reported``.
            after: that at the amplitude.
            optimizer: as for :meth:`apply`.
            note: on how the amplitude was chosen.

        Returns:
            The receipt.
        """
        undo = apply(self.dag, self.change, gamma, optimizer)
        new = where_new([self.change])
        receipt = Receipt(self.where, self.neurons, gamma, before, after, self.gain, new, self, undo, note=note)
        LOG.info("applied %r: %s", self.operator, receipt)
        return receipt

    def __str__(self) -> str:
        heldout = "" if self.heldout_gain is None else f", held out {self.heldout_gain:.4g} ± {self.heldout_error:.2g}"
        heldout += "" if self.p_value is None else f", p {self.p_value:.2g}"
        doubt = "" if self.significant else " (not more than chance)"
        doubt += " (raises the loss)" if self.gain < 0 else ""
        return (
            f"{self.operator!r} at {self.where}: {self.neurons} neurons, gain {self.gain:.4g}{heldout}{doubt}, "
            f"{self.cost.parameters:+,} parameters, {self.cost.flops:+,} FLOPs"
        )


@dataclass(frozen=True, eq=False)
class Receipt(Printable):
    """An applied growth.

    Attributes:
        where: the axis or edge, or "" if nothing was worth adding.
        neurons: new units; less than 0 where units went.
        gamma: the amplitude that was chosen; of the last part, if there are several.
        loss_before, loss_after: the user's loss, averaged over the batches that chose the amplitude.
        gain: the predicted gain.
        parameters: name -> for each dimension of another size the positions of the new entries, none where some went.
        growth: the growth that was applied; None for several in a row, and for none.
        left_out: places that failed meanwhile, each with the reason.
        note: on how the amplitude was chosen, where it had to be bounded.
    """

    where: str
    neurons: int
    gamma: float
    loss_before: float
    loss_after: float
    gain: float
    parameters: Mapping[str, Mapping[int, list[int]]]
    growth: Growth | None = field(default=None, repr=False)
    _undo: UndoRecord | None = field(default=None, repr=False)
    _parts: tuple["Receipt", ...] = field(default=(), repr=False)
    left_out: tuple[str, ...] = ()
    note: str = ""

    @property
    def parts(self) -> tuple["Receipt", ...]:
        """The receipts of the growths that were applied, first to last: for one growth, of itself."""
        return self._parts or ((self,) if self.growth is not None else ())

    @property
    def drop(self) -> float:
        """By how much the loss fell."""
        return self.loss_before - self.loss_after

    def carry(self, copy: nn.Module) -> None:
        """Brings a copy of the model that was made before the growth to the grown shapes, in place.

        For averages of the weights: after ``receipt.carry(ema.module)``, ``ema.update_parameters(model)`` goes on
        working. Old entries keep the copy's own values, moved as the growth moved those of the model; new ones are
        those that the growth wrote into the model.

        Args:
            copy: of the model, from before the growth.

        Raises:
            GrowthError: the copy is not one of the model as it was before the growth. It is as it was.
        """
        overwritten: list[Overwritten] = []
        with all_or_nothing(partial(_restore, overwritten)):
            for part in self.parts:
                if part.growth is not None and part._undo is not None:
                    overwritten.append(widen_copy(part.growth.change.final, part.gamma, copy, part._undo.kind))

    def undo(self) -> None:
        """Restores every bit that the growth changed: parameters, buffers, forward, optimizer state.

        Also after training: what the growth wrote is then as it was before the growth, all else stays as it is now.

        Raises:
            GrowthError: later growths are still in place, it was undone already, or a wrapper is bound to the model.
        """
        undos = [part._undo for part in self.parts if part._undo is not None]
        if not undos:
            return
        applied = undos[0].dag.applied
        if any(undo not in applied for undo in undos):
            raise GrowthError(f"the growth at {self.where} is not in place any more; it was undone already.")
        if applied[-len(undos) :] != undos:
            raise GrowthError(
                f"a later growth is still in place; undo growths in reverse order, the one at {self.where} after it."
            )
        check_owners(undos[0].dag.model)
        restore = partial(_restore, undos)
        with all_or_nothing(restore):
            restore()
        LOG.info("undone: %s", self.where)

    def __str__(self) -> str:
        return "\n".join([self._applied(), *(f"Left out: {note}" for note in self.left_out)])

    def _applied(self) -> str:
        if self._parts:
            return "\n".join(map(str, self._parts))
        if not self.where:
            return f"nothing added; loss {self.loss_before:.6g}"
        return (
            f"{self.where}: {self.neurons} neurons at gamma {self.gamma:.3g}, gain {self.gain:.4g}, "
            f"loss {self.loss_before:.6g} -> {self.loss_after:.6g}{self.note and f' ({self.note})'}"
        )


def where_new(changes: Sequence[Change]) -> dict[str, dict[int, list[int]]]:
    """Where new entries are after changes in a row.

    Args:
        changes: oldest first.

    Returns:
        Parameter or buffer -> dimension that grew -> positions of the new entries.
    """
    new: dict[str, dict[int, list[int]]] = {}
    for change in changes:
        for name, index_maps in change.final.index_maps.items():
            positions = new.setdefault(name, {})
            for at in index_maps:
                earlier = [int(at.old[position]) for position in positions.get(at.dim, [])]
                positions[at.dim] = sorted([p for p in earlier if p != DROPPED] + at.new.flatten().tolist())
        for name, parameter in change.final.added.items():
            new[name] = {dim: list(range(size)) for dim, size in enumerate(parameter.shape)}
    return new


def _restore(records: Sequence[Overwritten | UndoRecord]) -> None:
    for record in reversed(records):
        record.restore()


def cost_of(dag: Dag, change: Change) -> Cost:
    """What a change adds, or takes, from shapes: an entry of a matrix or kernel costs two operations per position.

    Args:
        dag: of the model.
        change: what the growth does to it.

    Returns:
        The new parameters and floating point operations; less than 0 where units go.
    """
    change = change.final
    parameters = dict(dag.model.named_parameters())
    entries = {
        name: _grown_size(parameters[name].shape, at) - parameters[name].numel()
        for name, at in change.index_maps.items()
        if name in parameters
    }
    uses = weight_uses(dag.program.graph, dag.layers)
    flops = sum(2 * entries[name] * uses[name] for name in uses if name in entries and parameters[name].ndim > 1)
    paths = [path.cost() for path in change.new_paths]
    return Cost(sum(entries.values()) + sum(p for p, _ in paths), flops + sum(f for _, f in paths))


def _grown_size(shape: Sequence[int], index_maps: Sequence[IndexMap]) -> int:
    sizes = {index_map.dim: index_map.size for index_map in index_maps}
    return prod(sizes.get(dim, size) for dim, size in enumerate(shape))
