"""The verbs: bottlenecks, propose, grow."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch.optim import Optimizer

from dagrow.dag import Dag
from dagrow.draft import Change, Draft
from dagrow.errors import GrowthError, check_real, listed
from dagrow.features import Goal, Reads
from dagrow.growth import Growth, Receipt
from dagrow.measure import measure
from dagrow.moments import Moments, Pair
from dagrow.objective import Loss, Objective, Step
from dagrow.operators import AddNeurons, Operator
from dagrow.operators.base import Candidate, Stage
from dagrow.optimizers import check_optimizer
from dagrow.planning import worthy
from dagrow.policies import worth
from dagrow.rounding import FACTOR, jittered
from dagrow.search import applied, summed
from dagrow.significance import corrected
from dagrow.solve import best_move
from dagrow.surgery import preview, transaction
from dagrow.tables import render
from dagrow.undisturbed import undisturbed
from dagrow.widening import disjoint

__all__ = ["Bottleneck", "Bottlenecks", "bottlenecks", "grow", "propose"]


@dataclass(frozen=True)
class Bottleneck:
    """What one edge cannot follow.

    Attributes:
        edge: the edge's name.
        goal: ``E|v|^2``.
        explained: the part that the best move of its own weights follows.
        bottleneck: the rest, ``E|v_perp|^2``.
    """

    edge: str
    goal: float
    explained: float
    bottleneck: float

    @property
    def share(self) -> float:
        """The part of the goal that is out of reach, 0 to 1."""
        return self.bottleneck / self.goal if self.goal else 0.0


class Bottlenecks(Mapping[str, Bottleneck]):
    """Bottlenecks by edge, largest first; prints as a table."""

    def __init__(self, found: Iterable[Bottleneck], samples: int, loss: float, left_out: tuple[str, ...] = ()) -> None:
        self._found = {b.edge: b for b in sorted(found, key=lambda b: -b.bottleneck)}
        self.samples, self.loss, self.left_out = samples, loss, left_out

    def __getitem__(self, edge: str) -> Bottleneck:
        return self._found[edge]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def __str__(self) -> str:
        table = Table(
            "edge",
            "goal",
            "own weights follow",
            "bottleneck",
            "share",
            title=f"{self.samples} samples, loss {self.loss:.6g}",
        )
        for b in self.values():
            table.add_row(b.edge, f"{b.goal:.4g}", f"{b.explained:.4g}", f"{b.bottleneck:.4g}", f"{b.share:.1%}")
        return "\n".join([render(table), *(f"Left out: {why}." for why in self.left_out)])


def bottlenecks(
    dag: Dag, batches: Iterable[Any], loss: Loss | None = None, *, step: Step | None = None, mode: str = "eval",
    ridge: float = 0.0,
) -> Bottlenecks:  # fmt: skip
    """Measures at every edge which part of its goal its own weights can follow. Changes nothing.

    Args:
        dag: what :func:`dagrow.trace` returned.
        batches: any re-iterable of ``(inputs, target)``.
        loss: ``loss(output, target)``, a mean or a sum over samples.
        step: ``step(model, batch)``, instead of ``loss``, for any other training step.
        mode: the mode that the model runs in, ``"eval"`` or ``"train"``.
        ridge: relative to each feature's second moment.

    Raises:
        BatchError, LossError: the batches or the loss do not fit.
    """
    check_real("bottlenecks", 0, ridge=ridge)
    objective = _objective(dag, batches, loss, step, mode)
    return transaction(dag, lambda: _bottlenecks(dag, objective, ridge))


def _objective(dag: Dag, batches: Iterable[Any], loss: Loss | None, step: Step | None, mode: str) -> Objective:
    """Refuses what is no dag of its model any more before anything runs."""
    if not isinstance(dag, Dag):
        raise GrowthError(
            f"a {type(dag).__name__} was given where a dag belongs; make one first: "
            "dag = dagrow.trace(model, example_inputs)."
        )
    dag.check()
    return Objective(dag.model, batches, loss, step=step, mode=mode)


def _bottlenecks(dag: Dag, objective: Objective, ridge: float) -> Bottlenecks:
    keys = [(edge, Reads(edge.name, edge.bias), Goal(edge.name)) for edge in dag.edges if not edge.shared]
    if not keys:
        raise GrowthError(f"no layer can be measured, as dagrow has a rule for none that acts at one place:\n{dag}")
    pairs: list[Pair] = [pair for _, b, v in keys for pair in ((b, b), (b, v), (v, v))]
    m = measure(dag, objective, pairs, folds=1)
    moves = [(edge, best_move(m, b, v, ridge)) for edge, b, v in keys]
    return Bottlenecks(
        (Bottleneck(e.name, x.goal, x.goal - x.bottleneck, x.bottleneck) for e, x in moves), m.samples, m.loss,
        tuple(edge.shared for edge in dag.edges if edge.shared),
    )  # fmt: skip


def propose(
    dag: Dag, batches: Iterable[Any], loss: Loss | None = None, operators: Sequence[Operator] = (AddNeurons(),), *,
    step: Step | None = None, mode: str = "eval",
) -> list[Growth]:  # fmt: skip
    """Measures what every operator could add at every place. Changes nothing.

    Args:
        dag, batches, loss, step, mode: as for :func:`bottlenecks`.
        operators: ways to grow.

    Returns:
        Growths, the largest gain first: the held-out gain where there is one, else the gain on the samples. Their
        p-values are those of all operators and places together, see :func:`dagrow.significance.corrected`.

    Raises:
        BatchError, LossError: the batches or the loss do not fit.
        GrowthError: an operator was asked for a place that cannot grow, or nothing can.
    """
    objective = _objective(dag, batches, loss, step, mode)
    chosen = listed("operators", operators, Operator, "[dagrow.AddNeurons()]", empty=False)
    found = transaction(dag, lambda: [_growths(dag, objective, operator) for operator in chosen])
    growths = corrected([growth for growths, _ in found for growth in growths], sum(tests for _, tests in found))
    return sorted(growths, key=worth, reverse=True)


def _growths(dag: Dag, objective: Objective, operator: Operator) -> tuple[list[Growth], int]:
    """What an operator could add, and how many places it looked at.

    One pass for all candidates, more for those that ask for them, then as few as possible for previews.
    """
    waiting: Sequence[Candidate] = operator.candidates(dag)
    growths, stages, folds, tests = list[Growth](), list[Stage](), operator.folds, sum(c.tests for c in waiting)
    forward = True
    while waiting:
        m = measure(dag, objective, [pair for c in waiting for pair in c.pairs()], folds=folds)
        forward = forward and m.forward
        solved = [found for c in waiting for found in _listed(c.solve(m, objective))]
        _check_solved(solved, operator, Growth, Candidate)
        growths += [growth for growth in solved if isinstance(growth, Growth)]
        stages += [stage for stage in solved if isinstance(stage, Stage)]
        waiting = [c for c in solved if isinstance(c, Candidate) and not isinstance(c, Stage)]
    for growth in growths:
        if growth.preserving:
            _check_unchanged(growth)
    while stages:
        solved = [found for group in disjoint(stages, lambda s: s.widening)
                  for found in _solved(dag, objective, group, folds)]  # fmt: skip
        _check_solved(solved, operator, Growth, Stage)
        growths += [growth for growth in solved if isinstance(growth, Growth)]
        stages = [stage for stage in solved if isinstance(stage, Stage)]
    _check_run(growths, forward)
    return growths, tests


def _solved(dag: Dag, objective: Objective, stages: Sequence[Stage], folds: int) -> list[Any]:
    m = _previewed(dag, objective, stages, folds)
    return [found for stage in stages for found in _listed(stage.solve(m, objective))]


def _listed(found: Any) -> Sequence[Any]:
    """What a candidate came to, however many it is."""
    if found is None:
        return []
    return found if isinstance(found, (list, tuple)) else [found]


def _check_solved(found: Sequence[object], operator: Operator, *kinds: type) -> None:
    wrong = [type(item).__name__ for item in found if not isinstance(item, kinds)]
    if wrong:
        raise GrowthError(
            f"{operator!r}: solve of a candidate returned a {wrong[0]}; give a Growth, a Stage, None, or, before a "
            "preview, another Candidate."
        )


def _check_run(growths: Sequence[Growth], forward: bool) -> None:
    """New layers act in the model's own forward alone.

    Args:
        forward: whether it ran on every batch that was measured.
    """
    lost = [growth for growth in growths if growth.change.branches and not forward]
    if lost:
        raise GrowthError(
            f"{lost[0].operator!r} at {lost[0].where}: the new layers would not run. They become part of the forward "
            f"of the {type(lost[0].dag.model).__name__} that was traced, and the step does not call it on every batch, "
            "but runs its layers in another way. Call the model itself in the step, model(...), or trace the module "
            "that the step calls; widths can grow with any step, with AddNeurons."
        )


def _previewed(dag: Dag, objective: Objective, stages: Sequence[Stage], folds: int) -> Moments:
    draft = Draft(dag, [(stage.axis, stage.widening) for stage in stages])
    for stage in stages:
        stage.fill(draft)
    change = draft.change()
    pairs = [pair for stage in stages for pair in stage.pairs()]
    _check_preserved(dag, objective, change, ", ".join(stage.axis.name for stage in stages))
    with preview(dag, change):
        tensors = change.tensors(dag.model, 0.0)
        return measure(dag, objective, pairs, folds=folds, preview=tensors, read=draft.read, written=draft.written)


def _check_preserved(dag: Dag, objective: Objective, change: Change, where: str) -> None:
    """New channels with zero fan-out must not change the loss of a batch: the last net under the label rules."""
    before, after, rounded = _compared(dag, objective, change, 0.0)
    if not rounded:
        raise GrowthError(
            f"the model computes something else when {where} is wider, although nothing reads the new channels: loss "
            f"{before:.9g} becomes {after:.9g}. Its forward uses the width where its graph does not show it; leave the "
            "axis out with axes=."
        )


def _check_unchanged(growth: Growth) -> None:
    """A growth that says that it preserves the function does so at its full amplitude."""
    before, after, rounded = _compared(growth.dag, growth.objective, growth.change, 1.0)
    if not rounded:
        raise GrowthError(
            f"{growth.operator!r} at {growth.where} would change the loss of a batch from {before:.9g} to {after:.9g}: "
            "on the way to the consumers a zero does not stay zero, which this init needs. Use another init, or leave "
            "the axis out with axes=."
        )


def _compared(dag: Dag, objective: Objective, change: Change, gamma: float) -> tuple[float, float, bool]:
    """The loss of a batch before and after a change, in eval mode, and whether they differ by rounding alone."""
    with undisturbed(objective.model), torch.no_grad():
        objective.model.eval()
        batch = next(iter(objective))[0]
        before = objective.value(batch)
        with preview(dag, change):
            after = objective.value(batch, change.tensors(dag.model, gamma))
        slack = max(1e-9, 100 * torch.finfo(before.dtype).eps) * abs(float(before)) + 1e-12
        apart = abs(float(after) - float(before))
        if apart > slack:
            jitter = [abs(float(objective.value(batch, one) - before)) for one in jittered(dag.model)]
            slack = FACTOR * max(jitter, default=0.0)
    return float(before), float(after), apart <= slack


def grow(
    dag: Dag, batches: Iterable[Any], loss: Loss | None = None, operators: Sequence[Operator] = (AddNeurons(),), *,
    validation: Iterable[Any] | None = None, optimizer: Optimizer | None = None, step: Step | None = None,
    mode: str = "eval",
) -> Receipt:  # fmt: skip
    """Measures, proposes, and applies the best growth of each operator in turn, at the amplitude of a line search.

    A growth is applied only if its held-out gain is more than chance and the loss falls; so nothing may be added. Where
    nothing is to be gained, at most 5 % of calls apply anything, over all operators and places. (Nobody asks about
    chance without folds, where ``AddNeurons`` is given k, and of growths that leave the function as it is.)

    Args:
        dag: what :func:`dagrow.trace` returned; its model grows in place.
        batches, loss, step, mode: as for :func:`bottlenecks`.
        operators: asked one after the other, each on the model that the one before has grown.
        validation: batches for the line search; by default those that were measured.
        optimizer: its state is brought along at once, for every parameter that grows.

    Returns:
        A receipt; its ``parts``, one per applied growth, tell the drop of a move and of new neurons apart.

    Raises:
        BatchError, LossError, GrowthError, OptimizerError: nothing has changed.
    """
    objective = _objective(dag, batches, loss, step, mode)
    chosen = listed("operators", operators, Operator, "[dagrow.AddNeurons()]", empty=False)
    judge = objective if validation is None else objective.with_batches(validation, "validation")
    check_optimizer(optimizer, dag.model)

    def work() -> Receipt:
        grown = [_grown(dag, objective, judge, operator, optimizer, len(chosen)) for operator in chosen]
        parts = [part for part in grown if part is not None]
        return summed(parts, parts[0].loss_before if parts else judge.mean())

    return transaction(dag, work)


def _grown(
    dag: Dag, objective: Objective, judge: Objective, operator: Operator, optimizer: Optimizer | None, operators: int
) -> Receipt | None:
    """The operator's best growth that lowers the loss, applied; None if there is none.

    Args:
        operators: how many operators are asked, which share the 5 % of growths that may be chance.
    """
    growths = worthy(corrected(*_growths(dag, objective, operator), operators))
    before = judge.mean() if growths else 0.0
    for growth in sorted(growths, key=worth, reverse=True):
        receipt = applied(growth, judge, before, optimizer)
        if receipt is not None:
            return receipt
    return None
