"""What the first batch showed of how a loss depends on weights."""

from dataclasses import dataclass, field


@dataclass
class Findings:
    """Of an objective, layer by layer.

    Attributes:
        compared: layers whose goals were compared with autograd's gradients of their weights.
        penalty: whether the loss takes weights by themselves, too, as a penalty on them does.
        detached: layers of whose weights autograd's gradient need not be the slope of the loss.
    """

    compared: set[str] = field(default_factory=set)
    penalty: bool = False
    detached: set[str] = field(default_factory=set)
