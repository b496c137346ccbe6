"""Places that fail are left out, with a note; the others go on as if these were not there."""

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss, scaled_dot_product_attention

import dagrow
from dagrow import AddNeurons, GrowthError
from dagrow.growing import Budget, Grower
from dagrow.operators import Candidate, Operator, Steps
from dagrow.testing import snapshot
from dagrow.testing._snapshots_and_slopes import same

WIDE = [AddNeurons(k=1, folds=1)]


class Attending(nn.Module):
    """Queries, keys and values state their head size at one place, so that values alone need a forward of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.head_size = 4
        self.query, self.key, self.value = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(6, 8)
        self.out, self.up, self.down = nn.Linear(8, 6), nn.Linear(6, 5), nn.Linear(5, 1)

    def attended(self, x: Tensor) -> Tensor:
        heads = [layer(x).view(*x.shape[:2], -1, self.head_size) for layer in (self.query, self.key, self.value)]
        query, key, value = (part.transpose(1, 2) for part in heads)
        return x + self.out(scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, shift: float | None = None) -> Tensor:
        x = self.attended(x)
        x = self.down(self.up(x if shift is None else x + shift).tanh())
        return x.mean(1)


def by_parts(model: Any, batch: Any) -> Tensor:
    return mse_loss(model.down(model.up(model.attended(batch[0])).tanh()).mean(1), batch[1])


def otherwise_called(model: Any, batch: Any) -> Tensor:
    return mse_loss(model(batch[0], shift=0.5), batch[1])


def attending() -> tuple[dagrow.Dag, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    x = torch.randn(24, 3, 6).double()
    return dagrow.trace(Attending().double(), x), [(x, x.square().mean((1, 2))[:, None])]


STEPS = pytest.mark.parametrize(
    ("step", "why"), [(by_parts, "head_size.*does not call"), (otherwise_called, "traced with shift = None.*0.5")]
)


@STEPS
def test_what_fails_when_it_is_wider_is_left_out(step: Any, why: str, caplog: pytest.LogCaptureFixture) -> None:
    dag, batches = attending()
    before = snapshot(dag)
    with caplog.at_level(logging.INFO, logger="dagrow"):
        growths = dagrow.propose(dag, batches, step=step, operators=WIDE)
    assert {growth.where for growth in growths} == {"query+key+value", "up"}
    (note,) = growths.left_out
    assert note.startswith("value: ")
    assert re.search(why, note)
    same(before, snapshot(dag), "proposing")
    assert {record.name for record in caplog.records} == {"dagrow"}
    assert note in caplog.text
    assert f"Left out: {note}" in str(growths)


@STEPS
def test_the_others_are_what_they_are_alone(step: Any, why: str) -> None:
    dag, batches = attending()
    together = {g.where: g.gain for g in dagrow.propose(dag, batches, step=step, operators=WIDE)}
    for where, gain in together.items():
        (alone,) = dagrow.propose(dag, batches, step=step, operators=[AddNeurons(k=1, folds=1, axes=(where,))])
        assert alone.gain == pytest.approx(gain, rel=1e-9)


@STEPS
def test_a_place_that_was_asked_for_alone_fails(step: Any, why: str) -> None:
    dag, batches = attending()
    for verb in (dagrow.propose, dagrow.grow):
        with pytest.raises(dagrow.DagrowError, match=f"(?s){why}"):
            verb(dag, batches, step=step, operators=[AddNeurons(k=1, axes=("value",))])


@STEPS
def test_grow_and_grower_say_what_they_left_out(step: Any, why: str) -> None:
    dag, batches = attending()
    receipt = dagrow.grow(dag, batches, step=step, operators=WIDE)
    assert receipt.neurons == 1
    (note,) = receipt.left_out
    assert str(receipt).splitlines()[-1] == f"Left out: {note}"
    receipt.undo()
    grower = Grower(dag, step=step, operators=WIDE, budget=Budget(neurons=2))
    receipt = grower.step(0, batches)
    assert receipt.neurons == 2
    assert receipt.left_out == grower.history[0].left_out == (note,)
    assert f"Left out: {note}" in str(grower.history)
    assert grower.history.records()[0]["left_out"] == note


@dataclass(frozen=True)
class Failing(Operator):
    """Its candidates raise what they are told to, or find nothing."""

    errors: tuple[Exception | None, ...]

    def candidates(self, dag: dagrow.Dag) -> list[Candidate]:
        return [Candidate(f"place {i}", partial(self.steps, error)) for i, error in enumerate(self.errors)]

    def steps(self, error: Exception | None, objective: Any) -> Steps:
        if error is not None:
            raise error
        return None
        yield


def test_where_all_places_fail_all_reasons_are_listed() -> None:
    dag, batches = attending()
    known, unknown = GrowthError("known"), IndexError("unknown")
    growths = dagrow.propose(dag, batches, mse_loss, [Failing((known, None, unknown))])
    assert growths.left_out == ("place 0: known", "place 2: IndexError: unknown")
    with pytest.raises(GrowthError, match=r"(?s)nothing can grow.*place 0: known.*place 1: IndexError: unknown"):
        dagrow.propose(dag, batches, mse_loss, [Failing((known, unknown))])
    with pytest.raises(GrowthError, match=r"^known$"):
        dagrow.grow(dag, batches, mse_loss, [Failing((known,))])
    receipt = dagrow.grow(dag, batches, mse_loss, [Failing((known,)), *WIDE])
    assert receipt.neurons == 1
    assert receipt.left_out == ("place 0: known",)


class StopError(Exception):
    pass


def raising(error: Exception, call: int, own: Any) -> Callable[[Any, Any], Tensor]:
    """A step that raises once, at one of its calls on a batch of the user's own."""
    seen = []

    def step(model: Any, batch: Any) -> Tensor:
        if batch is own:
            seen.append(batch)
        if batch is own and len(seen) == call:
            raise error
        return mse_loss(model(batch[0]), batch[1])

    return step


