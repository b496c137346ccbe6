"""Several dags of one model, and copies of a dag."""

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import dagrow
from dagrow import AddConnection, AddLayer, AddNeurons, GrowthError, MoveWeights
from dagrow.testing import snapshot
from dagrow.testing._snapshots_and_slopes import same

X = torch.randn(24, 5, generator=torch.Generator().manual_seed(0))
Y = torch.stack([X[:, 0] * X[:, 1], X[:, 2].abs()], 1)
BATCHES = [(X, Y)]

OPERATORS = {
    "a width": AddNeurons(k=2, axes=("0",), folds=1),
    "the next width": AddNeurons(k=2, axes=("2",), folds=1),
    "a move": MoveWeights(edges=("2",), folds=1),
    "a connection": AddConnection(targets=("4",), folds=1),
    "a layer": AddLayer(3, targets=("4",), folds=1),
}


def chain() -> tuple[nn.Sequential, dagrow.Dag]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 2), nn.Tanh(), nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2))
    return model, dagrow.trace(model, X)


def grown_by(dag: dagrow.Dag, name: str) -> dagrow.Receipt:
    return dagrow.propose(dag, BATCHES, functional.mse_loss, [OPERATORS[name]])[0].apply(0.5)


@pytest.mark.parametrize("later", OPERATORS)
@pytest.mark.parametrize("earlier", OPERATORS)
def test_a_later_growth_through_another_dag_is_undone_first(earlier: str, later: str) -> None:
    model, dag = chain()
    untouched = snapshot(dag)
    first = grown_by(dag, earlier)
    between = snapshot(dag)
    second = grown_by(dagrow.trace(model, X), later)
    before = snapshot(dag)
    with pytest.raises(GrowthError, match="reverse order"):
        first.undo()
    same(before, snapshot(dag), "a refused undo")
    second.undo()
    same(between, snapshot(dag), "undone through the other dag")
    dag.check()
    first.undo()
    same(untouched, snapshot(dag), "undone")


def test_a_later_growth_that_nobody_can_undo_stays_in_place() -> None:
    model, dag = chain()
    first = grown_by(dag, "a width")
    grown_by(dagrow.trace(model, X), "the next width")
    gc.collect()
    before = snapshot(dag)
    with pytest.raises(GrowthError, match="reverse order"):
        first.undo()
    same(before, snapshot(dag), "a refused undo")


@pytest.mark.parametrize("name", OPERATORS)
def test_a_dag_knows_that_its_model_was_grown_through_another(name: str) -> None:
    model, dag = chain()
    growth = dagrow.propose(dag, BATCHES, functional.mse_loss, [OPERATORS["a width"]])[0]
    receipt = grown_by(dagrow.trace(model, X), name)
    before = snapshot(dag)
    for verb in (
        dag.check,
        lambda: growth.apply(0.1),
        lambda: dagrow.propose(dag, BATCHES, functional.mse_loss, [AddConnection()]),
    ):
        with pytest.raises(GrowthError, match=r"through another dag.*trace the model again"):
            verb()
    same(before, snapshot(dag), "a refused growth")
    receipt.undo()
    growth.apply(0.1)


def test_a_dag_knows_that_a_growth_was_undone_through_another() -> None:
    model, dag = chain()
    receipt = grown_by(dag, "a move")
    other = dagrow.trace(model, X)
    receipt.undo()
    with pytest.raises(GrowthError, match="through another dag"):
        other.check()
    dag.check()


def test_copies_have_no_receipts() -> None:
    model, dag = chain()
    receipt = grown_by(dag, "a connection")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(dag).model):
        other = dagrow.trace(twin, X)
        assert not other.applied
        grown_by(other, "a width")
    receipt.undo()


def test_growths_keep_no_model_alive() -> None:
    model, dag = chain()
    receipt, gone = grown_by(dag, "a layer"), weakref.ref(model)
    del model, dag, receipt
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("rules", [[3], [nn.Linear]])
def test_rules_that_are_none(rules: Any) -> None:
    with pytest.raises(dagrow.DagrowError, match="give a list of instances"):
        dagrow.trace(chain()[0], X, rules=rules)


def test_a_compiled_model_is_refused() -> None:
    with pytest.raises(dagrow.DagrowError, match="trace the model that it was made of"):
        dagrow.trace(torch.compile(chain()[0], backend="eager"), X)
