"""Figures: drawn, of hardly anything, and refused."""

import sys
from pathlib import Path

import pytest
from histories import Net, X, Y, grown_history

import dagrow
from dagrow import FigureError, Grower, History, HistoryError

history = pytest.fixture(scope="module")(grown_history)


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
