"""Running the candidates of an operator: what they need is measured in as few passes over the batches as can be."""

from collections import Counter
from collections.abc import Generator, Hashable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

from dagrow.errors import GrowthError, LimitError
from dagrow.graph import Dag
from dagrow.growing._left_out import LeftOut, halves, is_of_place
from dagrow.operators import Candidate, Moments, Needs, Operator, Preview, Steps
from dagrow.statistics import Feature, KeptCaptures, Objective, measure
from dagrow.surgery import (
    Change,
    Draft,
    Growth,
    check_preserved,
    check_unchanged,
    completed,
    disjoint,
    noted_draws,
    preview,
)


@dataclass(frozen=True, eq=False)
class _Waiting:
    """The steps of a candidate that wait for moments."""

    where: str
    steps: Steps
    needs: Needs

    @property
    def preview(self) -> Preview:
        """The new channels that have to be in the model."""
        assert self.needs.preview is not None
        return self.needs.preview


@dataclass(eq=False)
class CandidateRuns:
    """All candidates of an operator, step by step.

    Those that need no preview are measured together, in one pass for the next step of each. Then come previews: those
    that change no layer in common are put into the network together, one pass for each such group, and another for what
    is asked of the same previews next. What fails together is measured again in halves, down to the places that fail
    alone: these are left out.

    Attributes:
        worked: whether any candidate came to its end.
        forward: whether the model's own forward ran on every batch.
        kept: what passes left.
    """

    dag: Dag
    objective: Objective
    operator: Operator
    left_out: LeftOut
    growths: list[Growth] = field(default_factory=list)
    worked: bool = False
    forward: bool = True
    kept: KeptCaptures = field(default_factory=KeptCaptures)
    _plain: list[_Waiting] = field(default_factory=list)
    _previews: list[_Waiting] = field(default_factory=list)
    _later: Sequence[Feature] = ()  #: of candidates that are measured after others

    def run(self, candidates: Sequence[Candidate]) -> list[Growth]:
        """What they could add, in the order in which it is known."""
        self._start(candidates)
        if self.objective.limits.seconds is None:
            self._go_on()
        else:
            self._go_on_in_time()
        self.growths = [noted_draws(completed(growth)) for growth in self.growths if self._holds(growth)]
        self.worked |= bool(self.growths)
        return self.growths

    def _go_on(self) -> None:
        """Until no candidate waits any more."""
        while self._plain or self._previews:
            if self._plain:
                waiting, self._plain = self._plain, []
                self._measure(waiting)
            else:
                self._measure_previews()

    def _go_on_in_time(self) -> None:
        """One candidate after the other, each to its end, while one that takes as long as others would be in time."""
        waiting, limits = [*self._plain, *self._previews], self.objective.limits
        features = [feature for each in waiting for pair in each.needs.pairs for feature in pair]
        self._later = [feature for feature in features if isinstance(feature, Feature)]
        for each in waiting:
            expected = max(limits.taken[1:] or limits.taken, default=0.0)  # the first one looks at the batches, too
            if not limits.allow(expected):
                self.left_out.add(each.where, LimitError(f"max_seconds={limits.seconds:g} would have been over"))
                continue
            self._plain, self._previews = ([each], []) if each.needs.preview is None else ([], [each])
            before = limits.spent
            self._go_on()
            limits.taken.append(limits.spent - before)

    def _measure_previews(self) -> None:
        """Group by group, each with all that it asks for."""
        previews, self._previews = self._previews, []
        together = _sharing(previews)
        for group in disjoint(together, lambda members: members[0].preview.widening):
            self._measure_previewed([member for members in group for member in members])
            if self._previews:
                self._measure_previews()

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
        except Exception as error:  # what is computed there is of the place
            self._leave_out(where, error, grown=False)
            return
        if not isinstance(needs, Needs):
            raise self._misused(where, f"yield a {type(needs).__name__}")
        (self._plain if needs.preview is None else self._previews).append(_Waiting(where, steps, needs))

    def _finish(self, where: str, result: object) -> None:
        if isinstance(result, Growth):
            self.growths.append(result)
        elif isinstance(result, (list, tuple)) and all(isinstance(item, Candidate) for item in result):
            self._start(result)
        elif result is not None:
            raise self._misused(where, f"return a {type(result).__name__}")
        else:
            self.worked = True

    def _misused(self, where: str, what: str) -> GrowthError:
        return GrowthError(
            f"{self.operator!r}: the steps of its candidate at {where} {what}; write a generator that yields "
            "Needs(pairs), and returns a Growth, None, or further candidates in a list."
        )

    def _measure(self, waiting: Sequence[_Waiting]) -> None:
        """One pass for the next step of each."""
        pairs = [pair for member in waiting for pair in member.needs.pairs]
        later = [*(feature for member in waiting for feature in member.needs.later), *self._later]
        try:
            moments = measure(self.dag, self.objective, pairs, folds=self.operator.folds, kept=self.kept, later=later)
        except Exception as error:
            for half in self._halves(waiting, error, grown=False):
                self._measure(half)
            return
        self.forward = self.forward and moments.forward
        for member in waiting:
            self._resume(member.where, member.steps, moments)

    def _measure_previewed(self, group: Sequence[_Waiting]) -> None:
        """One pass with all previews of a group in the network."""
        try:
            needs = [member.needs for member in group]
            moments = previewed(
                self.dag, self.objective, needs, self.operator.folds, forward=self.forward, kept=self.kept
            )
        except Exception as error:
            for half in self._halves(group, error, grown=True):
                self._measure_previewed(half)
            return
        for member in group:
            self._resume(member.where, member.steps, moments)

    def _halves(self, members: Sequence[_Waiting], error: Exception, *, grown: bool) -> list[Sequence[_Waiting]]:
        """Of places that failed together, to be tried again."""
        return halves(members, error, self.left_out, lambda m: m.where, lambda e: self._is_of_place(e, grown=grown))

    def _leave_out(self, where: str, error: Exception, *, grown: bool) -> None:
        if not self._is_of_place(error, grown=grown):
            raise error
        self.left_out.add(where, error)

    def _is_of_place(self, error: Exception, *, grown: bool) -> bool:
        return is_of_place(error, self.dag, self.objective, grown=grown, folds=self.operator.folds)

    def _holds(self, growth: Growth) -> bool:
        """Whether a growth is what it says; one that is not is left out. New layers have to run wherever they are."""
        try:
            _check_forward(growth.change.final, growth.where, growth.dag, self.forward)
            if growth.is_whole:
                check_unchanged(growth)
        except Exception as error:
            if growth.change.new_paths:
                raise
            self._leave_out(growth.where, error, grown=True)
            return False
        return True


