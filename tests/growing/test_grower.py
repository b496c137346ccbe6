"""Growing on a schedule and under a budget, inside a loop and as one."""

import copy
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_interrupts import Injector, Interrupt, Setting, Sites, chosen, differences, loss, same
from torch import nn
from torch.nn import functional

import dagrow
from dagrow import (
    AddConnection,
    AddLayer,
    AddNeurons,
    Budget,
    Grower,
    GrowthError,
    LossError,
    MoveWeights,
    OptimizerError,
)

torch.manual_seed(0)
X = torch.randn(300, 4).double()
Y = torch.sin(X @ torch.randn(4, 3).double())
BATCHES = list(zip(X[:200].split(50), Y[:200].split(50), strict=True))
HELD = [(X[200:], Y[200:])]
mse = functional.mse_loss
TWO = [AddNeurons(k=1), AddNeurons(k=2)]


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 2), nn.Tanh(), nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 3)).double()


def traced() -> dagrow.Dag:
    return dagrow.trace(net(), X[:2])


class Never(dagrow.Schedule):
    """Growing is not asked for."""

    def due(self, now: dagrow.Situation) -> bool:
        return False


class PathsFirst(dagrow.Policy):
    """New connections before all else."""

    def values(self, growths: Any, judge: Any, past: Any) -> list[float]:
        return [float(isinstance(growth.operator, AddConnection)) for growth in growths]


@settings(max_examples=12, deadline=None)
@given(
    parameters=st.none() | st.integers(0, 60),
    neurons=st.none() | st.integers(0, 8),
    flops=st.none() | st.integers(0, 120),
    growths=st.none() | st.integers(0, 4),
    policy=st.sampled_from([dagrow.ByGain(), dagrow.ByGainPerParameter(), dagrow.RoundRobin()]),
)
def test_the_model_never_outgrows_its_budget(
    parameters: int | None, neurons: int | None, flops: int | None, growths: int | None, policy: dagrow.Policy
) -> None:
    dag, budget = traced(), Budget(parameters, flops, neurons, growths)
    sizes = dag.parameter_count(), dag.flop_count(), sum(axis.width for axis in dag.axes if axis.growable)
    grower = Grower(dag, mse, TWO, budget, policy=policy)
    parts = [part for epoch in range(3) for part in grower.step(epoch, BATCHES, HELD).parts]
    added = [
        dag.parameter_count() - sizes[0],
        dag.flop_count() - sizes[1],
        sum(axis.width for axis in dag.axes if axis.growable) - sizes[2],
        len(parts),
    ]
    limits = (parameters, flops, neurons, growths)
    assert all(limit is None or size <= limit for size, limit in zip(added, limits, strict=True))
    left = (grower.left.parameters, grower.left.flops, grower.left.neurons, grower.left.growths)
    assert all(limit is None or size + rest == limit for size, rest, limit in zip(added, left, limits, strict=True))
    grown = grower.history.growths()
    assert [sum(one[key] for one in grown) for key in ("parameters", "flops", "neurons")] == added[:3]


def test_a_plan_is_applied_one_by_one_and_the_loss_falls() -> None:
    dag = traced()
    receipt = Grower(dag, mse, [AddNeurons(k=1)]).step(0, BATCHES, HELD)
    assert {part.where for part in receipt.parts} == {"0", "2"}
    losses = [receipt.loss_before, *(part.loss_after for part in receipt.parts)]
    assert losses == sorted(losses, reverse=True)
    assert all(a.loss_after == b.loss_before for a, b in zip(receipt.parts, receipt.parts[1:], strict=False))
    assert receipt.loss_after == pytest.approx(float(mse(dag.model(HELD[0][0]), HELD[0][1]).detach()), rel=1e-9)
    receipt.undo()
    assert all(torch.equal(a, b) for a, b in zip(dag.model.parameters(), net().parameters(), strict=True))


