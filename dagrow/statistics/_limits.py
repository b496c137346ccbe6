"""How much memory and time measuring may take: estimated from shapes, before anything large is begun.

What a pass holds are sums of products, ``F dx dy`` entries of each pair of features in F folds, or rows where these are
fewer; what solving holds beside them are a few matrices as large as a Gram.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import psutil
import torch

from dagrow.errors import LimitError
from dagrow.statistics._features import Feature
from dagrow.statistics._options import MeasureOptions

SHARE = 0.8  #: of the memory that is free may be taken
SOLVING = 3  #: matrices in double precision, as large as a Gram, that are held while it is solved


class PassTooLongError(LimitError):
    """A pass over the batches would take too long, whatever is measured."""


@dataclass
class Limits:
    """Of one call, and how its time was spent.

    Attributes:
        memory: bytes; None for most of what is free.
        seconds: None for no limit.
        begun: when the call was, on the monotonic clock.
        taken: seconds that each place took so far.
        passes: over the batches, so far.
    """

    memory: float | None = None
    seconds: float | None = None
    begun: float = field(default_factory=lambda: time.monotonic())
    taken: list[float] = field(default_factory=list)
    passes: int = 0

    @classmethod
    def of(cls, options: MeasureOptions) -> "Limits":
        """Those of a call that begins now."""
        return cls(options.get("max_memory"), options.get("max_seconds"))

    @property
    def spent(self) -> float:
        """Seconds since the call began."""
        return time.monotonic() - self.begun

    def allow(self, seconds: float) -> bool:
        """Whether something that takes so long would end in time."""
        return self.seconds is None or self.spent + seconds <= self.seconds

    def check_memory(self, needed: Mapping[tuple[Feature, Feature], float], device: torch.device, folds: int) -> None:
        """Compares what pairs of features need with what there is.

        Args:
            needed: pair -> bytes.
            device: where sums are kept.
            folds: that sums are kept in.

        Raises:
            LimitError: there is less.
        """
        total, room = sum(needed.values()), _free(device) * SHARE if self.memory is None else self.memory
        if total <= room:
            return
        largest = max(needed, key=lambda pair: needed[pair])
        edges = ", ".join(dict.fromkeys(edge for feature in largest for edge in feature.edges))
        given = "are free" if self.memory is None else "max_memory allows"
        fewer = ", fewer folds, which keep a sum each" if folds > 1 else ""
        raise LimitError(
            f"measuring would take about {_size(total)}, most of it for products of what layers {edges} read and want, "
            f"and {_size(room)} {given}. Give fewer samples= (of fewer samples than half as many as features rows are "
            f"kept instead of products){fewer}, or leave the place out."
        )

    def check_pass(self, seconds: float, done: int, batches: int | None) -> None:
        """Compares how long the first pass of a call would take with the time that is left.

        Args:
            seconds: that the last batch took.
            done: batches.
            batches: of the pass, if that is known.

        Raises:
            PassTooLongError: it would take longer.
        """
        if self.passes or batches is None or self.allow(seconds * (batches - done)):
            return
        raise PassTooLongError(
            f"one pass over {batches} batches would take about {seconds * (batches - done):.3g} seconds more, and "
            f"{self.spent:.3g} of max_seconds={self.seconds:g} are over. Give fewer samples=, such as samples='auto', "
            "or max_batches=."
        )


def _free(device: torch.device) -> float:
    """Bytes that are free."""
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + reserved)
    return float(psutil.virtual_memory().available) if device.type == "cpu" else float("inf")


def _size(count: float) -> str:
    units = [(1e9, "GB"), (1e6, "MB"), (1e3, "kB")]
    unit, name = next(((unit, name) for unit, name in units if count >= unit), (1.0, "bytes"))
    return f"{count / unit:.3g} {name}"
