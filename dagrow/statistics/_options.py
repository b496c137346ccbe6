"""What every verb that measures takes beside batches and a loss."""

from collections.abc import Callable, Hashable, Mapping, Sequence, Sized
from difflib import get_close_matches
from typing import Any, Literal, TypedDict, get_args

from dagrow.errors import BatchError, GrowthError, LossError, check_real

Reduction = Literal["mean", "sum", "batch"]
Samples = int | Literal["auto"]
Groups = Sequence[Hashable] | Callable[[Any], Sequence[Hashable]]


class MeasureOptions(TypedDict, total=False):
    """Keyword arguments of every verb that measures.

    Attributes:
        reduction: whether the loss is a mean or a sum over the samples of a batch, or one number of the ``"batch"``
            that is neither; by default it is found out.
        batch_dim: the dimension of inputs and targets along which samples lie.
        groups: what samples belong together and go into one fold, such as repeated measurements of one subject: a key
            for each sample, in the order of the batches, or a function from a batch to the keys of its samples.
        max_batches: how many batches are read, at most.
        samples: how many are measured, drawn at random, and as many others for amplitudes, where there is no
            validation; ``"auto"`` for as many as it takes to know the best gain to about a tenth, or for bottlenecks
            ten rows for each feature; by default all.
        max_memory: bytes that measuring may take; by default most of what is free. Places that need more together are
            measured one after the other, those that need more alone are left out.
        max_seconds: that measuring may take: places for growths are measured one by one then, and those for which no
            time is left are left out.
        progress: whether what takes more than a few seconds shows a progress bar, on a terminal.
    """

    reduction: Reduction | None
    batch_dim: int
    groups: Groups | None
    max_batches: int | None
    samples: Samples | None
    max_memory: float | None
    max_seconds: float | None
    progress: bool


def check_options(options: Mapping[str, object]) -> None:
    """Checks what was given, before anything runs.

    Args:
        options: those of :class:`MeasureOptions` that were given.

    Raises:
        TypeError: there is no such option.
        LossError: a reduction is none.
        BatchError: groups, a dimension or a number of batches or samples are none.
        GrowthError: progress is neither true nor false.
    """
    known = list(MeasureOptions.__annotations__)
    for name in options:
        if name not in known:
            meant = get_close_matches(name, known, 1)
            hint = f"did you mean {meant[0]!r}?" if meant else f"there are {', '.join(known)}."
            raise TypeError(f"got an unexpected keyword argument {name!r}; {hint}")
    reduction, groups = options.get("reduction"), options.get("groups")
    if reduction is not None and reduction not in get_args(Reduction):
        raise LossError(
            f"reduction={reduction!r}: give 'mean' or 'sum', of the samples of a batch, 'batch' for one number of each "
            "batch that is neither, or None to find it out."
        )
    if groups is not None and not callable(groups) and (isinstance(groups, (str, Mapping)) or not _indexed(groups)):
        raise BatchError(
            f"groups is a {type(groups).__name__}; give a key for each sample, in the order of the batches, or a "
            "function from a batch to the keys of its samples."
        )
    _check_whole("batch_dim", options.get("batch_dim", 0), 0)
    if options.get("max_batches") is not None:
        _check_whole("max_batches", options["max_batches"], 1)
    samples = options.get("samples")
    if samples is not None and not (isinstance(samples, str) and samples == "auto"):
        _check_whole("samples", samples, 1, " on, or 'auto'")
    if samples is not None and groups is not None and not callable(groups):
        raise BatchError(
            f"samples={samples!r} draws samples at random, and groups is a list of keys in the order of the "
            "batches. Give a function instead, from a batch to the keys of its samples."
        )
    memory, seconds = options.get("max_memory"), options.get("max_seconds")
    check_real("measuring", above=0, none="none of one's own", max_memory=memory, max_seconds=seconds)
    if not isinstance(options.get("progress", True), bool):
        raise GrowthError(f"progress={options['progress']!r}: give True or False.")


def _indexed(groups: object) -> bool:
    return isinstance(groups, Sized) and hasattr(groups, "__getitem__")


def _check_whole(name: str, value: object, least: int, on: str = " on") -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise BatchError(f"{name}={value!r}: give a whole number from {least}{on}.")
