"""Pictures of plain values: figures of records, the dag as it grew, and an interactive page of both.

It takes :class:`Record` and :class:`Snapshot` values, and matplotlib's axes from those who draw more, and gives files.
It knows nothing of models, dags or growths, so that a history can be drawn where none of them is at hand.

>>> from pathlib import Path
>>> from tempfile import TemporaryDirectory
>>> from dagrow.pictures import Activation, Link, Record, Snapshot, write_page
>>> nodes = (Activation("x", "input", 3), Activation("h", "a", 2), Activation("y", "output", 1))
>>> layers = (Link("a", "Linear", "x", "h", 8), Link("b", "Linear", "h", "y", 3))
>>> dag = Snapshot(None, nodes, layers, {"a": 2})
>>> record = Record(0, 1.5, 0.7, None, False, None, (), {"a": 2}, 11, 17)
>>> with TemporaryDirectory() as folder:
...     write_page([record], [], [dag], None, Path(folder, "page.html"))
...     "How the model grew" in Path(folder, "page.html").read_text(encoding="utf-8")
True
"""

from dagrow.pictures._figures import check_figure, check_place, empty_figure, rendered, write, write_bytes
from dagrow.pictures._graph_plot import draw_graph
from dagrow.pictures._history_plots import draw_plot
from dagrow.pictures._page import write_page
from dagrow.pictures._records import Activation, Grown, Link, Record, Snapshot

__all__ = [
    "Activation",
    "Grown",
    "Link",
    "Record",
    "Snapshot",
    "check_figure",
    "check_place",
    "draw_graph",
    "draw_plot",
    "empty_figure",
    "rendered",
    "write",
    "write_bytes",
    "write_page",
]
