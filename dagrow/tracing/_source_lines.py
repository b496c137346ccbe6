"""Where in the user's code something happens, for messages."""

import functools
import os
import sys
from traceback import walk_stack, walk_tb
from types import FrameType

_PACKAGE = __name__.partition(".")[0]
_TRACING = __name__.rpartition(".")[0]


def source(error: BaseException | None = None) -> str:
    """The user's line that runs now, or that raised `error`, as `file.py:12`: the innermost outside torch."""
    if error is None:
        return _running(sys._getframe(1))
    users = [at for at in walk_tb(error.__traceback__) if not _is_ours(at[0].f_globals.get("__name__", ""))]
    return _shown(*users[-1]) if users else "unknown line"


def _running(frame: FrameType | None) -> str:
    """The line that runs in the model's forward, without the frames of who asked for it."""
    while frame is not None and not _asks(name := frame.f_globals.get("__name__", "")):
        if not _is_ours(name):
            return _shown(frame, frame.f_lineno)
        frame = frame.f_back
    return "unknown line"


def _shown(frame: FrameType, line: int) -> str:
    return f"{os.path.basename(frame.f_code.co_filename)}:{line}"


def user_names() -> tuple[str, ...]:
    """The names that the user's running function uses. A loop to a size cannot be seen, but `range` can."""
    frames = (frame for frame, _ in walk_stack(sys._getframe(1)))
    names = (f.f_code.co_names for f in frames if not _is_ours(f.f_globals.get("__name__", "")))
    return next(names, ())


@functools.cache
def _asks(module: str) -> bool:
    """Whether a module of another room asks tracing for something, so that all further out is no forward."""
    room = module.rpartition(".")[0]
    return room.startswith(f"{_PACKAGE}.") and room != _TRACING


@functools.cache
def _is_ours(module: str) -> bool:
    return module.partition(".")[0] in ("torch", "functools", "contextlib", _PACKAGE)


def refusal(what: str, where: str) -> str:
    """Why a graph cannot hold something that depends on the values of a tensor, and what to do instead."""
    return (
        f"{where}: {what} needs the values of a tensor, so the graph would silently depend on the values of "
        "the example. Keep the choice in tensors (torch.where, a mask), pass the number to forward as a "
        "Python number, or compute it once in __init__."
    )
