"""Histories: plain records, tables, figures and a page that needs nothing else."""

import json
import pickle
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dagrow
from dagrow import AddNeurons, FigureError, Grower, History, HistoryError
from dagrow.growing._records import growable_widths, snapshot
from dagrow.pictures import Activation, Link, Snapshot
from dagrow.pictures._graph_plot import picture

X = torch.randn(120, 5, generator=torch.Generator().manual_seed(0)).double()
Y = torch.tanh(X[:, :3] * X[:, 1:4])


class Net(nn.Module):
    """A chain, a way around it, and a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.side, self.head = nn.Linear(5, 2), nn.Linear(2, 2), nn.Linear(5, 1), nn.Linear(3, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.b(torch.tanh(self.a(x))))
        return self.head(torch.cat([h, torch.relu(self.side(x))], 1))


@pytest.fixture(scope="module")
def history() -> History:
    grower = Grower(
        dagrow.trace(Net(), X[:2]),
        nn.functional.mse_loss,
        [AddNeurons(k=2)],
        schedule=dagrow.EveryEpochs(2),
        stop=[dagrow.AfterEpoch(4)],
    )
    for epoch in range(6):
        grower.step(epoch, [(X, Y)], [(X[:40], Y[:40])] if epoch else None)
    return grower.history


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


def test_a_new_path_leaves_names_and_pasts_as_they_are() -> None:
    """What reads an axis by its name goes on with it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    dag = dagrow.trace(model.double(), X[:2])
    first = snapshot(dag)
    paths = [dagrow.AddConnection(targets=("2",), folds=1), dagrow.AddLayer(2, nn.Tanh(), folds=1)]
    for operator in paths:
        growths = dagrow.propose(dag, [(X, Y)], nn.functional.mse_loss, [operator])
        next(growth for growth in growths if growth.where == "input -> 2").apply(0.1)
    assert len(dag.axis("2").producers) == 3
    assert growable_widths(dag) == {**first.widths, "hidden1.fan_in": 2}
    (bar,) = (bar for bar in picture([first, snapshot(dag, 1)]).bars if bar.label == "2")
    assert bar.stages == ((None, 4),)


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


def test_snapshots_know_widths_and_ways(history: History) -> None:
    first, last = history.snapshots[0], history.snapshots[-1]
    assert first == snapshot(dagrow.trace(Net(), X[:2]))
    assert {link.edge for link in first.links} == {"a", "b", "side", "head"}
    widths = {one.label: one.width for one in last.activations}
    assert widths["a"] == history[-1].widths["a"] > 2
    assert (widths["input"], widths["output"]) == (5, 3)
    assert widths["b, side"] == history[-1].widths["b"] + history[-1].widths["side"]
    assert len(history.snapshots) == 1 + sum(bool(record.grown) for record in history)


def test_a_picture_tells_when_what_was_added(history: History) -> None:
    found = picture(history.snapshots)
    (bar,) = (bar for bar in found.bars if bar.label == "a")
    assert bar.stages[0] == (None, 2)
    grown = {record.epoch: record.widths["a"] for record in history}
    assert all(grown[epoch] == width for epoch, width in bar.stages[1:] if epoch is not None)
    assert bar.width == history[-1].widths["a"]
    assert [bar.stages for bar in found.bars if bar.label == "input"] == [((None, 5),)]
    for arrow in found.arrows:
        assert found.bars[arrow.source].x < found.bars[arrow.target].x
        assert arrow.since is None


def test_a_layer_that_came_later_has_its_epoch() -> None:
    ends = (Activation("x", "input", 3), Activation("h", "a", 2), Activation("y", "output", 1))
    links = (Link("a", "Linear", "x", "h", 8), Link("b", "Linear", "h", "y", 3))
    later = (*links, Link("new", "Linear", "x", "y", 3))
    found = picture([Snapshot(None, ends, links, {}), Snapshot(4, ends, later, {})])
    assert {arrow.edge: arrow.since for arrow in found.arrows} == {"a": None, "b": None, "new": 4}
    assert [(bar.x, bar.y) for bar in found.bars] == [(0, 0.0), (1, 0.0), (2, 0.0)]


