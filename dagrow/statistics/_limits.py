"""How much memory and time measuring may take: estimated from shapes, before anything large is begun.

What a pass holds are sums of products, ``F dx dy`` entries of each pair of features in F folds, or rows where these are
fewer; what solving holds beside them are a few matrices as large as a Gram.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import psutil
import torch

from dagrow.errors import LimitError
from dagrow.statistics._features import Feature
from dagrow.statistics._options import MeasureOptions

SHARE = 0.8  #: of the memory that is free may be taken
SOLVING = 3  #: matrices in double precision, as large as a Gram, that are held while it is solved


class PassTooLongError(LimitError):
    """A pass over the batches would take too long, whatever is measured."""


@dataclass(frozen=True)
class Limits:
    """Of one call.

    Attributes:
        memory: bytes; None for most of what is free.
        until: when time is over, on the monotonic clock; None for no limit.
        seconds: that were given.
    """

    memory: float | None = None
    until: float | None = None
    seconds: float | None = None

    @classmethod
    def of(cls, options: MeasureOptions) -> "Limits":
        """Those of a call that begins now."""
        seconds = options.get("max_seconds")
        return cls(options.get("max_memory"), None if seconds is None else time.monotonic() + seconds, seconds)

    @property
    def seconds_left(self) -> float:
        """Until time is over; infinite without a limit."""
        return float("inf") if self.until is None else self.until - time.monotonic()

    def check_memory(self, needed: Mapping[tuple[Feature, Feature], float], device: torch.device) -> None:
        """Compares what pairs of features need with what there is.

        Args:
            needed: pair -> bytes.
            device: where sums are kept.

        Raises:
            LimitError: there is less.
        """
        total, room = sum(needed.values()), _free(device) * SHARE if self.memory is None else self.memory
        if total <= room:
            return
        largest = max(needed, key=lambda pair: needed[pair])
        edges = ", ".join(dict.fromkeys(edge for feature in largest for edge in feature.edges))
        given = "are free" if self.memory is None else "max_memory allows"
        raise LimitError(
            f"measuring would take about {_size(total)}, most of it for products of what layers {edges} read and want, "
            f"and {_size(room)} {given}. Give fewer samples= (of fewer samples than half as many as features rows are "
            "kept instead of products), folds=1, which keeps one sum instead of one a fold, or leave the place out."
        )

    def check_time(self, begun: float, done: int, batches: int | None) -> None:
        """Compares how long a pass would take with the time that is left.

        Args:
            begun: when the last batch was, on the monotonic clock.
            done: batches.
            batches: of the pass, if that is known.

        Raises:
            PassTooLongError: it would take longer.
        """
        if self.until is None or batches is None:
            return
        expected = (time.monotonic() - begun) * (batches - done)
        if expected > self.seconds_left:
            raise PassTooLongError(
                f"one pass over {batches} batches would take about {expected:.3g} seconds more, and of "
                f"max_seconds={self.seconds:g} {max(0.0, self.seconds_left):.3g} are left. Give fewer samples=, such "
                "as samples='auto', or max_batches=."
            )


def bytes_needed(
    x_entries: int, y_entries: int, rows: float, most: int, folds: int, itemsize: int, *, own: bool
) -> float:
    """What the products of a pair take.

    Args:
        x_entries: of a row of the first feature.
        y_entries: of the second.
        rows: that there will be, infinite where that is not known.
        most: rows up to which they are kept as they are.
        folds: that sums are kept in.
        itemsize: bytes of an entry of a sum.
        own: whether the pair is a feature with itself, whose Gram is solved.

    Returns:
        Bytes.
    """
    if rows <= most:
        return 4.0 * rows * (x_entries + (0 if own else y_entries))
    return float(x_entries * y_entries * (folds * itemsize + (SOLVING * 8 if own else 0)))


def _free(device: torch.device) -> float:
    """Bytes that are free."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return float(psutil.virtual_memory().available) if device.type == "cpu" else float("inf")


def _size(count: float) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e8 else f"{count / 1e6:.3g} MB"
