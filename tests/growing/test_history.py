"""Histories: plain records, tables, figures and a page that needs nothing else."""

import json
import pickle
import sys

import pytest
from histories import grown_history

from dagrow import AddNeurons, History, HistoryError

history = pytest.fixture(scope="module")(grown_history)


def test_records_are_plain(history: History) -> None:
    records, growths = history.records(), history.growths()
    assert json.loads(json.dumps(records)) == records
    assert json.loads(json.dumps(growths)) == growths
    assert [record["epoch"] for record in records] == list(range(6))
    assert records[0]["validation_loss"] is None
    assert [record["asked"] for record in records] == [True, False, True, False, True, False]
    assert sum(record["neurons_added"] for record in records) == sum(growth["neurons"] for growth in growths) > 0
    assert sum(record["grown"] for record in records) == len(growths)
    first, last = records[0], records[-1]
    assert last["parameters"] - first["parameters"] == sum(g["parameters"] for g in growths if g["epoch"])
    assert {"width of a", "width of b", "width of side"} <= set(last)
    assert all(eval(growth["operator"], {"AddNeurons": AddNeurons}) == AddNeurons(k=2) for growth in growths)


def test_records_are_flat_and_ready_for_json(history: History) -> None:
    for record in (*history.records(), *history.growths()):
        assert not any(isinstance(value, (dict, list, tuple)) for value in record.values())
        assert json.loads(json.dumps(record)) == record


def test_a_history_is_a_value(history: History) -> None:
    assert pickle.loads(pickle.dumps(history)) == history
    assert history[-1].epoch == 5
    assert "Growing ended: epoch 4 is over." in str(history)
    assert str(History()) == "no step yet"


def test_tables_for_pandas(history: History) -> None:
    pytest.importorskip("pandas")
    frame = history.to_pandas()
    assert list(frame["epoch"]) == list(range(6))
    assert frame["width of a"].iloc[-1] == history[-1].widths["a"]
    assert len(history.to_pandas("growths")) == len(history.growths())


def test_tables_that_cannot_be(history: History, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(HistoryError, match="'records', 'growths'"):
        history.to_pandas("epochs")
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(HistoryError, match=r"pip install .dagrow\[history\]"):
        history.to_pandas()