def previewed(
    dag: Dag,
    objective: Objective,
    needs: Sequence[Needs],
    folds: int,
    *,
    forward: bool = True,
    kept: KeptCaptures | None = None,
) -> Moments:
    """One pass with the new channels of previews in the network; only those of one axis change the same layers.

    Args:
        dag: of the model.
        objective: the loss and the batches.
        needs: with previews; those of one axis have other producers each.
        folds: of the samples.
        forward: whether the model's own forward runs on every batch.
        kept: what earlier passes left.

    Returns:
        The moments.

    Raises:
        DagrowError: the model is another one, or fails, when it is wider.
    """
    previews = [need.preview for need in needs if need.preview is not None]
    draft, units = _drafted(dag, previews)
    change = draft.change()
    pairs, where = [pair for need in needs for pair in need.pairs], ", ".join(each.axis.name for each in previews)
    _check_forward(change, where, dag, forward)
    kept = kept or KeptCaptures()
    if not kept.shows(previews):
        check_preserved(dag, objective, change, where)
    with preview(dag, change, change.tensors(dag.model, 0.0)):
        read, written = draft.read, draft.written
        return measure(
            dag, objective, pairs, folds=folds, read=read, written=written, units=units, kept=kept, preview=previews
        )


def _sharing(members: Sequence[_Waiting]) -> list[list[_Waiting]]:
    """Previews that share an axis, with other producers each, in one group; all others alone."""
    groups, times = dict[Hashable, list[_Waiting]](), Counter[tuple[str, ...]]()
    for member in members:
        preview = member.preview
        key = preview.axis.name, times[preview.writers]
        groups.setdefault(key if preview.shared else preview, []).append(member)
        times[preview.writers] += 1
    return list(groups.values())


def _drafted(dag: Dag, previews: Sequence[Preview]) -> tuple[Draft, dict[tuple[str, ...], slice]]:
    """All of them, those of an axis one behind the other; and which of its new units each has, by what writes them."""
    by_axis = dict[str, list[Preview]]()
    for each in previews:
        by_axis.setdefault(each.axis.name, []).append(each)
    units, widenings = dict[tuple[str, ...], slice](), {name: each[0].widening for name, each in by_axis.items()}
    for name, members in by_axis.items():
        ends = [*accumulate(len(next(iter(each.fan_in.values()))) for each in members)]
        units |= {each.writers: slice(start, end) for each, start, end in zip(members, [0, *ends], ends, strict=False)}
        if len(members) > 1:
            widenings[name] = dag.widening(members[0].axis, ends[-1])
    draft = Draft(dag, [(members[0].axis, widenings[name]) for name, members in by_axis.items()])
    for each in previews:
        for producer, fan_in in each.fan_in.items():
            rows = widenings[each.axis.name].rows[producer]
            draft.fan_in(dag.edge(producer), replace(rows, new=rows.new[units[each.writers]]), fan_in)
    return draft, units


def _check_forward(change: Change, where: str, dag: Dag, forward: bool) -> None:
    """Raises GrowthError for what acts in a forward of the model's own, where that does not run on every batch."""
    if forward or not change.written:
        return
    kind, what = type(dag.model).__name__, "its size is written into that forward"
    if change.new_paths:
        what = "the new layers become part of that forward"
    elif change.shared_sizes:
        what += f", as other widths use {', '.join(change.shared_sizes)} too"
    raise GrowthError(
        f"what grows at {where} would not run: {what}, and the step does not call the {kind} that was traced on every "
        "batch, but runs its layers in another way. Call the model itself in the step, model(...), or trace the module "
        "that the step calls."
    )
