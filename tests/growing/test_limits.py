"""Memory and time that measuring may take: places that need more are measured apart, or left out, and said."""

import time
from typing import Any

import psutil
import pytest
import torch
from torch import nn

import dagrow
from dagrow import AddNeurons, LimitError
from dagrow.growing import _candidate_runs
from dagrow.statistics import InputFeatures, Objective, OutputGoal, measure
from dagrow.statistics._limits import Limits

MSE = nn.functional.mse_loss
X = torch.randn(600, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
BATCHES = [(x, x[:, :3].abs()) for x in X.split(50)]
OPERATORS = [AddNeurons(k=2)]


def traced(*widths: int) -> dagrow.Dag:
    torch.manual_seed(0)
    layers = [nn.Linear(a, b) for a, b in zip((30, *widths), (*widths, 3), strict=True)]
    parts = [part for layer in layers for part in (layer, nn.Tanh())][:-1]
    return dagrow.trace(nn.Sequential(*parts).double(), X[:2])


def gains(dag: dagrow.Dag, **options: Any) -> dict[str, float]:
    return {growth.where: growth.gain for growth in dagrow.propose(dag, BATCHES, MSE, OPERATORS, **options)}


def test_places_that_need_too_much_together_are_measured_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    dag, refused = traced(40, 40, 40), list[str]()
    expected, check = gains(dag), Limits.check_memory

    def noted(self: Limits, *args: Any) -> None:
        try:
            check(self, *args)
        except LimitError as error:
            refused.append(str(error))
            raise

    monkeypatch.setattr(Limits, "check_memory", noted)
    assert gains(dag, max_memory=4e5) == pytest.approx(expected, rel=1e-9)
    assert refused  # all of them together
    refused.clear()
    assert gains(dag, max_memory=4e6) == pytest.approx(expected, rel=1e-9)
    assert not refused


def test_a_place_that_needs_too_much_alone_is_left_out_with_its_layer_and_ways_out() -> None:
    dag = traced(6, 200, 6)
    growths = dagrow.propose(dag, BATCHES, MSE, OPERATORS, max_memory=2e6)
    assert "0" in {growth.where for growth in growths}
    (note,) = [note for note in growths.left_out if note.startswith("4: ")]
    assert "layers 4 read" in note
    assert "2 MB max_memory allows" in note
    assert "samples=" in note
    table = dagrow.bottlenecks(dag, BATCHES, MSE, max_memory=1e6)
    assert set(table) == {"0", "2", "6"}
    assert table.left_out[0].startswith("4: ")


def test_fewer_samples_need_less() -> None:
    dag = traced(6, 600, 6)
    assert "4" not in dagrow.bottlenecks(dag, BATCHES, MSE, max_memory=1e6)
    assert "4" in dagrow.bottlenecks(dag, BATCHES, MSE, max_memory=1e6, samples=100)  # kept as rows


def test_the_limit_is_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    dag = traced(40)
    free = type("Memory", (), {"available": 1e4})()
    assert len(dagrow.bottlenecks(dag, BATCHES, MSE)) == 2
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    with pytest.raises(LimitError, match="8 kB are free"):
        dagrow.bottlenecks(dag, BATCHES, MSE)


def test_an_estimate_is_near_what_sums_take() -> None:
    dag, folds = traced(40, 40), 4
    reads, goal = InputFeatures("2"), OutputGoal("2")
    pairs = [(reads, reads), (reads, goal)]
    sums = measure(dag, Objective(dag.model, BATCHES, MSE), pairs, folds=folds).sums
    held = sum(total.numel() * total.element_size() for total in sums.values())
    measure(dag, Objective(dag.model, BATCHES, MSE, max_memory=2 * held), pairs, folds=folds)
    with pytest.raises(LimitError):
        measure(dag, Objective(dag.model, BATCHES, MSE, max_memory=held - 1), pairs, folds=folds)


def test_places_for_which_no_time_is_left_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    dag, clock = traced(8, 8, 8), [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    expected = gains(dag)

    def slow(*args: Any, **kwargs: Any) -> Any:
        clock[0] += 1
        return measure(*args, **kwargs)

    monkeypatch.setattr(_candidate_runs, "measure", slow)
    assert gains(dag, max_seconds=1e6) == pytest.approx(expected, rel=1e-9)
    limit = 0.7 * clock[0]
    growths = dagrow.propose(dag, BATCHES, MSE, OPERATORS, max_seconds=limit)
    where = {growth.where for growth in growths}
    assert 0 < len(where) < 3
    assert len(growths.left_out) == 3 - len(where)
    assert all(f"max_seconds={limit:g} would have been over" in note for note in growths.left_out)
    assert {growth.where: growth.gain for growth in growths} == pytest.approx({w: expected[w] for w in where}, rel=1e-9)


def test_a_pass_that_is_too_long_is_refused_after_its_second_batch() -> None:
    dag, seen = traced(8), list[int]()

    def step(model: nn.Module, batch: Any) -> torch.Tensor:
        seen.append(len(batch[0]))
        time.sleep(0.02)
        return MSE(model(batch[0]), batch[1])

    for verb in (dagrow.bottlenecks, dagrow.propose, dagrow.grow):
        seen.clear()
        with pytest.raises(LimitError, match=r"one pass over 1200 batches.*max_seconds=0\.5.*samples="):
            verb(dag, BATCHES * 100, step=step, max_seconds=0.5)  # type: ignore[operator]
        assert len(seen) < 20


def test_what_was_found_in_time_is_not_lost_to_what_comes_after(monkeypatch: pytest.MonkeyPatch) -> None:
    dag, clock = traced(8, 8), [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def step(model: nn.Module, batch: Any) -> torch.Tensor:
        clock[0] += 0.1
        return MSE(model(batch[0]), batch[1])

    others = [AddNeurons(k=1), AddNeurons(k=2)]
    whole = dagrow.propose(dag, BATCHES, step=step, operators=others)
    assert not whole.left_out
    for seconds in (8.0, 12.0, 16.0, 24.0):
        growths = dagrow.propose(dag, BATCHES, step=step, operators=others, max_seconds=seconds)
        assert growths
        left_out = {note.partition(":")[0] for note in growths.left_out}
        assert {growth.where for growth in growths} | left_out == {growth.where for growth in whole}
    few = dagrow.propose(dag, BATCHES, step=step, operators=others, samples="auto", max_seconds=4.0)
    assert {growth.samples for growth in few} == {256}  # all of them would have been too long


def test_batches_without_a_length_are_no_reason() -> None:
    class Stream:
        def __iter__(self) -> Any:
            return iter([(x, x[:, :2]) for x in torch.randn(2, 8, 60_000)])

    model = nn.Linear(60_000, 2)
    found = dagrow.bottlenecks(dagrow.trace(model, torch.randn(2, 60_000)), Stream(), MSE, max_memory=1e9)
    assert len(found) == 1


def test_samples_of_one_group_count_once() -> None:
    batches = [(x, x[:, :2]) for x in torch.randn(2, 20, 60_000)]
    dag = dagrow.trace(nn.Linear(60_000, 2), torch.randn(2, 60_000))
    found = dagrow.bottlenecks(dag, batches, MSE, groups=lambda batch: [id(batch[0])] * 20, max_memory=1e8)
    assert len(found) == 1
