"""One progress bar for each call that takes more than a few seconds, on a terminal; none in files and notebooks."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import ParamSpec, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

P = ParamSpec("P")
T = TypeVar("T")
DELAY = 2.0  #: seconds before a bar appears


class ProgressBar:
    """Rows of one call, such as its epochs and the batches of a pass.

    Args:
        shown: whether it may appear at all.
        console: where; by default standard error.
    """

    def __init__(self, shown: bool = True, console: Console | None = None) -> None:
        self.shown, self.console, self.begun = shown, console, time.monotonic()
        self._progress: Progress | None = None
        self._rows: dict[str, TaskID] = {}

    def update(self, row: str, done: int, total: int | None, description: str = "") -> None:
        """Shows how far a row has got.

        Args:
            row: its name.
            done: how many of its steps are done.
            total: how many there are, or None.
            description: what it says; by default its name.
        """
        if not self.shown or (self._progress is None and time.monotonic() - self.begun < DELAY):
            return
        if self._progress is None:
            self.console = Console(stderr=True) if self.console is None else self.console
            self.shown = self.console.is_terminal
            if not self.shown:
                return
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._progress = Progress(*columns, console=self.console, transient=True)
            self._progress.start()
        if row not in self._rows:
            self._rows[row] = self._progress.add_task(row)
        self._progress.update(self._rows[row], completed=done, total=total, description=description or row)

    def stop(self) -> None:
        """Takes the bar away."""
        if self._progress is not None:
            self._progress.stop()


_current: ContextVar[ProgressBar | None] = ContextVar("progress", default=None)


@contextmanager
def progress_bar(shown: bool = True) -> Iterator[ProgressBar]:
    """The bar of the call that is outermost, for all calls inside it.

    Args:
        shown: whether it may appear, if this call is the outermost.

    Yields:
        The bar.
    """
    outer = _current.get()
    if outer is not None:
        yield outer
        return
    bar = ProgressBar(shown)
    token = _current.set(bar)
    try:
        yield bar
    finally:
        _current.reset(token)
        bar.stop()


def with_progress(verb: Callable[P, T]) -> Callable[P, T]:
    """A verb with a bar; its argument ``progress`` tells whether there is one.

    Args:
        verb: a function that may take long.

    Returns:
        The same with a bar.
    """

    @wraps(verb)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        with progress_bar(bool(kwargs.get("progress", True))):
            return verb(*args, **kwargs)

    return call


def show_batch(number: int, total: int | None, description: str) -> None:
    """Tells the bar, if there is one, that a batch is being read.

    Args:
        number: of the batch, from 0.
        total: how many there are, or None.
        description: of the batches.
    """
    bar = _current.get()
    if bar is not None and bar.shown:
        bar.update("batches", number + 1, total, description)
