"""TODO surgery."""

from dagrow.axes import disjoint
from dagrow.surgery._apply import all_or_nothing, grown, preview, transaction
from dagrow.surgery._draft import Change, Draft
from dagrow.surgery._growth import Cost, Growth, Receipt, cost_of, where_new
from dagrow.surgery._new_layers import NewPath, blank, dependent
from dagrow.surgery._optimizers import check_optimizer, check_steps
from dagrow.surgery._store import load, save

__all__ = [
    "Change",
    "Cost",
    "Draft",
    "Growth",
    "NewPath",
    "Receipt",
    "all_or_nothing",
    "blank",
    "check_optimizer",
    "check_steps",
    "cost_of",
    "dependent",
    "disjoint",
    "grown",
    "load",
    "preview",
    "save",
    "transaction",
    "where_new",
]
