"""The only room that writes into a model: changes are drafted here, tried, applied all or nothing, undone, and saved.

A :class:`Draft` collects what becomes wider and which weights the new entries get; the :class:`Change` that comes of it
is a ray in the parameters of the grown network, along which :class:`Growth` knows the loss before anything happens.
Parameters stay the same objects, and the state of optimizers follows them. Where the numbers come from, and which
growth is worth it, this room does not know.

>>> import torch
>>> from torch import nn
>>> from dagrow.graph import trace
>>> from dagrow.surgery import Draft, grown
>>> model = nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 2))
>>> dag = trace(model, torch.ones(4, 5))
>>> axis = dag.axis("0")
>>> change = Draft(dag, [(axis, dag.widening(axis, 2))]).change()
>>> with grown(dag, change, gamma=0.0):
...     model
Sequential(
  (0): Linear(in_features=5, out_features=5, bias=True)
  (1): Tanh()
  (2): Linear(in_features=5, out_features=2, bias=True)
)
>>> model[0]
Linear(in_features=5, out_features=3, bias=True)
"""

from dagrow.axes import disjoint
from dagrow.surgery._apply import grown, preview, transaction
from dagrow.surgery._draft import Change, Draft
from dagrow.surgery._growth import Cost, Growth, Receipt, cost_of, where_new
from dagrow.surgery._loss_check import check_preserved, check_unchanged, noted_draws
from dagrow.surgery._new_layers import NewPath, dependent, zeroed
from dagrow.surgery._optimizers import Optimizers, check_optimizer, check_steps, sequence_of
from dagrow.surgery._penalties import completed
from dagrow.surgery._removal import removal
from dagrow.surgery._store import load, save

__all__ = [
    "Change",
    "Cost",
    "Draft",
    "Growth",
    "NewPath",
    "Optimizers",
    "Receipt",
    "check_optimizer",
    "check_preserved",
    "check_steps",
    "check_unchanged",
    "completed",
    "cost_of",
    "dependent",
    "disjoint",
    "grown",
    "load",
    "noted_draws",
    "preview",
    "removal",
    "save",
    "sequence_of",
    "transaction",
    "where_new",
    "zeroed",
]
