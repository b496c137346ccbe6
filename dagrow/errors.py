"""The errors that users meet. Each message says what was given, why it does not work, and what to do instead."""

from collections.abc import Callable, Iterable
from math import inf
from sys import float_info
from typing import Any

SEEDS = 2**32 - 1  #: the largest seed


class DagrowError(Exception):
    """Base class of everything that dagrow raises on purpose. The model is as it was before the call."""


class TraceError(DagrowError):
    """The model cannot be turned into a graph, or the graph does not compute what the model computes."""


class BatchError(DagrowError):
    """The batches are empty, exhausted, or do not fit the model (shape, dtype, device)."""


class LossError(DagrowError):
    """The loss is not a finite scalar that depends on the model, or is neither a mean nor a sum over samples."""


class NotFiniteError(LossError):
    """The loss is infinite or not a number."""


class GrowthError(DagrowError):
    """A growth cannot be proposed, applied or undone as asked."""


class NoPlaceError(GrowthError):
    """An operator finds no place in a model as it is; it may find some in what others grow."""


class OptimizerError(DagrowError):
    """The optimizer holds state that cannot follow a parameter that grew."""


class LimitError(DagrowError):
    """Measuring would take more memory than there is, or more memory or time than it may."""


class StoreError(DagrowError):
    """A file cannot be written or read, or what it holds does not fit the model."""


class FigureError(DagrowError):
    """The figure cannot be drawn or written."""


class HistoryError(DagrowError):
    """A history does not become a table or a picture as asked."""


class DataError(DagrowError):
    """A data set is missing, damaged, or not what it should be."""


def first_line(error: Exception) -> str:
    """The first line of an error of others, for messages of ours.

    Args:
        error: what was raised.

    Returns:
        Its type and the first line of its text.
    """
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def check_whole(of: str, least: float = -inf, most: float = inf, *, none: str = "", **arguments: object) -> None:
    """Checks that arguments are whole numbers within limits.

    Args:
        of: what takes the arguments.
        least: the smallest that is allowed.
        most: the largest.
        none: what None stands for, where it may be given.
        arguments: by their names.

    Raises:
        GrowthError: one of them is not.
    """
    limits = f" from {least} {'on' if most == inf else f'to {most}'}" if least > -inf else ""
    _check(of, (int,), lambda value: least <= value <= most, f"a whole number{limits}", none, arguments)


def check_real(
    of: str, least: float = -inf, most: float = inf, *, above: float = -inf, none: str = "", **arguments: object
) -> None:
    """Checks that arguments are finite numbers within limits.

    Args:
        of: what takes the arguments.
        least: the smallest that is allowed.
        most: the largest.
        above: a number below all that are allowed.
        none: what None stands for, where it may be given.
        arguments: by their names.

    Raises:
        GrowthError: one of them is not.
    """
    limits = f" from {least} on" if least > -inf else f" above {above}" if above > -inf else ""
    limits += f" and at most {most}" if most < inf else ""

    def fits(value: Any) -> bool:
        return abs(value) <= float_info.max and above < value and least <= value <= most

    _check(of, (int, float), fits, f"a finite number{limits}", none, arguments)


def _check(
    of: str, kinds: tuple[type, ...], fits: Callable[[Any], bool], wanted: str, none: str, arguments: dict[str, object]
) -> None:
    for name, value in arguments.items():
        number = isinstance(value, kinds) and not isinstance(value, bool)
        if not (number and fits(value)) and not (none and value is None):
            raise GrowthError(f"{of}({name}={value!r}): give {wanted}{none and f', or None for {none}'}.")


def listed(name: str, argument: object, kind: type, example: str, *, empty: bool = True) -> tuple[Any, ...]:
    """The values of an argument, of which one may be given alone.

    Args:
        name: of the argument.
        argument: values, or one.
        kind: what they have to be.
        example: of what to give.
        empty: whether there may be none.

    Returns:
        The values.

    Raises:
        GrowthError: a value is of another kind, or there is none.
    """
    values = tuple(argument) if isinstance(argument, Iterable) else (argument,)
    if not all(isinstance(value, kind) for value in values) or not (values or empty):
        raise GrowthError(f"{name}={argument!r}: give a list such as {example}.")
    return values
