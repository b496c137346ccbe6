"""Axes: channels that were written, read and carried by the same things grow together.

In comes a labelling, out go layouts of axes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dagrow.axes._channel_labels import Labelling, Rider
from dagrow.axes._label_tensors import NO_CHANNEL

_KINDS = ("rows", "columns", "entries")  #: the tables of a labelling


@dataclass(frozen=True, eq=False)
class AxisLayout:
    """Where the channels of an axis sit: for each unit (the channels that must grow together), its entries.

    Attributes:
        width: the number of units U.
        rows: producing edge -> its output channels ``[U, slots]``.
        columns: consuming edge -> its input channels ``[U, slots]``.
        entries: rider -> label tensor of the rider's entries, units numbered 0..U-1, NO_CHANNEL for others.
        labels: the units' labels.
        labelling: the run on labels that they were found in.
        reason: why the axis cannot grow, or None.
    """

    width: int
    rows: Mapping[str, Tensor]
    columns: Mapping[str, Tensor]
    entries: Mapping[Rider, Tensor]
    labels: Tensor
    labelling: Labelling
    reason: str | None

    @property
    def least(self) -> int:
        """How many units it keeps: one, or two where a single one would not be seen to be one.

        A unit of several channels, as of heads, and a group of one channel of a convolution or a norm, is told by the
        others beside it.
        """
        stated = [
            r.rule.attributes(r.module, self.width) for r in self.entries if r.rule is not None and r.module is not None
        ]
        in_groups = any("groups" in name for names in stated for name in names)
        return 2 if in_groups or any(rows.shape[1] > 1 for rows in self.rows.values()) else 1

    @cached_property
    def members(self) -> Tensor:
        """Which labels are roots of the axis; the last entry is NO_CHANNEL's."""
        return self.labelling.classes.membership(self.labels)


@dataclass(frozen=True, eq=False)
class _Table:
    """One of a labelling's tensors.

    Attributes:
        kind: one of ``_KINDS``.
        key: the edge or rider.
        roots: of its labels, by number; NO_CHANNEL for others.
    """

    kind: str
    key: str | Rider
    roots: np.ndarray


def group(labelling: Labelling, only: Tensor | None = None) -> list[AxisLayout]:
    """Groups the classes of labels into axes, those first that are written first.

    Args:
        labelling: a run on labels.
        only: the labels whose classes to group; by default those of all channels that edges write.

    Returns:
        The layouts of the axes.
    """
    if not labelling.rows:
        return []
    written = torch.cat(list(labelling.rows.values())) if only is None else only
    roots = torch.unique(labelling.classes.roots(written))
    tables = _tables(labelling, roots)
    axis = _axis_numbers(tables, labelling.classes.reason_numbers(roots).numpy())
    widths = np.bincount(axis)
    unit = np.empty_like(axis)  # the number of each root in its axis
    unit[np.argsort(axis, kind="stable")] = np.concatenate([np.arange(width) for width in widths])
    places: list[dict[str, dict[Any, Tensor]]] = [{kind: {} for kind in _KINDS} for _ in widths]
    for table in tables:
        for number, is_there in _axes_in(table.roots, axis):
            if table.kind == "entries":
                entries = np.where(is_there, unit[table.roots], NO_CHANNEL)
            else:
                channels = np.flatnonzero(is_there)
                order = np.argsort(unit[table.roots[channels]], kind="stable")
                entries = channels[order].reshape(widths[number], -1)
            places[number][table.kind][table.key] = torch.from_numpy(entries)
    layouts = [_layout(labelling, roots[torch.from_numpy(axis == number)], at) for number, at in enumerate(places)]
    return sorted(layouts, key=lambda layout: int(layout.labels[0]))


def _tables(labelling: Labelling, roots: Tensor) -> list[_Table]:
    """The tensors of a labelling in which some of the roots occur."""
    position = torch.full((len(labelling.classes) + 1,), NO_CHANNEL)  # of a root among them; the last is NO_CHANNEL's
    position[roots] = torch.arange(len(roots))
    tables = [
        _Table(kind, key, position[labelling.classes.roots(labels)].numpy())
        for kind in _KINDS
        for key, labels in getattr(labelling, kind).items()
    ]
    return [table for table in tables if (table.roots != NO_CHANNEL).any()]


def _axis_numbers(tables: list[_Table], reason_numbers: np.ndarray) -> np.ndarray:
    """The number of each root's axis: roots that occur equally often in every table, and froze for the same reason."""
    # tables are told apart by random weights of 62 bits: two different roots hardly have the same sum by chance
    draws = torch.randint(2**62, (len(tables) + 1,), generator=torch.Generator().manual_seed(0)).numpy()
    sums = np.zeros(len(reason_numbers) + 1, dtype=np.int64)  # the last is NO_CHANNEL's
    sums[:-1] = reason_numbers * draws[-1]
    weights = np.repeat(draws[:-1], [table.roots.size for table in tables])
    np.add.at(sums, np.concatenate([table.roots.ravel() for table in tables]), weights)
    return np.unique(sums[:-1], return_inverse=True)[1]


def _axes_in(roots: np.ndarray, axis: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """The axes that occur in a table, and where."""
    numbers = np.where(roots == NO_CHANNEL, NO_CHANNEL, axis[roots])
    is_one = numbers.size and (numbers == numbers.flat[0]).all()  # most tables are of one axis
    for number in [int(numbers.flat[0])] if is_one else np.unique(numbers).tolist():
        if number != NO_CHANNEL:
            yield number, numbers == number


def _layout(labelling: Labelling, labels: Tensor, places: Mapping[str, Mapping[Any, Tensor]]) -> AxisLayout:
    reason = labelling.classes.reason(int(labels[0]))
    if reason is None and not places["columns"]:
        broadcast = labelling.classes.roots(torch.cat(labelling.broadcast)) if labelling.broadcast else labels[:0]
        is_broadcast = bool(torch.isin(labels, broadcast).any())
        reason = "is broadcast over the channels of another axis" if is_broadcast else None
    return AxisLayout(len(labels), places["rows"], places["columns"], places["entries"], labels, labelling, reason)
