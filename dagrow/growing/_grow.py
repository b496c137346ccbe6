"""``grow``: measures, proposes, and applies what lowers the loss."""

from collections.abc import Iterable, Sequence
from typing import Any, Unpack

from dagrow._progress import with_progress
from dagrow.errors import listed
from dagrow.graph import Dag, check_owners
from dagrow.growing._bottlenecks import objective_of
from dagrow.growing._left_out import LeftOut
from dagrow.growing._line_search import combined, tried
from dagrow.growing._planning import applicable
from dagrow.growing._policies import expected_gain
from dagrow.growing._propose import corrected, run_of
from dagrow.growing._sample_size import check_folds, enlarged, judge_of
from dagrow.operators import AddNeurons, Operator
from dagrow.statistics import Loss, MeasureOptions, Objective, Step
from dagrow.surgery import Optimizers, Receipt, check_optimizer, transaction


@with_progress
def grow(
    dag: Dag,
    batches: Iterable[Any],
    loss: Loss | None = None,
    operators: Sequence[Operator] = (AddNeurons(),),
    *,
    validation: Iterable[Any] | None = None,
    optimizer: Optimizers = None,
    step: Step | None = None,
    mode: str = "eval",
    **options: Unpack[MeasureOptions],
) -> Receipt:
    """Measures, proposes, and applies the best growth of each operator in turn, at the amplitude of a line search.

    A growth is applied only if its held-out gain is more than chance and the loss falls; so nothing may be added. Where
    nothing is to be gained, at most 5 % of calls apply anything, over all operators and places. (Nobody asks about
    chance without folds, where ``AddNeurons`` is given k, and of growths that leave the function as it is.) Of
    ``RemoveNeurons`` that one is applied by which the loss is predicted to rise least, though it rises.

    Args:
        dag: what :func:`dagrow.trace` returned; its model grows in place.
        batches: as for :func:`bottlenecks`, like ``loss``, ``step`` and ``mode``.
        loss: of a batch.
        operators: asked one after the other, each on the model that the one before has grown.
        validation: batches for the line search; by default those that were measured, or, where ``samples`` draws some,
            others.
        optimizer: one or a list; their state is brought along at once, for every parameter that grows.
        step: instead of ``loss``.
        mode: that the model runs in.
        options: how batches are measured, see :class:`dagrow.statistics.MeasureOptions`.

    Returns:
        A receipt; its ``parts``, one per applied growth, tell the drop of a move and of new neurons apart. Places that
        failed are in ``left_out``, with the reason; the others do not suffer from it.

    Raises:
        BatchError, LossError, GrowthError, OptimizerError: nothing has changed.
    """
    objective = objective_of(dag, batches, loss, step, mode, options)
    operators = listed("operators", operators, Operator, "[dagrow.AddNeurons()]", empty=False)
    check_folds(options, operators)
    judge = judge_of(objective) if validation is None else objective.with_batches(validation, "validation")
    check_optimizer(optimizer, dag.model)
    check_owners(dag.model)

    left_out = LeftOut()

    def work() -> Receipt:
        runs = [
            grown_by(operator, dag, objective, judge, optimizer, left_out, len(operators)) for operator in operators
        ]
        if not any(worked for _, worked in runs):
            left_out.refuse()
        parts = [part for part, _ in runs if part is not None]
        return combined(parts, parts[0].loss_before if parts else judge.reported(judge.mean()), left_out.notes)

    return transaction(dag, work)


def grown_by(
    operator: Operator,
    dag: Dag,
    objective: Objective,
    judge: Objective,
    optimizer: Optimizers,
    left_out: LeftOut,
    operators: int = 1,
) -> tuple[Receipt | None, bool]:
    """Applies the best growth of an operator that lowers the loss, if there is one.

    Args:
        operator: asked.
        dag: of the model.
        objective: what is measured.
        judge: the loss by which amplitudes are chosen.
        optimizer: one or a list.
        left_out: takes the places that fail.
        operators: how many share the 5 % of calls that apply anything by chance.

    Returns:
        The receipt or None, and whether any place worked.
    """
    run, tests = run_of(dag, objective, operator, left_out)
    while enlarged(objective, run.growths):
        run, tests = run_of(dag, objective, operator, left_out)
    growths = applicable(corrected(run.growths, tests, operators))
    before = judge.mean() if growths else 0.0
    for growth in sorted(growths, key=expected_gain, reverse=True):
        receipt = tried(growth, judge, before, optimizer, left_out)
        if receipt is not None:
            return receipt, True
    return None, run.worked
