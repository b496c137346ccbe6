"""Where in the user's code something happens, for messages."""

import dis
import functools
import linecache
import os
import sys
from traceback import walk_tb
from types import FrameType

from dagrow.errors import first_line

_PACKAGE = __name__.partition(".")[0]
_ROOM = __name__.rpartition(".")[0]


def source(error: BaseException | None = None) -> str:
    """The user's line that runs now, or that raised `error`, as `file.py:12`: the innermost outside torch."""
    if error is None:
        frame = user_frame()
        return _shown(frame, frame.f_lineno) if frame is not None else "unknown line"
    lines = [at for at in walk_tb(error.__traceback__) if not _is_library(at[0].f_globals.get("__name__", ""))]
    return _shown(*lines[-1]) if lines else "unknown line"


def user_frame() -> FrameType | None:
    """What runs of the user's code in the model's forward, without the code that asked for the trace."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not _is_other_room(name := frame.f_globals.get("__name__", "")):
        if not _is_library(name):
            return frame
        frame = frame.f_back
    return None


def _shown(frame: FrameType, line: int) -> str:
    return f"{os.path.basename(frame.f_code.co_filename)}:{line}"


@functools.cache
def _is_other_room(module: str) -> bool:
    """Whether a module belongs to another room of the package, which traces, so that all further out is no forward."""
    room = module.rpartition(".")[0]
    return room.startswith(f"{_PACKAGE}.") and room != _ROOM


@functools.cache
def _is_library(module: str) -> bool:
    return module.partition(".")[0] in ("torch", "functools", "contextlib", _PACKAGE)


def is_raised_by_user(error: BaseException) -> bool:
    """Whether a ``raise`` or an ``assert`` of the user's code, or one of torch's own assertions there, raised an error.

    Other errors come out of an operation, such as one that does not take the sizes that it gets.

    Args:
        error: with its traceback.

    Returns:
        Whether it is the user's own.
    """
    calls: list[tuple[FrameType, int]] = []
    step = error.__traceback__
    while step is not None:
        calls.append((step.tb_frame, step.tb_lasti))
        step = step.tb_next
    modules = [frame.f_globals.get("__name__", "") for frame, _ in calls]
    if modules and modules[-1] == "torch":  # torch._assert or torch._check, which a mode may have called again
        callers = [name for name in modules if name not in ("torch", "torch.overrides")]
        callers = [name for name in callers if not name.startswith(f"{_PACKAGE}.")]
        return bool(callers) and not _is_library(callers[-1])
    if not calls or _is_library(modules[-1]):
        return False
    frame, instruction = calls[-1]
    return dis.opname[frame.f_code.co_code[instruction]] in ("RAISE_VARARGS", "RERAISE")


def statement(error: BaseException) -> str:
    """What an error says, or, where it says nothing, the line that raised it."""
    if str(error):
        return first_line(error)  # type: ignore[arg-type]
    lines = [at for at in walk_tb(error.__traceback__) if not _is_library(at[0].f_globals.get("__name__", ""))]
    code = linecache.getline(lines[-1][0].f_code.co_filename, lines[-1][1]).strip() if lines else ""
    return f"{type(error).__name__}: {code}"


def refusal(what: str, where: str) -> str:
    """Why a graph cannot hold something that depends on the values of a tensor, and what to do instead."""
    return (
        f"{where}: {what} needs the values of a tensor, so the graph would silently depend on the values of "
        "the example. Keep the choice in tensors (torch.where, a mask), pass the number to forward as a "
        "Python number, or compute it once in __init__."
    )
