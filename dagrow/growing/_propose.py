"""``propose``: what operators could add, with p-values for all places that were looked at together."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Unpack

import torch

from dagrow._progress import with_progress
from dagrow.errors import listed
from dagrow.graph import Dag
from dagrow.growing._bottlenecks import objective_of
from dagrow.growing._candidate_runs import CandidateRuns
from dagrow.growing._left_out import Growths, LeftOut
from dagrow.growing._policies import expected_gain
from dagrow.growing._sample_size import check_folds, enlarged
from dagrow.operators import AddNeurons, Operator
from dagrow.solvers import LEVEL, holm
from dagrow.statistics import KeptCaptures, Loss, MeasureOptions, Objective, Step
from dagrow.surgery import Growth, transaction


@with_progress
def propose(
    dag: Dag,
    batches: Iterable[Any],
    loss: Loss | None = None,
    operators: Sequence[Operator] = (AddNeurons(),),
    *,
    step: Step | None = None,
    mode: str = "eval",
    **options: Unpack[MeasureOptions],
) -> Growths:
    """Measures what every operator could add at every place. Changes nothing.

    Args:
        dag: as for :func:`bottlenecks`, like all but the operators.
        batches: what is measured.
        loss: of a batch.
        operators: ways to grow.
        step: instead of ``loss``.
        mode: that the model runs in.
        options: how batches are measured, see :class:`dagrow.statistics.MeasureOptions`.

    Returns:
        Growths, the largest gain first: the held-out gain where there is one, else the gain on the samples. Their
        p-values are those of all operators and places together, see :func:`dagrow.solvers.holm`. Places that failed
        are in ``left_out``, with the reason; the others do not suffer from it.

    Raises:
        BatchError, LossError: the batches or the loss do not fit.
        GrowthError: an operator was asked for a place that cannot grow, nothing can, or every place fails.
    """
    objective = objective_of(dag, batches, loss, step, mode, options)
    operators = listed("operators", operators, Operator, "[dagrow.AddNeurons()]", empty=False)
    check_folds(options, operators)
    return transaction(dag, lambda: _proposed(dag, objective, operators))


def _proposed(dag: Dag, objective: Objective, operators: Sequence[Operator]) -> Growths:
    left_out = LeftOut()
    runs = [run_of(dag, objective, operator, left_out) for operator in operators]
    if not any(run.worked for run, _ in runs):
        left_out.refuse()
    growths = corrected([growth for run, _ in runs for growth in run.growths], sum(tests for _, tests in runs))
    if enlarged(objective, growths):
        return _proposed(dag, objective, operators)
    return Growths(sorted(growths, key=expected_gain, reverse=True), left_out.notes)


@torch.inference_mode(False)
def run_of(dag: Dag, objective: Objective, operator: Operator, left_out: LeftOut) -> tuple[CandidateRuns, int]:
    """What an operator could add, and how many places it looked at. Those that fail are left out."""
    candidates, kept = operator.candidates(dag), KeptCaptures(dag.model)
    runs = CandidateRuns(dag, objective, operator, left_out, kept=kept)
    runs.run(candidates)
    return runs, sum(candidate.tests for candidate in candidates)


def corrected(growths: Sequence[Growth], tests: int, families: int = 1) -> list[Growth]:
    """Growths with p-values for all places together, see :func:`dagrow.solvers.holm`.

    Args:
        growths: with p-values for one test each, or None where chance was not asked about.
        tests: how many places were looked at, those where nothing was found among them.
        families: how many such calls share the 5 %.

    Returns:
        The same growths, in their order.
    """
    alone = {growth: growth.p_value for growth in growths if growth.p_value is not None}
    together = dict(zip(alone, holm(list(alone.values()), tests, families), strict=True))
    return [
        replace(growth, p_value=together[growth], significant=growth.significant and together[growth] <= LEVEL)
        if growth in together
        else growth
        for growth in growths
    ]
