"""TODO operators.neurons."""

from dagrow.operators.neurons._fan_in import OPEN, OptimalCandidate, drawn
from dagrow.operators.neurons._fan_out import Proposal, WidenCandidate
from dagrow.operators.neurons._places import Place, places
from dagrow.operators.neurons._preserving import CopyCandidate, GradMaxCandidate, ZeroCandidate

__all__ = [
    "OPEN",
    "CopyCandidate",
    "GradMaxCandidate",
    "OptimalCandidate",
    "Place",
    "Proposal",
    "WidenCandidate",
    "ZeroCandidate",
    "drawn",
    "places",
]
