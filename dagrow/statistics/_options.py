"""What every verb that measures takes beside batches and a loss."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal, TypedDict

Reduction = Literal["mean", "sum", "batch"]
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
        progress: whether what takes more than a few seconds shows a progress bar, on a terminal.
    """

    reduction: Reduction | None
    batch_dim: int
    groups: Groups | None
    max_batches: int | None
    progress: bool