def test_places_do_not_collide(history: History) -> None:
    block = nn.ModuleList([nn.Linear(4, 3) for _ in range(3)])

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ways, self.outs = block, nn.ModuleList([nn.Linear(3, 2) for _ in range(3)])

        def forward(self, x: Tensor) -> list[Tensor]:
            return [out(torch.relu(way(x))) for way, out in zip(self.ways, self.outs, strict=True)]

    found = picture([snapshot(dagrow.trace(Wide(), torch.randn(2, 4)))])
    places = [(bar.x, bar.y) for bar in found.bars]
    assert len(set(places)) == len(places) == 5
    assert found.lanes == 3


def test_figures_are_drawn_and_look_like_something(history: History, tmp_path: Path) -> None:
    read = pytest.importorskip("matplotlib.image").imread
    for name, draw in (("plot", history.plot), ("graph", history.graph)):
        draw(tmp_path / f"{name}.png")
        drawn = read(tmp_path / f"{name}.png")[..., :3]
        assert len({tuple(color) for color in drawn[::3, ::3].reshape(-1, 3).round(1).tolist()}) > 8
        draw(str(tmp_path / f"{name}.svg"))
        assert (tmp_path / f"{name}.svg").read_text().startswith("<?xml")


def test_figures_of_what_has_hardly_happened(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    dag = dagrow.trace(Net(), X[:2])
    grower = Grower(
        dag, lambda output, target: -(output * target).sum(1).mean(), schedule=dagrow.EveryEpochs(1, first=9)
    )
    for _ in range(2):
        for name in ("plot.png", "graph.png", "page.html"):
            getattr(grower.history, name.split(".")[0].replace("page", "html"))(tmp_path / name)
        grower.step(0, [(X, Y)])


def test_figures_that_cannot_be(history: History, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for draw in (history.plot, history.graph):
        with pytest.raises(FigureError, match="must end in one of"):
            draw(tmp_path / "figure.txt")
    for draw in (history.plot, history.graph, history.html):
        with pytest.raises(FigureError, match="no folder"):
            draw(tmp_path / "missing" / "figure.png")
    (tmp_path / "taken.png").mkdir()
    with pytest.raises(FigureError, match="is a folder"):
        history.html(tmp_path / "taken.png")
    for nothing in (3, None):
        for draw in (history.plot, history.graph, history.html):
            with pytest.raises(FigureError, match="give the name of a file"):
                draw(nothing)  # type: ignore[arg-type]
    for draw in (History().plot, History().graph, History().html):
        with pytest.raises(HistoryError, match=r"no dag.*dagrow\.fit"):
            draw(tmp_path / "figure.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(FigureError, match=r"pip install .dagrow\[history\]"):
        history.plot(tmp_path / "figure.png")


def page(history: History, path: Path) -> tuple[str, Any]:
    """The page, and the data in it."""
    history.html(path)
    text = path.read_text()
    return text, json.loads(re.findall(r"^const data = (.*);$", text, re.MULTILINE)[0].replace("<\\/", "</"))


def test_the_page_holds_everything_and_loads_nothing(history: History, tmp_path: Path) -> None:
    text, data = page(history, tmp_path / "page.html")
    assert set(re.findall(r"https?://[^\"' ]+", text)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<link|<script src|<img|@import|url\(|fetch\(", text)
    assert data["growths"] == history.growths()
    assert [step["train_loss"] for step in data["steps"]] == [record.train_loss for record in history]
    assert data["over"] == history.over
    assert len(data["bars"]) == len(history.snapshots[-1].activations)


def test_names_and_numbers_cannot_break_the_page(history: History, tmp_path: Path) -> None:
    strange = replace(history[0], widths={"</script><b>": 1}, train_loss=float("inf"))
    text, data = page(replace(history, steps=(strange,)), tmp_path / "page.html")
    assert text.count("</script>") == 1
    assert data["steps"][0]["widths"] == {"</script><b>": 1}
    assert data["steps"][0]["train_loss"] is None
