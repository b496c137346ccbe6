"""What happened in one step of growing: plain values."""

from collections.abc import Mapping
from dataclasses import dataclass

from dagrow.growth import Receipt

__all__ = ["Grown", "Record"]


@dataclass(frozen=True)
class Grown:
    """One applied growth, see :class:`dagrow.Growth` and :class:`dagrow.Receipt`.

    Attributes:
        operator: its ``repr``.
        parameters, flops: what it added.
    """

    where: str
    operator: str
    neurons: int
    gain: float
    heldout_gain: float | None
    gamma: float
    loss_before: float
    loss_after: float
    parameters: int
    flops: int
    heldout_error: float | None = None
    p_value: float | None = None

    @staticmethod
    def of(receipt: Receipt) -> "Grown":
        growth = receipt.growth
        assert growth is not None
        return Grown(
            receipt.where, repr(growth.operator), receipt.neurons, receipt.gain, growth.heldout_gain, receipt.gamma,
            receipt.loss_before, receipt.loss_after, growth.cost.parameters, growth.cost.flops,
            growth.heldout_error, growth.p_value,
        )  # fmt: skip


@dataclass(frozen=True)
class Record:
    """One step of a :class:`dagrow.Grower`, as a rule after an epoch of training.

    Attributes:
        epoch: as it was given.
        seconds: since the grower was made.
        train_loss, validation_loss: before growing; the second is None without batches for validation.
        asked: whether growing was asked for.
        share: the part of all goals that no layer's own weights can follow, before growing; None where it was not
            measured, which it is when growing is asked for.
        grown: what was applied, first to last.
        widths: of the axes that can grow, after growing.
        parameters, flops: of the whole model, after growing.
    """

    epoch: int
    seconds: float
    train_loss: float
    validation_loss: float | None
    asked: bool
    share: float | None
    grown: tuple[Grown, ...]
    widths: Mapping[str, int]
    parameters: int
    flops: int

    @property
    def loss(self) -> float:
        """The validation loss, or the training loss where there is none."""
        return self.train_loss if self.validation_loss is None else self.validation_loss

    @property
    def added(self) -> tuple[Grown, ...]:
        """What was applied and added parameters."""
        return tuple(grown for grown in self.grown if grown.parameters)
