"""``enlarge``: the whole job in one call, a trained model made larger."""

from collections.abc import Iterable
from typing import Any, Unpack

from dagrow._progress import with_progress
from dagrow.errors import GrowthError, check_real
from dagrow.graph import Axis, Dag, check_owners
from dagrow.growing._bottlenecks import objective_of
from dagrow.growing._factor import LARGEST, affordable, new_neurons
from dagrow.growing._grow import grown_by
from dagrow.growing._left_out import LeftOut
from dagrow.growing._line_search import combined
from dagrow.growing._planning import Budget, check_kinds
from dagrow.growing._sample_size import judge_of
from dagrow.operators import AddNeurons
from dagrow.statistics import Loss, MeasureOptions, Objective, Step
from dagrow.surgery import Optimizers, Receipt, check_optimizer, transaction


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
    """Widens all axes that can grow by one factor, with the neurons that explain most.

    For a trained model that has stopped improving. Axes come one after the other, in the order of the model, each
    measured on what those before have made of it. A width of w gets ``(factor - 1) w`` neurons, rounded: those of
    ``AddNeurons`` at the amplitude of a line search; where no amplitude lowers the loss, or there is no closed form,
    neurons that leave the function as it is (a random fan-in and a fan-out of zero), which training fills.

    Args:
        dag: what :func:`dagrow.trace` returned; its model grows in place.
        batches: as for :func:`grow`, like all that is not named here.
        loss: of a batch.
        factor: of each width, at most 1000; 2 if there is no budget either.
        budget: what all may add together, in parameters, FLOPs (as :attr:`Growth.cost` counts them) or neurons. The
            factor is the largest that fits, and at most the one that is given.
        validation: batches for the line searches.
        optimizer: one or a list, which go on with the larger model.
        step: instead of ``loss``.
        mode: the mode that the model runs in.
        options: how batches are measured, see :class:`dagrow.statistics.MeasureOptions`.

    Returns:
        A receipt, with a part for each axis. What failed is in ``left_out``, with the reason: an axis as a whole, or,
        where it has neurons that leave the function as it is, those with a closed form.

    Raises:
        BatchError, LossError, OptimizerError: nothing has changed.
        GrowthError: so too; or the factor or the budget is too small for one neuron.
    """
    check_real("enlarge", above=1, most=LARGEST, none="2, or what the budget allows", factor=factor)
    if budget is not None:
        check_kinds(budget=(budget, Budget))
    objective = objective_of(dag, batches, loss, step, mode, options)
    judge = judge_of(objective) if validation is None else objective.with_batches(validation, "validation")
    check_optimizer(optimizer, dag.model)
    check_owners(dag.model)
    return transaction(dag, lambda: _enlarged(dag, objective, judge, factor, budget or Budget(), optimizer))


def _enlarged(
    dag: Dag, objective: Objective, judge: Objective, factor: float | None, budget: Budget, optimizer: Optimizers
) -> Receipt:
    left_out, parts = LeftOut(), list[Receipt]()
    for name, wanted in new_neurons(dag, factor, budget).items():
        k = affordable(dag, name, wanted, budget)
        if not k:
            left_out.add(name, GrowthError("nothing is left of the budget"))
        for operator in _operators(dag.axis(name), k) if k else ():
            receipt, _ = grown_by(operator, dag, objective, judge, optimizer, left_out)
            if receipt is not None:
                assert receipt.growth is not None
                parts.append(receipt)
                budget = budget.minus(receipt.growth)
                break
    if not parts:
        left_out.refuse()
    return combined(parts, parts[0].loss_before if parts else judge.reported(judge.mean()), left_out.notes)


def _operators(axis: Axis, k: int) -> list[AddNeurons]:
    """What is tried, first to last."""
    fitted = [AddNeurons(k=k, axes=(axis.name,))] if {"optimal", "random"} & {*axis.inits} else []
    return fitted + [AddNeurons(k=k, axes=(axis.name,), init=i, folds=1) for i in ("zero", "copy") if i in axis.inits]