@pytest.mark.parametrize(
    ("error", "call"),
    [(error, call) for error in (StopError(), MemoryError()) for call in (3, 4, 5, 6, 7)]
    + [(torch.OutOfMemoryError(), call) for call in (4, 5, 6, 7)],  # the third looks at samples, if memory is there
)
def test_what_a_step_of_the_users_own_raises_is_of_no_place(error: Exception, call: int) -> None:
    dag, batches = attending()
    with pytest.raises((type(error), dagrow.BatchError)) as raised:
        dagrow.propose(dag, batches, step=raising(error, call, batches[0]), operators=WIDE)
    assert error in (raised.value, raised.value.__cause__)


def test_batches_that_do_not_fit_are_of_no_place() -> None:
    dag, ((x, y),) = attending()
    with pytest.raises(dagrow.BatchError, match="3 samples for 4 folds"):
        dagrow.propose(dag, [(x[:3], y[:3])], mse_loss, [AddNeurons(k=1)])
    with pytest.raises(dagrow.LossError, match="does not depend"):
        dagrow.propose(dag, [(x, y)], lambda output, target: mse_loss(output.detach(), target))


class BatchGated(nn.Module):
    """A gate is computed once for all samples of a batch together."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate, self.last = nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(5, 1)
        self.side, self.end = nn.Linear(4, 3), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(x.mean(0, keepdim=True)).sigmoid()
        return self.last(self.first(x).tanh() * gate) + self.end(self.side(x).tanh())


def test_a_layer_without_samples_stops_no_other() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 4).double()
    dag, batches = dagrow.trace(BatchGated().double(), x), [(x, x.square().mean(1)[:, None])]
    growths = dagrow.propose(dag, batches, mse_loss, [AddNeurons(k=1, folds=1)])
    assert "side" in {growth.where for growth in growths}
    assert all("gate" in note for note in growths.left_out)
    assert growths.left_out
    bottlenecks = dagrow.bottlenecks(dag, batches, mse_loss)
    assert set(bottlenecks) == {"first", "last", "side", "end"}
    assert len(bottlenecks.left_out) == 1
    assert "gate" in bottlenecks.left_out[0]
