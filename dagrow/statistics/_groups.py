"""Samples that belong together, such as repeated measurements of one subject: they go into one fold, as one unit."""

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler

from dagrow.errors import BatchError
from dagrow.statistics._objective import Objective


class GroupNumbers:
    """The groups of samples, batch after batch, numbered in the order in which they appear.

    Args:
        objective: with ``groups``.

    Raises:
        BatchError: keys are a list, and the loader shuffles.
    """

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.numbers: dict[Hashable, int] = {}
        self.seen = 0
        order = _unknown_order(objective.batches)
        if order is not None and objective.groups is not None and not callable(objective.groups):
            raise BatchError(
                "groups is a list of keys, in the order of samples, and the loader takes samples in the order of a "
                f"{type(order).__name__}. Give a function instead, from a batch to the keys of its samples, or a "
                "loader that does not shuffle."
            )

    def of(self, batch: object, n: int) -> Tensor | None:
        """The numbers of a batch.

        Args:
            batch: n samples, which follow those of the batch before.
            n: their number.

        Returns:
            One for each sample ``[n]``; None where there are no groups.

        Raises:
            BatchError: there are not as many keys as samples.
        """
        groups = self.objective.groups
        if groups is None:
            return None
        if callable(groups):
            keys, given = _plain(groups(batch)), "groups(batch) returned {} keys for a batch of {} samples"
        else:
            keys = _plain(groups[self.seen : self.seen + n])
            given = f"groups holds {len(groups)} keys, {{}} of them for the {{}} samples after the first {self.seen}"
        if len(keys) != n:
            raise BatchError(f"{given.format(len(keys), n)}; give a key for each sample, in the order of the batches.")
        self.seen += n
        try:
            return torch.tensor([self.numbers.setdefault(key, len(self.numbers)) for key in keys])
        except TypeError as error:
            raise BatchError(f"a key of groups cannot be told from others ({error}); give numbers or names.") from error

    def check_all_read(self) -> None:
        """To be called after the last batch.

        Raises:
            BatchError: there are keys left.
        """
        groups, objective = self.objective.groups, self.objective
        if groups is None or callable(groups) or objective.max_batches is not None or self.seen == len(groups):
            return
        raise BatchError(
            f"groups holds {len(groups)} keys for {self.seen} samples; give a key for each sample, in the order of the "
            "batches."
        )


def _unknown_order(batches: object) -> object:
    """What makes a loader take samples in another order than that of its data, or may; None if nothing does."""
    if not isinstance(batches, DataLoader) or isinstance(batches.dataset, IterableDataset):
        return None
    order = batches.sampler if batches.batch_sampler is None else batches.batch_sampler
    order = order.sampler if type(order) is BatchSampler else order
    return None if isinstance(order, SequentialSampler) else order


def _plain(keys: Any) -> Sequence[Hashable]:
    """Keys of tensors and arrays as numbers."""
    return keys.tolist() if hasattr(keys, "tolist") else list(keys)
