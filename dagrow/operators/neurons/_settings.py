"""What operators ask for where they add neurons."""

from dataclasses import dataclass, field
from typing import Literal

from dagrow.operators._base import Operator
from dagrow.operators.neurons._axis_moments import ByAxis
from dagrow.operators.neurons._places import Place


@dataclass(frozen=True, eq=False)
class NeuronSettings:
    """How new neurons at a place are fitted.

    Attributes:
        operator: what proposes the growth.
        place: where the new channels are written.
        ridges: to choose from.
        k: how many; None for as many as the held-out drop supports, if it is more than chance.
        joint: whether all that the consumers read is regressed out of the new features, and their weights move along;
            else the constant only.
        project: whether ``v_perp`` is explained or, if not, ``v``.
        alternating: whether directions for consumers that read in several slots are improved by turns.
        fan: whether fan-outs are fitted ("fitted") or random with the norm of the fitted ones ("random").
        paired: adds (alpha, omega) and (-alpha, -omega) instead of choosing a sign.
        seed: of random draws.
        by_axis: moments as the places of an axis use them, see :func:`by_axis`.
    """

    operator: Operator
    place: Place
    ridges: tuple[float, ...] = (0.0,)
    k: int | None = None
    joint: bool = False
    project: bool = True
    alternating: bool = False
    fan: Literal["fitted", "random"] = "fitted"
    paired: bool = False
    seed: int = 0
    by_axis: ByAxis = field(kw_only=True)
