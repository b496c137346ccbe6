"""Places that fail are left out, with a note, and the others go on."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import TypeVar

import torch
from rich.table import Table

from dagrow._log import LOG
from dagrow._text import Printable, render
from dagrow.errors import DagrowError, GrowthError, LimitError, LossError, first_line
from dagrow.graph import Dag
from dagrow.statistics import BesideOutputsError, Objective, PassTooLongError, is_noted, is_of_own_class, measure
from dagrow.surgery import Growth

T = TypeVar("T")


class Growths(Printable, list[Growth]):
    """Growths, best first, and what was left out; prints as a table.

    Attributes:
        left_out: places that failed, each with the reason.
    """

    def __init__(self, growths: Iterable[Growth] = (), left_out: tuple[str, ...] = ()) -> None:
        super().__init__(growths)
        self.left_out = left_out

    def __str__(self) -> str:
        table = Table("operator", "where", "neurons", "gain", "held out", "p", "parameters", "FLOPs")
        for g in self:
            heldout = "" if g.heldout_gain is None else f"{g.heldout_gain:.4g} ± {g.heldout_error:.2g}"
            chance = "" if g.p_value is None else f"{g.p_value:.2g}"
            cost = f"{g.cost.parameters:+,}", f"{g.cost.flops:+,}"
            table.add_row(repr(g.operator), g.where, str(g.neurons), f"{g.gain:.4g}", heldout, chance, *cost)
        lines = [render(table) if self else "no growth", *(f"Left out: {note}" for note in self.left_out)]
        return "\n".join(lines)


class LeftOut:
    """Collects the places that fail in a call."""

    def __init__(self) -> None:
        self._notes: dict[str, None] = {}
        self._errors: list[Exception] = []

    @property
    def notes(self) -> tuple[str, ...]:
        """The places, each with the reason."""
        return tuple(self._notes)

    def add(self, where: str, error: Exception) -> None:
        """Leaves a place out, and says so in the log."""
        note = f"{where}: {error if isinstance(error, DagrowError) else first_line(error)}"
        self._errors.append(error)
        if note not in self._notes:
            LOG.info("left out %s", note)
            LOG.debug("at %s", where, exc_info=error)
        self._notes[note] = None

    def take(self, growths: Growths) -> None:
        """Adds what was left out where growths were proposed, and said there."""
        self._notes |= dict.fromkeys(growths.left_out)

    def refuse(self) -> None:
        """Raises, as nothing is left: the error of a single place, or one that lists all reasons."""
        if not self._errors:
            return
        first, kinds = self._errors[0], {type(error) for error in self._errors}
        if len(self._notes) == 1 and isinstance(first, DagrowError):
            raise first
        kind = type(first) if len(kinds) == 1 and isinstance(first, DagrowError) else GrowthError
        reasons = "".join(f"\n- {note}" for note in self._notes)
        raise kind(
            f"nothing can grow, as every place that was looked at fails:{reasons}\nName other places with axes= or "
            "edges= of the operators, or see print(dag)."
        ) from first


def halves(
    members: Sequence[T],
    error: Exception,
    left_out: LeftOut,
    where: Callable[[T], str],
    is_of_place: Callable[[Exception], bool],
) -> list[Sequence[T]]:
    """Of places that failed together two halves, to be tried again; none of one that failed alone: it is left out.

    Args:
        members: the places.
        error: what they raised.
        left_out: takes a place that failed alone.
        where: the name of a place.
        is_of_place: whether an error is of some places only; another one is raised again.

    Returns:
        What is to be tried again.
    """
    if not is_of_place(error):
        raise error
    if len(members) == 1:
        left_out.add(where(members[0]), error)
        return []
    middle = len(members) // 2
    return [members[:middle], members[middle:]]


def is_of_place(error: Exception, dag: Dag, objective: Objective, *, grown: bool, folds: int = 1) -> bool:
    """Whether what a pass raised is of some places only, so that others may go on without them.

    Of the whole call are losses and batches that do not fit, what a user's loss, step or loader raises, and memory that
    runs out. Where the model fails only when it is grown, that is of the place. The model as it is runs once to tell.

    Args:
        error: what a pass raised.
        dag: of the model.
        objective: what was measured.
        grown: whether new channels or layers were in the model.
        folds: of the pass.

    Returns:
        Whether it is. What the model raises as it is comes out.
    """
    if isinstance(error, (MemoryError, torch.OutOfMemoryError, BesideOutputsError)):
        return False
    if isinstance(error, LossError) and not grown:
        return False
    if isinstance(error, LimitError):
        return not isinstance(error, PassTooLongError)
    if is_noted(error):  # the user's; that of a model may be because it is grown, unless it is there to stop the call
        modules = {id(module) for module in dag.model.modules()}
        in_model = any(id(owner) in modules for owner in _owners(error.__traceback__))
        if is_of_own_class(error) or not (grown and in_model):
            return False
    measure(dag, objective, [], folds=folds)
    return True


def _owners(traceback: TracebackType | None) -> Iterator[object]:
    """Whose methods ran when something was raised."""
    while traceback is not None:
        yield traceback.tb_frame.f_locals.get("self")
        traceback = traceback.tb_next