def test_a_plan_goes_on_where_a_path_has_joined() -> None:
    """The axis that it leads to is still known by its name."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    operators = [AddConnection(targets=("2",)), AddNeurons(k=2, axes=("2",))]
    grower = Grower(dagrow.trace(model, X[:2]), mse, operators, policy=PathsFirst())
    assert [part.where for part in grower.step(0, BATCHES).parts] == ["input -> 2", "2"]
    assert grower.history[0].widths["2"] == 5


def test_one_growth_is_what_grow_does() -> None:
    """With one operator and one growth a step, a step is ``dagrow.grow``."""
    one, other = traced(), traced()
    stepped = Grower(one, mse, [AddNeurons(k=2)], per_step=Budget(growths=1)).step(0, BATCHES, HELD)
    grown = dagrow.grow(other, BATCHES, mse, [AddNeurons(k=2)], validation=HELD)
    assert str(stepped) == str(grown)
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True))


def test_moves_come_for_free() -> None:
    grower = Grower(traced(), mse, [MoveWeights(), AddNeurons(k=1)], Budget(growths=1))
    receipt = grower.step(0, BATCHES)
    assert receipt.neurons == 1
    assert sum(isinstance(part.growth.operator, MoveWeights) for part in receipt.parts if part.growth) > 0
    assert grower.over == "the budget is spent"


def test_round_robin_goes_around() -> None:
    grower = Grower(traced(), mse, [AddNeurons(k=1)], policy=dagrow.RoundRobin(), per_step=Budget(growths=1))
    where = [grower.step(epoch, BATCHES).where for epoch in range(4)]
    assert sorted(where[:2]) == sorted(where[2:]) == ["0", "2"]
    assert where[:2] == where[2:]


def test_growths_that_preserve_the_function_are_applied_too() -> None:
    dag = traced()
    receipt = Grower(dag, mse, [AddNeurons(k=2, init="zero")], Budget(neurons=2)).step(0, BATCHES)
    assert (receipt.neurons, receipt.parts[0].gamma) == (2, 1.0)
    assert receipt.loss_after == pytest.approx(receipt.loss_before, rel=1e-12)


def test_short_training_chooses_in_a_grower() -> None:
    policy = dagrow.ShortTraining(steps=3, top=1, lr=1e-2)
    assert len(Grower(traced(), mse, [AddNeurons(k=1)], policy=policy).step(0, BATCHES, HELD).parts) == 1


class First(dagrow.Policy):
    """Axis 0 before all else."""

    def values(self, growths: Any, judge: Any, past: Any) -> list[float]:
        return [1.0 + (growth.where == "0") for growth in growths]


def test_a_step_grows_each_place_of_its_plan_once() -> None:
    receipt = Grower(traced(), mse, [AddNeurons(k=1)], Budget(growths=5), policy=First()).step(0, BATCHES, HELD)
    assert [part.where for part in receipt.parts] == ["0", "2"]


class Swelling(AddNeurons):
    """Wants more once the dag has grown."""

    def __repr__(self) -> str:
        return "Swelling()"

    def candidates(self, dag: Any) -> Any:
        return AddNeurons.candidates(replace(self, k=3 if dag.applied else 1), dag)


def test_what_grows_between_plan_and_growth_must_still_fit() -> None:
    grower = Grower(traced(), mse, [Swelling(k=1)], Budget(neurons=3))
    assert [part.neurons for part in grower.step(0, BATCHES, HELD).parts] == [1]
    assert grower.left.neurons == 2


class Once(AddNeurons):
    """Has no place any more once the dag has grown."""

    def candidates(self, dag: Any) -> Any:
        if dag.applied:
            raise GrowthError("no place is left.")
        return super().candidates(dag)


def test_an_operator_that_has_used_up_its_places_leaves_the_field_to_others() -> None:
    grower = Grower(
        traced(), mse, [Once(k=2, folds=1), AddNeurons(k=1, axes=("0",), folds=1)], per_step=Budget(growths=1)
    )
    operators = [grower.step(epoch, BATCHES).parts[0].growth.operator for epoch in range(2)]  # type: ignore[union-attr]
    assert [type(operator) for operator in operators] == [Once, AddNeurons]
    alone = Grower(traced(), mse, [Once(k=2)])
    sizes = [alone.step(epoch, BATCHES).neurons for epoch in range(3)]
    assert sizes == [2, 0, 0]
    assert alone.over
    with pytest.raises(GrowthError, match="no place is left"):
        Grower(alone.dag, mse, [Once(k=2)])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (AddNeurons(axes=("typo",)), "no axis 'typo'"),
        (MoveWeights(edges=("typo",)), "no edge 'typo'"),
        (AddConnection(targets=("typo",)), "no edge 'typo'"),
        (AddLayer(3, targets=("typo",)), "no edge 'typo'"),
        (AddNeurons(axes=("4",)), "is an output of the model"),
    ],
)
def test_an_operator_that_is_asked_for_what_cannot_be_is_refused_beside_others(
    wrong: dagrow.Operator, message: str
) -> None:
    for operators in ([wrong, AddNeurons()], [AddNeurons(), wrong]):
        with pytest.raises(GrowthError, match=message):
            Grower(traced(), mse, operators)


def test_an_operator_that_can_never_act_on_a_model_is_refused_beside_others() -> None:
    alone = dagrow.trace(nn.Linear(4, 3).double(), X[:2])
    with pytest.raises(GrowthError, match="no new path can be added"):
        Grower(alone, mse, [MoveWeights(), AddLayer(3)])


def test_operators_may_find_their_places_in_what_others_grow() -> None:
    model = nn.Sequential(nn.Linear(4, 3)).double()
    operators = [AddNeurons(k=1), AddConnection(targets=("0",)), AddLayer(2, nn.Tanh())]
    grower = Grower(dagrow.trace(model, X[:2]), mse, operators)
    grown = {type(part.growth.operator) for e in range(3) for part in grower.step(e, BATCHES).parts if part.growth}
    assert {AddLayer, AddNeurons} <= grown
    with pytest.raises(GrowthError, match="no axis can grow"):
        Grower(dagrow.trace(nn.Sequential(nn.Linear(4, 3)).double(), X[:2]), mse, operators[:2])


def test_nothing_happens_before_it_is_time() -> None:
    dag = traced()
    before = copy.deepcopy(dag.model.state_dict())
    grower = Grower(dag, mse, TWO, schedule=dagrow.EveryEpochs(2))
    receipt = grower.step(1, BATCHES, HELD)
    assert (receipt.where, receipt.parts, receipt.loss_before) == ("", (), grower.history[0].validation_loss)
    assert all(torch.equal(before[name], value) for name, value in dag.model.state_dict().items())
    assert (grower.history[0].asked, grower.history[0].share) == (False, None)
    assert grower.step(2, BATCHES, HELD).neurons > 0
    assert grower.history[1].share == pytest.approx(share(traced()))


def share(dag: dagrow.Dag) -> float:
    found = dagrow.bottlenecks(dag, BATCHES, mse).values()
    return sum(edge.bottleneck for edge in found) / sum(edge.goal for edge in found)


def test_growing_on_the_bottleneck() -> None:
    at = share(traced())
    assert Grower(traced(), mse, TWO, schedule=dagrow.OnBottleneck(at * 0.99)).step(0, BATCHES).neurons
    waiting = Grower(traced(), mse, TWO, schedule=dagrow.OnBottleneck(min(1.0, at * 1.01)))
    assert not waiting.step(0, BATCHES).neurons
    assert waiting.history[0].share == pytest.approx(at)


class AtEpoch(dagrow.StopRule):
    """Forgets."""

    def over(self, past: Any) -> str | None:
        return "epoch 0" if past[-1].epoch == 0 else None


def test_the_end_is_final_and_has_a_reason() -> None:
    once = Grower(traced(), mse, TWO, stop=[AtEpoch()])
    assert [bool(once.step(epoch, BATCHES).parts) for epoch in range(3)] == [True, False, False]
    assert once.over == "epoch 0"
    grower = Grower(traced(), mse, TWO, stop=[dagrow.AfterEpoch(1)])
    sizes = [grower.step(epoch, BATCHES).neurons for epoch in range(4)]
    assert sizes[0] > 0
    assert sizes[1] > 0
    assert sizes[2:] == [0, 0]
    assert grower.over == grower.history.over == "epoch 1 is over"
    assert "epoch 1 is over" in str(grower.history)
    spent = Grower(traced(), mse, TWO, Budget(growths=0))
    assert not spent.step(0, BATCHES).parts
    assert spent.over == "the budget is spent"


def ended(operators: Any, budget: Budget, steps: int = 1) -> str | None:
    """Why growing is over after some steps, where nothing else ends it."""
    grower = Grower(traced(), mse, operators, budget, stop=())
    for epoch in range(steps):
        grower.step(epoch, BATCHES)
    return grower.over


def test_a_budget_is_spent_when_nothing_fits_that_any_operator_adds() -> None:
    cost = {part.growth.cost.flops for part in Grower(traced(), mse, TWO[:1]).step(0, BATCHES).parts if part.growth}
    spent = "the budget is spent"
    assert ended(TWO[:1], Budget(neurons=1)) == ended([MoveWeights(), *TWO], Budget(neurons=2)) == spent
    assert ended([AddNeurons(k=2)], Budget(neurons=3)) == ended([AddNeurons()], Budget(neurons=0)) == spent
    assert ended(TWO[:1], Budget(flops=min(cost))) == spent
    assert ended([AddConnection(rank=2), AddLayer(3)], Budget(neurons=1)) == spent
    assert ended([MoveWeights()], Budget(neurons=3)) is None
    assert ended([AddConnection(), AddNeurons(k=1)], Budget(neurons=0), 2) is None


def test_operators_that_no_budget_is_left_for_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[dagrow.Operator]()
    propose = dagrow.propose
    monkeypatch.setattr(
        "dagrow.growing._grower.propose", lambda *a, **k: asked.extend(k["operators"]) or propose(*a, **k)
    )
    grower = Grower(
        traced(), mse, [AddConnection(rank=1), AddNeurons(k=2), AddConnection()], Budget(neurons=1), stop=()
    )
    grower.step(0, BATCHES)
    assert AddNeurons(k=2) not in asked
    assert asked[:2] == [AddConnection(rank=1), AddConnection()]


@pytest.mark.parametrize(
    "operator",
    [
        AddNeurons(),
        AddNeurons(k=3),
        AddNeurons(k=2, paired=True),
        AddNeurons(k=2, init="copy", paired=True),
        AddConnection(),
        AddConnection(rank=2),
        AddLayer(3),
        MoveWeights(),
    ],
)
def test_operators_know_how_many_neurons_they_add_at_least(operator: dagrow.Operator) -> None:
    growths = dagrow.propose(traced(), BATCHES, mse, [operator])
    assert growths
    least = min(growth.neurons for growth in growths)
    assert (operator.least_neurons or 0) <= least
    assert operator == AddNeurons() or (operator.least_neurons or 0) == least
    assert (operator.least_neurons is None) == all(growth.cost.parameters == 0 for growth in growths)


def test_noise_ends_it() -> None:
    dag = traced()
    target = dag.model(X).detach()
    grower = Grower(dag, mse, [AddNeurons()])
    for epoch in range(3):
        grower.step(epoch, [(X, target + 1e-30)])
    assert grower.over == "nothing was worth adding 2 times in a row"
    assert not grower.history.growths()


def test_records_tell_the_model_after_growing() -> None:
    dag = traced()
    grower = Grower(dag, mse, TWO)
    grower.step(7, BATCHES, HELD, train_loss=0.25)
    record = grower.history[0]
    assert (record.epoch, record.train_loss, record.asked) == (7, 0.25, True)
    assert (record.parameters, record.flops) == (dag.parameter_count(), dag.flop_count())
    assert record.widths == {axis.name: axis.width for axis in dag.axes if axis.growable}
    assert record.seconds > 0
    grower.step(8, BATCHES)
    assert grower.history[1].validation_loss is None
    assert grower.history[1].train_loss == grower.history[1].grown[0].loss_before


def stepping(setting: Setting) -> Any:
    """A grower, and its state along with that of all else."""
    grower = Grower(
        setting.dag,
        loss,
        [AddNeurons(k=1, ridge=0.0, folds=1), MoveWeights(folds=1)],
        Budget(neurons=2),
        optimizer=setting.optimizer,
        per_step=Budget(neurons=1),
    )

    def state() -> dict[str, Any]:
        return {**setting.state(), "grower": (str(grower.left), str(grower.history), len(grower.history))}

    return grower, state


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupted_step_leaves_everything_as_it_was() -> None:
    warm = Setting()
    stepping(warm)[0].step(0, warm.loader)
    setting = Setting()
    grower, state = stepping(setting)
    before, tried = state(), 0
    reference = Setting()
    other = stepping(reference)[0]
    for at in chosen(Sites().run(partial(other.step, 0, reference.loader)), 25):
        injector = Injector(at, Interrupt)
        injector.run(partial(grower.step, 0, setting.loader))
        if len(grower.history):  # it ended
            setting = Setting()
            grower, state = stepping(setting)
            before = state()
            continue
        tried += 1
        changed = [key for key in differences(before, state()) if key != "dag"]
        assert not changed, f"stopped at call {at}, {injector.where}: {changed}"
        assert same(before["dag"][1:], state()["dag"][1:])
    assert tried > 15
    grower.step(0, setting.loader)
    assert grower.left == Budget(neurons=1)


def test_steps_refuse_what_is_no_number() -> None:
    grower = Grower(traced(), mse, TWO)
    for wrong in ({"epoch": "a"}, {"epoch": None}, {"epoch": 1.5}, {"train_loss": "a"}, {"train_loss": float("nan")}):
        with pytest.raises(GrowthError, match=rf"step\({next(iter(wrong))}=.*: give a (whole|finite) number"):
            grower.step(**{"epoch": 0, "batches": BATCHES, **wrong})  # type: ignore[arg-type]
    assert not grower.history
    grower.step(0, BATCHES, train_loss=torch.tensor(0.5))  # type: ignore[arg-type]
    assert grower.history[0].train_loss == 0.5


def test_refusals() -> None:
    dag = traced()
    optimizer = torch.optim.SGD(dag.model.parameters(), lr=1e-2)
    for wrong, error in [
        ({"budget": 5}, GrowthError),
        ({"schedule": 3}, GrowthError),
        ({"policy": "gain"}, GrowthError),
        ({"stop": [1]}, GrowthError),
        ({"operators": []}, GrowthError),
        ({"per_step": 1}, GrowthError),
        ({"loss": None}, LossError),
        ({"optimizer": 1}, OptimizerError),
        ({"operators": [AddNeurons(axes=("4",))]}, GrowthError),
    ]:
        with pytest.raises(error):
            Grower(**{"dag": dag, "loss": mse, **wrong})
    with pytest.raises(GrowthError, match="Dag"):
        Grower(dag.model, mse)  # type: ignore[arg-type]
    with pytest.raises(GrowthError, match="epochs"):
        dagrow.fit(dag, BATCHES, mse, epochs=0, optimizer=optimizer)
    with pytest.raises(OptimizerError, match="optimizer"):
        dagrow.fit(dag, BATCHES, mse, epochs=1, optimizer=None)  # type: ignore[arg-type]
    with pytest.raises(OptimizerError, match="needs a closure"):
        dagrow.fit(dag, BATCHES, mse, epochs=1, optimizer=torch.optim.LBFGS(dag.model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(dag.model.parameters(), net().parameters(), strict=True))
    other = torch.optim.SGD(dag.model.parameters(), lr=1e-2)
    for scheduler in (1, torch.optim.lr_scheduler.StepLR(other, 1)):
        with pytest.raises(OptimizerError, match="scheduler"):
            dagrow.fit(dag, BATCHES, mse, epochs=1, optimizer=optimizer, scheduler=scheduler)  # type: ignore[arg-type]
    with pytest.raises(dagrow.BatchError):
        dagrow.fit(dag, iter(BATCHES), mse, epochs=1, optimizer=optimizer)
    with pytest.raises(dagrow.BatchError):
        dagrow.fit(dag, [], mse, epochs=1, optimizer=optimizer)
    with pytest.raises(LossError):
        dagrow.fit(dag, BATCHES, lambda output, target: target.mean(), epochs=1, optimizer=optimizer)
    grower = Grower(dag, mse)
    with pytest.raises(dagrow.BatchError):
        grower.step(0, BATCHES, iter(HELD))
    assert not len(grower.history)


def test_one_of_each_needs_no_list() -> None:
    grower = Grower(traced(), mse, AddNeurons(k=1), stop=dagrow.AfterEpoch(0))  # type: ignore[arg-type]
    assert grower.step(0, BATCHES).neurons
    assert grower.over
    assert "epoch 0" in repr(grower)
