"""When to grow and when to stop: rules read records."""

from collections.abc import Sequence
from math import inf, nan
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dagrow import (
    AfterEpoch,
    EveryEpochs,
    Grown,
    GrowthError,
    LossReached,
    NoImprovement,
    NothingToAdd,
    OnBottleneck,
    OnPlateau,
    Record,
    Schedule,
    Situation,
)


def record(loss: float, grew: bool | None = None, epoch: int = 0, validation: float | None = None) -> Record:
    """A step in which growing was not asked for (None), or asked for, in vain or not."""
    grown = (Grown("a", "op", 1, 1.0, None, 1.0, loss, loss, 3, 6),) if grew else ()
    return Record(epoch, 0.0, loss, validation, grew is not None, None, grown, {"a": 1}, 10, 20)


def situation(losses: Sequence[float], asked: Sequence[int] = (), epoch: int = 0) -> Situation:
    past = [record(loss, False if index in asked else None) for index, loss in enumerate(losses[:-1])]
    return Situation(epoch, losses[-1], past, lambda: pytest.fail("the bottleneck was not asked for"))


def test_every_epochs() -> None:
    due = [epoch for epoch in range(10) if EveryEpochs(3, first=2).due(situation([1.0], epoch=epoch))]
    assert due == [3, 6, 9]
    assert all(EveryEpochs().due(situation([1.0], epoch=epoch)) for epoch in range(3))


def test_a_plateau_is_a_loss_that_has_not_fallen_for_a_while() -> None:
    schedule = OnPlateau(patience=2, tolerance=0.1)
    assert not schedule.due(situation([5, 4, 3, 2, 1]))
    assert not schedule.due(situation([1, 1]))
    assert schedule.due(situation([1, 1, 1]))
    assert schedule.due(situation([1, 0.95, 0.92]))
    assert not schedule.due(situation([1, 0.95, 0.85]))
    assert schedule.due(situation([1, 2, 3]))
    assert schedule.due(situation([-1, -1.05, -1.05]))
    assert not schedule.due(situation([-1, -1.05, -1.15]))


def test_a_plateau_counts_from_the_last_time() -> None:
    schedule = OnPlateau(patience=2, tolerance=0.1)
    losses = [1.0] * 6
    assert schedule.due(situation(losses, asked=[1]))
    assert not schedule.due(situation(losses, asked=[3]))
    assert schedule.due(situation(losses, asked=[2]))


@given(losses=st.lists(st.floats(0.1, 10), min_size=1, max_size=12), scale=st.floats(0.01, 100))
def test_a_plateau_does_not_depend_on_the_scale_of_the_loss(losses: list[float], scale: float) -> None:
    scaled = OnPlateau(2, 0.123456789).due(situation([scale * loss for loss in losses]))
    assert scaled == OnPlateau(2, 0.123456789).due(situation(losses))


def test_the_bottleneck_is_measured_when_a_schedule_asks_and_once() -> None:
    calls = []

    def measure() -> float:
        calls.append(1)
        return 0.8

    now = Situation(0, 1.0, [], measure)
    assert OnBottleneck(0.8).due(now)
    assert not OnBottleneck(0.81).due(now)
    assert len(calls) == 1


def test_nothing_to_add() -> None:
    rule = NothingToAdd(times=2)
    assert rule.over([record(1, False), record(1), record(1, False)])
    assert not rule.over([record(1, False)])
    assert not rule.over([record(1, False), record(1, True), record(1, False)])
    assert not rule.over([record(1), record(1)])


def test_no_improvement() -> None:
    rule = NoImprovement(times=2)
    assert rule.over([record(1.0, True), record(1.1, True), record(1.2)])
    assert not rule.over([record(1.0, True), record(1.1, True)])  # the second has not been trained yet
    assert not rule.over([record(1.0, True), record(0.9, True), record(1.2)])
    assert not rule.over([record(1.0, True), record(1.2), record(1.3)])
    assert rule.over([record(2.0, True), record(1.0, True), record(1.5, True), record(1.2)])


def test_validation_goes_before_training() -> None:
    assert LossReached(0.5).over([record(9.0, validation=0.4)])
    assert not LossReached(0.5).over([record(0.1, validation=0.6)])
    assert LossReached(0.5).over([record(0.5)])
    assert not LossReached(0.5).over([])


def test_after_an_epoch() -> None:
    assert AfterEpoch(3).over([record(1, epoch=3)])
    assert not AfterEpoch(3).over([record(1, epoch=2)])


@pytest.mark.parametrize(
    ("rule", "wrong"),
    [
        (EveryEpochs, {"every": 0}),
        (OnPlateau, {"patience": 1.5}),
        (OnPlateau, {"tolerance": -1}),
        (OnBottleneck, {"share": 0}),
        (NothingToAdd, {"times": 0}),
        (NoImprovement, {"times": True}),
        (EveryEpochs, {"first": "a"}),
        (EveryEpochs, {"first": None}),
        (OnPlateau, {"tolerance": inf}),
        (OnBottleneck, {"share": 90}),
        (AfterEpoch, {"epoch": None}),
        (LossReached, {"loss": "a"}),
        (LossReached, {"loss": nan}),
    ],
)
def test_rules_refuse_what_makes_no_sense(rule: Any, wrong: dict[str, Any]) -> None:
    with pytest.raises(GrowthError, match=rf"{rule.__name__}\({next(iter(wrong))}=.*: give a (whole|finite) number"):
        rule(**wrong)


def test_rules_are_values() -> None:
    assert EveryEpochs(3) == EveryEpochs(3) != EveryEpochs(4)
    assert repr(OnPlateau()) == "OnPlateau(patience=3, tolerance=0.01)"
    assert isinstance(OnBottleneck(0.5), Schedule)
