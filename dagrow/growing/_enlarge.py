"""``enlarge``: the whole job in one call, a trained model made larger."""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from math import floor
from typing import Any, Unpack

from dagrow._progress import with_progress
from dagrow.errors import GrowthError, check_real
from dagrow.graph import Dag, check_owners
from dagrow.growing._bottlenecks import objective_of
from dagrow.growing._grow import grown_by
from dagrow.growing._left_out import LeftOut
from dagrow.growing._line_search import combined
from dagrow.growing._planning import Budget
from dagrow.growing._sample_size import judge_of
from dagrow.operators import AddNeurons
from dagrow.statistics import Loss, MeasureOptions, Objective, Step
from dagrow.surgery import Cost, Draft, Optimizers, Receipt, check_optimizer, cost_of, transaction

FACTOR = 2.0  #: of widths, where neither a factor nor a budget is given
LARGEST = 64.0  #: factor that is tried for a budget
STEPS = 12  #: of the bisection for it


@with_progress
def enlarge(
    dag: Dag,
    batches: Iterable[Any],
    loss: Loss | None = None,
    factor: float | None = None,
    *,
    budget: Budget | None = None,
    validation: Iterable[Any] | None = None,
    optimizer: Optimizers = None,
    step: Step | None = None,
    mode: str = "eval",
    **options: Unpack[MeasureOptions],
) -> Receipt:
    """Widens all axes that can grow by one factor, with the neurons that explain most of what is missing.

    For a trained model that has stopped improving. Axes come one after the other, in the order of the model, each
    measured on what those before have made of it. A width of w gets ``(factor - 1) w`` neurons, rounded: by
    ``AddNeurons``, at the amplitude of a line search; where no amplitude lowers the loss, with a random fan-in and a
    fan-out of zero, which training fills. So every width comes to what was asked for, and the loss on the validation
    batches is never above the one before.

    Args:
        dag: what :func:`dagrow.trace` returned; its model grows in place.
        batches: as for :func:`grow`, like all that is not named here.
        loss: of a batch.
        factor: of each width; 2 if there is no budget either.
        budget: what all may add together. The factor is the largest that fits, and at most the one that is given.
        validation: batches for the line searches.
        optimizer: one or a list, which go on with the larger model.
        step: instead of ``loss``.
        mode: that the model runs in.
        options: how batches are measured, see :class:`dagrow.statistics.MeasureOptions`.

    Returns:
        A receipt, with a part for each axis. Axes that failed are in ``left_out``, with the reason.

    Raises:
        BatchError, LossError, OptimizerError: nothing has changed.
        GrowthError: so too; or the factor or the budget is too small for one neuron.
    """
    check_real("enlarge", above=1, none="2, or what the budget allows", factor=factor)
    if not isinstance(budget, Budget | None):
        raise GrowthError(
            f"enlarge(budget=...): a {type(budget).__name__} was given; give dagrow.Budget(parameters=...)."
        )
    objective = objective_of(dag, batches, loss, step, mode, options)
    judge = judge_of(objective) if validation is None else objective.with_batches(validation, "validation")
    check_optimizer(optimizer, dag.model)
    check_owners(dag.model)
    return transaction(dag, lambda: _enlarged(dag, objective, judge, factor, budget or Budget(), optimizer))


def _enlarged(
    dag: Dag, objective: Objective, judge: Objective, factor: float | None, budget: Budget, optimizer: Optimizers
) -> Receipt:
    if factor is None:
        factor = FACTOR if budget == Budget() else LARGEST
    wanted, left_out, parts = _wanted(dag, factor, budget), LeftOut(), list[Receipt]()
    for axis, k in wanted.items():
        for operator in (AddNeurons(k=k, axes=(axis,)), AddNeurons(k=k, axes=(axis,), init="zero", folds=1)):
            receipt, _ = grown_by(operator, dag, objective, judge, optimizer, left_out)
            if receipt is not None:
                parts.append(receipt)
                break
    if not parts:
        left_out.refuse()
    return combined(parts, parts[0].loss_before if parts else judge.reported(judge.mean()), left_out.notes)


def _wanted(dag: Dag, factor: float, budget: Budget) -> dict[str, int]:
    """New neurons by axis, for the largest factor that the budget holds."""
    names = dict.fromkeys(candidate.where for candidate in AddNeurons(k=1).candidates(dag))
    widths = {name: dag.axis(name).width for name in names}

    def neurons(factor: float) -> dict[str, int]:
        new = {name: floor((factor - 1) * width + 0.5) for name, width in widths.items()}
        return {name: k for name, k in new.items() if k}

    def fits(new: Mapping[str, int]) -> bool:
        cost = _cost(dag, new)
        return budget.allows(parameters=cost.parameters, flops=cost.flops, neurons=sum(new.values()), growths=len(new))

    wanted = neurons(factor)
    if wanted and not fits(wanted):
        low, high = 1.0, factor
        for _ in range(STEPS):
            middle = (low * high) ** 0.5
            low, high = (middle, high) if fits(neurons(middle)) else (low, middle)
        wanted = neurons(low)
    if not wanted:
        what = f"factor={factor:g} adds" if budget == Budget() else f"{budget!r} allows"
        sizes = ", ".join(f"{width} ({name})" for name, width in widths.items())
        raise GrowthError(f"enlarge: {what} not one neuron to widths of {sizes}; give a larger one.")
    return wanted


def _cost(dag: Dag, new: Mapping[str, int]) -> Cost:
    """Of widening several axes."""
    changes = []
    for name, k in new.items():
        axis = dag.axis(name)
        with suppress(GrowthError):  # one that cannot grow so is left out when its turn comes
            changes.append(Draft(dag, [(axis, dag.widening(axis, k))]).change())
    return cost_of(dag, *changes)
