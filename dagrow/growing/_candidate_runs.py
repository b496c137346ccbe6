"""Running the candidates of an operator: what they need is measured in as few passes over the batches as can be."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field

from dagrow.errors import GrowthError
from dagrow.graph import Dag
from dagrow.operators import Candidate, Moments, Needs, Operator, Preview, Steps
from dagrow.statistics import Objective, measure
from dagrow.surgery import Draft, Growth, check_preserved, check_unchanged, completed, disjoint, preview


@dataclass(frozen=True, eq=False)
class _Waiting:
    """The steps of a candidate that wait for moments."""

    where: str
    steps: Steps
    needs: Needs


@dataclass(eq=False)
class CandidateRuns:
    """All candidates of an operator, step by step.

    Those that need no preview are measured together, in one pass for the next step of each. Then come previews: those
    that change no layer in common are put into the network together, one pass for each such group.
    """

    dag: Dag
    objective: Objective
    operator: Operator
    growths: list[Growth] = field(default_factory=list)
    _plain: list[_Waiting] = field(default_factory=list)
    _previews: list[tuple[_Waiting, Preview]] = field(default_factory=list)

    def run(self, candidates: Sequence[Candidate]) -> list[Growth]:
        """What they could add, in the order in which it is known."""
        forward = True
        self._start(candidates)
        while self._plain or self._previews:
            if self._plain:
                waiting, self._plain = self._plain, []
                forward = self._measure(waiting) and forward
            else:
                previews, self._previews = self._previews, []
                for group in disjoint(previews, lambda member: member[1].widening):
                    self._measure_previewed(group)
        for growth in self.growths:
            if growth.preserving:
                check_unchanged(growth)
        _check_run(self.growths, forward)
        return [completed(growth) for growth in self.growths]

    def _start(self, candidates: Sequence[Candidate]) -> None:
        for candidate in candidates:
            steps = candidate.steps(self.objective)
            if not isinstance(steps, Generator):
                raise self._misused(candidate.where, f"are a {type(steps).__name__}, not a generator")
            self._resume(candidate.where, steps, None)

    def _resume(self, where: str, steps: Steps, moments: Moments | None) -> None:
        """To the next needs, or to the end."""
        try:
            needs = next(steps) if moments is None else steps.send(moments)
        except StopIteration as end:
            self._finish(where, end.value)
            return
        if not isinstance(needs, Needs):
            raise self._misused(where, f"yield a {type(needs).__name__}")
        waiting = _Waiting(where, steps, needs)
        if needs.preview is None:
            self._plain.append(waiting)
        else:
            self._previews.append((waiting, needs.preview))

    def _finish(self, where: str, result: object) -> None:
        if isinstance(result, Growth):
            self.growths.append(result)
        elif isinstance(result, (list, tuple)) and all(isinstance(item, Candidate) for item in result):
            self._start(result)
        elif result is not None:
            raise self._misused(where, f"return a {type(result).__name__}")

    def _misused(self, where: str, what: str) -> GrowthError:
        return GrowthError(
            f"{self.operator!r}: the steps of its candidate at {where} {what}; write a generator that yields "
            "Needs(pairs), and returns a Growth, None, or further candidates in a list."
        )

    def _measure(self, waiting: Sequence[_Waiting]) -> bool:
        """One pass for the next step of each; whether the model's own forward ran on every batch."""
        pairs = [pair for member in waiting for pair in member.needs.pairs]
        moments = measure(self.dag, self.objective, pairs, folds=self.operator.folds)
        for member in waiting:
            self._resume(member.where, member.steps, moments)
        return moments.forward

    def _measure_previewed(self, group: Sequence[tuple[_Waiting, Preview]]) -> None:
        """One pass with all previews of a group in the network."""
        moments = previewed(self.dag, self.objective, [member.needs for member, _ in group], self.operator.folds)
        for member, _ in group:
            self._resume(member.where, member.steps, moments)


def previewed(dag: Dag, objective: Objective, needs: Sequence[Needs], folds: int) -> Moments:
    """One pass with the new channels of previews in the network; no two change the same layer."""
    previews = [need.preview for need in needs if need.preview is not None]
    draft = Draft(dag, [(each.axis, each.widening) for each in previews])
    for each in previews:
        for producer, fan_in in each.fan_in.items():
            draft.fan_in(dag.edge(producer), each.widening.rows[producer], fan_in)
    change = draft.change()
    pairs = [pair for need in needs for pair in need.pairs]
    check_preserved(dag, objective, change, ", ".join(each.axis.name for each in previews))
    with preview(dag, change, change.tensors(dag.model, 0.0)):
        return measure(dag, objective, pairs, folds=folds, read=draft.read, written=draft.written)


def _check_run(growths: Sequence[Growth], forward: bool) -> None:
    """Raises GrowthError for new layers that act in a forward of the model's own which did not run on every batch."""
    lost = [growth for growth in growths if growth.change.new_paths and not forward]
    if lost:
        raise GrowthError(
            f"{lost[0].operator!r} at {lost[0].where}: the new layers would not run. They become part of the forward "
            f"of the {type(lost[0].dag.model).__name__} that was traced, and the step does not call it on every batch, "
            "but runs its layers in another way. Call the model itself in the step, model(...), or trace the module "
            "that the step calls; widths can grow with any step, with AddNeurons."
        )
