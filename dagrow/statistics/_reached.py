"""The modules that a loss or a step can reach: by its closure, its object, its arguments, or the globals it names."""

from collections.abc import Callable, Iterator
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import Any

from torch import nn

_MOST = 1000  #: objects that are looked at
_CONTAINERS = (list, tuple, set, frozenset)


def modules_reached(function: Callable[..., Any]) -> list[nn.Module]:
    """Modules that a function may run or update, even where it does not call them as such.

    Args:
        function: of the user's, or an object that can be called.

    Returns:
        The modules, without their parts.
    """
    queue, seen, found = [function], set[int](), list[nn.Module]()
    for thing in queue:
        if id(thing) in seen or len(seen) > _MOST:
            continue
        seen.add(id(thing))
        if isinstance(thing, nn.Module):
            found.append(thing)
        queue += _held_by(thing)
    return found


def _held_by(thing: Any) -> list[Any]:
    if isinstance(thing, FunctionType):
        cells = [cell.cell_contents for cell in thing.__closure__ or () if _is_filled(cell)]
        names = () if _is_library(thing.__module__) else _names(thing.__code__)
        named = [thing.__globals__[name] for name in names if name in thing.__globals__]
        return [*cells, *(thing.__defaults__ or ()), *(thing.__kwdefaults__ or {}).values(), *named]
    if isinstance(thing, MethodType):
        return [thing.__self__, thing.__func__]
    if isinstance(thing, partial):
        return [thing.func, *thing.args, *thing.keywords.values()]
    if isinstance(thing, dict):
        return list(thing.values()) if len(thing) < _MOST else []
    if isinstance(thing, _CONTAINERS):
        return list(thing) if len(thing) < _MOST else []
    if isinstance(thing, type) or _is_library(type(thing).__module__):
        return []
    return [*getattr(thing, "__dict__", {}).values(), vars(type(thing)).get("__call__")]


def _is_library(module: str | None) -> bool:
    return (module or "").partition(".")[0] in ("torch", "numpy", "builtins", "dagrow")


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # empty
        return False


def _names(code: CodeType) -> Iterator[str]:
    """Of what a function and those within it name."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
