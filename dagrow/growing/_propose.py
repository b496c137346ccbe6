"""``propose``: what operators could add, with p-values for all places that were looked at together."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Unpack

from rich.table import Table

from dagrow._progress import with_progress
from dagrow._text import Printable, render
from dagrow.errors import listed
from dagrow.graph import Dag
from dagrow.growing._bottlenecks import objective_of
from dagrow.growing._candidate_runs import CandidateRuns
from dagrow.growing._policies import expected_gain
from dagrow.operators import AddNeurons, Operator
from dagrow.solvers import LEVEL, holm
from dagrow.statistics import Loss, MeasureOptions, Objective, Step
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
) -> list[Growth]:
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
        p-values are those of all operators and places together, see :func:`dagrow.solvers.holm`.

    Raises:
        BatchError, LossError: the batches or the loss do not fit.
        GrowthError: an operator was asked for a place that cannot grow, or nothing can.
    """
    objective = objective_of(dag, batches, loss, step, mode, options)
    operators = listed("operators", operators, Operator, "[dagrow.AddNeurons()]", empty=False)
    proposals = transaction(dag, lambda: [growths_of(dag, objective, operator) for operator in operators])
    tests = sum(count for _, count in proposals)
    growths = corrected([growth for growths, _ in proposals for growth in growths], tests)
    return _Growths(sorted(growths, key=expected_gain, reverse=True))


class _Growths(Printable, list[Growth]):
    """Growths that print as a table."""

    def __str__(self) -> str:
        table = Table("operator", "where", "neurons", "gain", "held out", "p", "parameters", "FLOPs")
        for g in self:
            heldout = "" if g.heldout_gain is None else f"{g.heldout_gain:.4g} ± {g.heldout_error:.2g}"
            chance = "" if g.p_value is None else f"{g.p_value:.2g}"
            cost = f"{g.cost.parameters:+,}", f"{g.cost.flops:+,}"
            table.add_row(repr(g.operator), g.where, str(g.neurons), f"{g.gain:.4g}", heldout, chance, *cost)
        return render(table) if self else "no growth"


def growths_of(dag: Dag, objective: Objective, operator: Operator) -> tuple[list[Growth], int]:
    """What an operator could add, and how many places it looked at."""
    candidates = operator.candidates(dag)
    return CandidateRuns(dag, objective, operator).run(candidates), sum(candidate.tests for candidate in candidates)


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
