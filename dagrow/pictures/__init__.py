"""TODO pictures."""

from dagrow.pictures._figures import blank, check_figure, tidy, write
from dagrow.pictures._graph_plot import draw_graph
from dagrow.pictures._history_plots import draw_plot, draw_widths, log_scale
from dagrow.pictures._page import write_page
from dagrow.pictures._records import Activation, Grown, Link, Record, Snapshot

__all__ = [
    "Activation",
    "Grown",
    "Link",
    "Record",
    "Snapshot",
    "blank",
    "check_figure",
    "draw_graph",
    "draw_plot",
    "draw_widths",
    "log_scale",
    "tidy",
    "write",
    "write_page",
]
