"""What happened while a model grew: plain records."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.table import Table

from dagrow.errors import DagrowError
from dagrow.growth import Receipt
from dagrow.snapshots import Snapshot
from dagrow.tables import render

__all__ = ["Grown", "History", "HistoryError", "Record"]


class HistoryError(DagrowError):
    """A history cannot be shown as asked: a library is missing, or a file cannot be written."""


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

    @staticmethod
    def of(receipt: Receipt) -> "Grown":
        growth = receipt.growth
        assert growth is not None
        return Grown(
            receipt.where, repr(growth.operator), receipt.neurons, receipt.gain, growth.heldout_gain, receipt.gamma,
            receipt.loss_before, receipt.loss_after, growth.cost.parameters, growth.cost.flops,
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


@dataclass(frozen=True)
class History(Sequence[Record]):
    """Records, oldest first; prints as a table of those in which something grew.

    Attributes:
        steps: the records.
        snapshots: the dag as it was at first, and after every step that changed it.
        over: why growing has ended, or None.
    """

    steps: tuple[Record, ...] = ()
    snapshots: tuple[Snapshot, ...] = field(default=(), repr=False)
    over: str | None = None

    def __getitem__(self, index: Any) -> Any:
        return self.steps[index]

    def __len__(self) -> int:
        return len(self.steps)

    def records(self) -> list[dict[str, Any]]:
        """A flat dictionary per step, ready for JSON: what grew is counted, widths are ``width of <axis>``."""
        return [_flat(record) for record in self.steps]

    def growths(self) -> list[dict[str, Any]]:
        """A flat dictionary per growth, with its epoch, ready for JSON."""
        return [{"epoch": record.epoch, **asdict(grown)} for record in self.steps for grown in record.grown]

    def to_pandas(self, of: str = "records") -> Any:
        """A ``pandas.DataFrame`` of ``"records"``, a row per step, or of ``"growths"``, a row per growth.

        Raises:
            HistoryError: pandas is not installed, or ``of`` is neither of the two.
        """
        tables = {"records": self.records, "growths": self.growths}
        if of not in tables:
            raise HistoryError(f"to_pandas(of={of!r}): give one of {', '.join(map(repr, tables))}.")
        try:
            import pandas as pd
        except ImportError as error:
            raise HistoryError(f'to_pandas needs pandas ({error}): pip install "dagrow[history]"') from error
        return pd.DataFrame.from_records(tables[of]())

    def __str__(self) -> str:
        table = Table("epoch", "train loss", "validation loss", "bottleneck", "grew", "parameters", "FLOPs")
        for r in self.steps:
            if r.grown:
                grew = ", ".join(f"{grown.where} +{grown.neurons}" for grown in r.grown)
                share = "" if r.share is None else f"{r.share:.1%}"
                held = "" if r.validation_loss is None else f"{r.validation_loss:.4g}"
                table.add_row(str(r.epoch), f"{r.train_loss:.4g}", held, share, grew, f"{r.parameters:,}",
                              f"{r.flops:,}")  # fmt: skip
        ending = f"Growing ended: {self.over}." if self.over else "Growing has not ended."
        return "\n".join([render(table), ending]) if self.steps else "no step yet"


def _flat(record: Record) -> dict[str, Any]:
    found = asdict(record)
    found["grown"] = len(record.grown)
    found["neurons_added"] = sum(grown.neurons for grown in record.grown)
    return {**found, **{f"width of {axis}": width for axis, width in found.pop("widths").items()}}
