"""From operators to proposed growths: passes over the batches, solutions, and what is more than chance."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from dagrow.axes import disjoint
from dagrow.errors import GrowthError, listed
from dagrow.graph import Dag
from dagrow.growing._bottlenecks import _objective
from dagrow.growing._policies import expected_gain
from dagrow.operators import AddNeurons, Candidate, Operator, Stage
from dagrow.solvers import LEVEL, Moments, holm
from dagrow.statistics import Loss, Objective, Step, measure
from dagrow.surgery import Draft, Growth, check_preserved, check_unchanged, preview, transaction


def propose(
    dag: Dag,
    batches: Iterable[Any],
    loss: Loss | None = None,
    operators: Sequence[Operator] = (AddNeurons(),),
    *,
    step: Step | None = None,
    mode: str = "eval",
) -> list[Growth]:
    """Measures what every operator could add at every place. Changes nothing.

    Args:
        dag, batches, loss, step, mode: as for :func:`bottlenecks`.
        operators: ways to grow.

    Returns:
        Growths, the largest gain first: the held-out gain where there is one, else the gain on the samples. Their
        p-values are those of all operators and places together, see :func:`dagrow.solvers.holm`.

    Raises:
        BatchError, LossError: the batches or the loss do not fit.
        GrowthError: an operator was asked for a place that cannot grow, or nothing can.
    """
    objective = _objective(dag, batches, loss, step, mode)
    chosen = listed("operators", operators, Operator, "[dagrow.AddNeurons()]", empty=False)
    found = transaction(dag, lambda: [_growths(dag, objective, operator) for operator in chosen])
    growths = corrected([growth for growths, _ in found for growth in growths], sum(tests for _, tests in found))
    return sorted(growths, key=expected_gain, reverse=True)


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
            check_unchanged(growth)
    while stages:
        solved = [
            found for group in disjoint(stages, lambda s: s.widening) for found in _solved(dag, objective, group, folds)
        ]
        _check_solved(solved, operator, Growth, Stage)
        growths += [growth for growth in solved if isinstance(growth, Growth)]
        stages = [stage for stage in solved if isinstance(stage, Stage)]
    _check_run(growths, forward)
    return growths, tests


def corrected(growths: Sequence[Growth], tests: int, families: int = 1) -> list[Growth]:
    """Growths with p-values for all places together, see :func:`dagrow.solvers.holm`.

    Args:
        growths: with p-values for one test each, or None where chance was not asked about.
        tests: how many places were looked at, those where nothing was found among them.
        families: how many such calls share the 5 %.
    """
    alone = {growth: growth.p_value for growth in growths if growth.p_value is not None}
    together = dict(zip(alone, holm(list(alone.values()), tests, families), strict=True))
    return [
        replace(growth, p_value=together[growth], significant=growth.significant and together[growth] <= LEVEL)
        if growth in together
        else growth
        for growth in growths
    ]


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
    lost = [growth for growth in growths if growth.change.new_paths and not forward]
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
    check_preserved(dag, objective, change, ", ".join(stage.axis.name for stage in stages))
    with preview(dag, change):
        tensors = change.tensors(dag.model, 0.0)
        return measure(dag, objective, pairs, folds=folds, preview=tensors, read=draft.read, written=draft.written)
