"""``Grower``: growing inside a training loop, on a schedule and under a budget."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import isfinite, nan
from typing import Any, Unpack

from dagrow._model_state import all_or_nothing
from dagrow._progress import progress_bar
from dagrow.errors import GrowthError, NoPlaceError, check_whole, listed
from dagrow.graph import Dag
from dagrow.growing._bottlenecks import bottlenecks, objective_of
from dagrow.growing._held_rates import HeldRates
from dagrow.growing._history import History
from dagrow.growing._left_out import LeftOut
from dagrow.growing._line_search import combined, tried
from dagrow.growing._planning import Budget, applicable, check_kinds, greedy_plan, place
from dagrow.growing._policies import ByLineSearch, Policy
from dagrow.growing._propose import propose
from dagrow.growing._recording import growable_widths, grown_of, snapshot_of
from dagrow.growing._sample_size import check_folds, judge_of
from dagrow.growing._schedules import EveryEpochs, NothingToAdd, Schedule, Situation, StopRule
from dagrow.operators import AddNeurons, Operator
from dagrow.pictures import Record
from dagrow.statistics import Loss, MeasureOptions, Objective, Step
from dagrow.surgery import Growth, Optimizers, Receipt, check_optimizer, sequence_of, transaction


@dataclass(frozen=True)
class _State:
    """What changes from step to step."""

    budget: Budget  # what is left of it
    history: History


class Grower:
    """Grows a dag while it trains: call :meth:`step` after each epoch of a loop of your own, or use :func:`dagrow.fit`.

    When its schedule says so, a step measures, plans under the budget, and applies the plan growth by growth, each at
    the amplitude of a line search, measuring again in between.

    Args:
        dag: what :func:`dagrow.trace` returned; its model grows in place.
        loss: ``loss(output, target)``, a mean or a sum over samples.
        operators: ways to grow; those of all compete at all places.
        budget: what may be added in all.
        schedule: when to grow.
        policy: which growths first.
        stop: when growing is over for good; any of these, or a spent budget, ends it.
        per_step: what one step may add.
        optimizer: one or a list; their state is brought along at once, for every parameter that grows. Where it grows
            although their rates have fallen since, a warning says so.
        step: ``step(model, batch)``, instead of ``loss``, for any other training step.
        mode: the mode in which is measured, ``"eval"`` or ``"train"``.
        options: how batches are measured, see :class:`dagrow.statistics.MeasureOptions`.

    Raises:
        GrowthError: an argument does not fit; an operator can never grow what it was asked for, or none finds a place.
        LossError: neither a loss nor a step can be called.
        OptimizerError: the optimizer does not fit the model.
    """

    def __init__(
        self,
        dag: Dag,
        loss: Loss | None = None,
        operators: Sequence[Operator] = (AddNeurons(),),
        budget: Budget = Budget(),
        schedule: Schedule = EveryEpochs(),
        *,
        policy: Policy = ByLineSearch(),
        stop: Sequence[StopRule] = (NothingToAdd(),),
        per_step: Budget = Budget(),
        optimizer: Optimizers = None,
        step: Step | None = None,
        mode: str = "eval",
        **options: Unpack[MeasureOptions],
    ) -> None:
        check_kinds(
            dag=(dag, Dag),
            budget=(budget, Budget),
            schedule=(schedule, Schedule),
            policy=(policy, Policy),
            per_step=(per_step, Budget),
        )
        self.stop = listed("stop", stop, StopRule, "[dagrow.NothingToAdd()]")
        self.operators = listed("operators", operators, Operator, "[dagrow.AddNeurons()]", empty=False)
        check_optimizer(optimizer, dag.model)
        check_folds(options, self.operators)
        self.function = Objective(dag.model, (), loss, step=step, mode=mode, **options).function
        self.dag, self.schedule, self.policy, self.per_step = dag, schedule, policy, per_step
        self.optimizer, self.mode, self.options, self._begun = optimizer, mode, options, time.perf_counter()
        self._state = _State(budget, History(snapshots=(snapshot_of(dag),)))
        self._rates = HeldRates(sequence_of(optimizer))
        self._check_places()

    @property
    def history(self) -> History:
        """What happened so far."""
        return self._state.history

    @property
    def left(self) -> Budget:
        """What is left of the budget."""
        return self._state.budget

    @property
    def over(self) -> str | None:
        """Why growing has ended, or None."""
        return self._state.history.over

    def step(
        self,
        epoch: int,
        batches: Iterable[Any],
        validation: Iterable[Any] | None = None,
        *,
        train_loss: float | None = None,
    ) -> Receipt:
        """Records an epoch, and grows if it is time to.

        Args:
            epoch: its number.
            batches: any re-iterable of ``(inputs, target)``, to be measured.
            validation: batches for the line search, and for what schedule, stop rules and policy read; by default those
                that are measured, or, where ``samples`` draws some, others for the line search and the policy.
            train_loss: of the epoch, if it is known; else the loss on ``batches`` is computed.

        Returns:
            A receipt; its ``parts`` are what was applied. Possibly nothing was. Places that failed are in its
            ``left_out``, with the reason, and in the history; the others do not suffer from it.

        Raises:
            BatchError: the batches do not fit. Nothing has changed, and nothing is recorded, here and below.
            LossError: the loss does not.
            GrowthError: an argument does not, or the dag is no longer that of its model.
            OptimizerError: the optimizer is no longer that of the model.
        """
        with progress_bar(self.options.get("progress", True)):
            return self._checked_step(epoch, batches, validation, train_loss)

    def _checked_step(
        self, epoch: int, batches: Iterable[Any], validation: Iterable[Any] | None, train_loss: float | None
    ) -> Receipt:
        check_whole("step", epoch=epoch)
        train_loss = None if train_loss is None else _finite(train_loss)
        objective = objective_of(self.dag, batches, None, self.function, self.mode, self.options)
        check_optimizer(self.optimizer, self.dag.model)
        judge = None if validation is None else objective.with_batches(validation, "validation")
        state = self._state

        def restore() -> None:
            self._state = state

        with all_or_nothing(restore):
            receipt = transaction(self.dag, lambda: self._step(epoch, objective, judge, train_loss))
        self._rates.look(grown=bool(receipt.parts))
        return receipt

    def _step(self, epoch: int, objective: Objective, judge: Objective | None, train_loss: float | None) -> Receipt:
        train_loss = objective.reported(objective.mean()) if train_loss is None else train_loss
        validation_loss = None if judge is None else judge.reported(judge.mean())
        loss = train_loss if validation_loss is None else validation_loss
        now = Situation(epoch, loss, self.history.steps, lambda: self._share(objective))
        asked, budget, parts = self.over is None and self.schedule.due(now), self.left, list[Receipt]()
        left_out = LeftOut()
        share = now.share if asked or "share" in vars(now) else None
        if asked:
            parts = self._grow(objective, judge or judge_of(objective), budget, left_out)
            for part in parts:
                assert part.growth is not None
                budget = budget.minus(part.growth)
        record = Record(
            epoch,
            time.perf_counter() - self._begun,
            train_loss,
            validation_loss,
            asked,
            share,
            tuple(map(grown_of, parts)),
            growable_widths(self.dag),
            self.dag.parameter_count(),
            self.dag.flop_count(),
            left_out.notes,
        )
        receipt = combined(parts, parts[0].loss_before if parts else loss, left_out.notes)
        self._state = _State(budget, self._recorded(record, budget))
        return receipt

    def _share(self, objective: Objective) -> float:
        if all(edge.shared for edge in self.dag.edges):
            return 0.0  # nothing can be measured
        edges = bottlenecks(self.dag, objective.batches, step=self.function, mode=self.mode, **self.options).values()
        goal = sum(edge.goal for edge in edges)
        return sum(edge.bottleneck for edge in edges) / goal if goal else 0.0

    def _grow(self, objective: Objective, judge: Objective, budget: Budget, left_out: LeftOut) -> list[Receipt]:
        """Applies a plan. After each growth what is left of it is measured and planned again."""
        budget, parts = budget.intersect(self.per_step), list[Receipt]()
        plan = self._plan(objective, judge, budget, parts, left_out)
        places = {place(growth) for growth in plan}
        while plan:
            growth = plan.pop(0)
            places.discard(place(growth))
            receipt = tried(growth, judge, judge.mean(), self.optimizer, left_out)
            if receipt is None:
                continue
            parts.append(receipt)
            budget = budget.minus(growth)
            plan = self._plan(objective, judge, budget, parts, left_out, places) if places else []
        return parts

    def _plan(
        self,
        objective: Objective,
        judge: Objective,
        budget: Budget,
        parts: Sequence[Receipt],
        left_out: LeftOut,
        places: set[tuple[str, str]] | None = None,
    ) -> list[Growth]:
        affordable = [operator for operator in self.operators if not budget.is_spent(operator.least_neurons or 0)]
        operators = [operator for operator in affordable if self._has_places(operator)]
        if not operators:
            return []
        growths = propose(
            self.dag, objective.batches, operators=operators, step=self.function, mode=self.mode, **self.options
        )
        left_out.take(growths)
        candidates = [growth for growth in applicable(growths) if places is None or place(growth) in places]
        past = [grown.where for record in self.history for grown in record.grown] + [part.where for part in parts]
        return greedy_plan(candidates, budget, self.policy, judge, past)

    def _check_places(self) -> None:
        """Refuses early what nothing can be made of. An operator may find its places in what others grow."""
        has_places, errors = False, list[NoPlaceError]()
        for operator in self.operators:
            try:
                has_places |= bool(operator.candidates(self.dag))
            except NoPlaceError as error:
                errors.append(error)
        if errors and not has_places:
            raise errors[0]

    def _has_places(self, operator: Operator) -> bool:
        """It may have used them up, or find some only in what others have grown."""
        try:
            return bool(operator.candidates(self.dag))
        except GrowthError:
            return False

    def _least_neurons(self) -> int:
        """How many neurons any growth adds, of operators that add something."""
        adding = [operator.least_neurons for operator in self.operators]
        return min((neurons for neurons in adding if neurons is not None), default=1)

    def _recorded(self, record: Record, budget: Budget) -> History:
        history = self.history
        steps, snapshots, over = (*history.steps, record), history.snapshots, history.over
        if record.added:
            snapshots = (*snapshots, snapshot_of(self.dag, record.epoch))
        is_spent = budget.is_spent(self._least_neurons())
        reasons = ["the budget is spent"] if is_spent else [rule.over(steps) for rule in self.stop]
        over = over or next((reason for reason in reasons if reason), None)
        return replace(history, steps=steps, snapshots=snapshots, over=over)

    def __repr__(self) -> str:
        return f"Grower({self.dag!r}, {len(self.history)} steps, {self.over or 'growing'})"


def _finite(train_loss: float) -> float:
    """A loss that was given as a number of any kind."""
    try:
        number = float(train_loss)
    except (TypeError, ValueError, RuntimeError):
        number = nan
    if not isfinite(number):
        raise GrowthError(f"step(train_loss={train_loss!r}): give a finite number, or None to have it computed.")
    return number
