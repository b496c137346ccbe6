"""New paths past layers that there are: where they can be laid, which of many places are best, and their last layer.

A site leads from an activation to a pre-activation that does not lead to it, or, as a residual block, to itself. The
steps of a candidate fit the last layer of a path there, whatever comes before it. Nothing here writes to a model.

>>> import torch
>>> from torch import nn
>>> import dagrow
>>> from dagrow.operators.paths import path_sites, residual_sites
>>> model = nn.Sequential(nn.Linear(5, 2), nn.Tanh(), nn.Linear(2, 3))
>>> dag = dagrow.trace(model, torch.randn(2, 5))
>>> [site.place for site in path_sites(dag) + residual_sites(dag)]
['input -> 2', '0 -> itself']
"""

from dagrow.operators.paths._link_search import path_sites, refuse_unwritable, residual_sites
from dagrow.operators.paths._links import PathSite, filled
from dagrow.operators.paths._path_fit import PathForm, everything, fit_path
from dagrow.operators.paths._screening import EXACT, screened

__all__ = [
    "EXACT",
    "PathForm",
    "PathSite",
    "everything",
    "filled",
    "fit_path",
    "path_sites",
    "refuse_unwritable",
    "residual_sites",
    "screened",
]
