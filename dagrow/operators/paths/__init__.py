"""TODO operators.paths."""

from dagrow.operators.paths._link_search import path_sites, refuse_unwritable, residual_sites
from dagrow.operators.paths._links import PathCandidate, PathSite, everything, filled
from dagrow.operators.paths._screening import EXACT, screened

__all__ = [
    "EXACT",
    "PathCandidate",
    "PathSite",
    "everything",
    "filled",
    "path_sites",
    "refuse_unwritable",
    "residual_sites",
    "screened",
]
