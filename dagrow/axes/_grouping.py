"""Axes: channels that were written, read and carried by the same things grow together."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dagrow.axes._channel_labels import Labelling, Rider
from dagrow.axes._union_find import NO_CHANNEL


@dataclass(frozen=True, eq=False)
class AxisLayout:
    """Where the channels of an axis sit: for each unit (the channels that must grow together), its entries.

    Attributes:
        width: the number of units U.
        rows: producing edge -> its output channels ``[U, slots]``.
        columns: consuming edge -> its input channels ``[U, slots]``.
        entries: rider -> label tensor of the rider's entries, units numbered 0..U-1, NEUTRAL for others.
        labels: the units' labels.
        found: the run on labels that they were found in.
        reason: why the axis cannot grow, or None.
    """

    width: int
    rows: Mapping[str, Tensor]
    columns: Mapping[str, Tensor]
    entries: Mapping[Rider, Tensor]
    labels: Tensor
    found: Labelling
    reason: str | None

    @cached_property
    def members(self) -> Tensor:
        """Which labels are roots of the axis; the last entry is NEUTRAL's."""
        return self.found.classes.chosen(self.labels)


def group(found: Labelling, only: Tensor | None = None) -> list[AxisLayout]:
    """Groups the classes of labels, or ``only`` those of some labels, into axes, those first that are written first."""
    if not found.rows:
        return []
    written = torch.cat(list(found.rows.values())) if only is None else only
    roots = torch.unique(found.classes.roots(written))
    position = torch.full((len(found.classes) + 1,), NO_CHANNEL)  # of a root among them; the last is for NO_CHANNEL
    position[roots] = torch.arange(len(roots))
    tables = [
        (kind, key, position[found.classes.roots(labels)])
        for kind in ("rows", "columns", "entries")
        for key, labels in getattr(found, kind).items()
    ]
    tables = [(kind, key, table) for kind, key, table in tables if (table.numpy() != NO_CHANNEL).any()]
    axis = _alike(tables, found.classes.numbers(roots))
    unit = torch.cat([torch.arange(count) for count in torch.bincount(axis).tolist()])
    unit = torch.empty_like(unit).scatter_(0, torch.argsort(axis, stable=True), unit)
    places: list[dict[str, dict[Any, Tensor]]] = [
        {"rows": {}, "columns": {}, "entries": {}} for _ in range(int(axis.max()) + 1)
    ]
    widths, units = torch.bincount(axis).tolist(), unit.numpy()
    for kind, key, table in tables:
        for number, where in _parts(table.numpy(), axis.numpy()):
            if kind == "entries":
                found_there = np.where(where, units[table.numpy()], NO_CHANNEL)
            else:
                entries = np.flatnonzero(where)
                order = np.argsort(units[table.numpy()[entries]], kind="stable")
                found_there = entries[order].reshape(widths[number], -1)
            places[number][kind][key] = torch.from_numpy(found_there)
    layouts = [_layout(found, roots[axis == number], where) for number, where in enumerate(places)]
    return sorted(layouts, key=lambda layout: int(layout.labels[0]))


def _alike(tables: list[tuple[str, Any, Tensor]], start: Tensor) -> Tensor:
    """The number of each root's axis: roots that occur equally often in every table, and froze for the same cause.

    Tables are told apart by random weights of 62 bits: two different roots hardly have the same sum by chance.
    """
    draws = torch.randint(2**62, (len(tables) + 1,), generator=torch.Generator().manual_seed(0))
    weights = [weight.expand(table.numel()) for weight, (*_, table) in zip(draws, tables, strict=False)]
    sums = torch.zeros(len(start) + 1, dtype=torch.long)  # the last is for NEUTRAL
    sums[:-1] = start * draws[-1]
    sums.index_add_(0, torch.cat([table.flatten() for *_, table in tables]) % len(sums), torch.cat(weights))
    return torch.unique(sums[:-1], return_inverse=True)[1]


def _parts(table: np.ndarray, axis: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """The axes that occur in a table, and where."""
    held = np.where(table == NO_CHANNEL, NO_CHANNEL, axis[table])
    alike = held.size and (held == held.flat[0]).all()  # most tables are of one axis
    for number in [int(held.flat[0])] if alike else np.unique(held).tolist():
        if number != NO_CHANNEL:
            yield number, held == number


def _layout(found: Labelling, labels: Tensor, where: Mapping[str, Mapping[Any, Tensor]]) -> AxisLayout:
    reason = found.classes.cause(int(labels[0]))
    if reason is None and not where["columns"]:
        aside = found.classes.roots(torch.cat(found.aside)) if found.aside else labels[:0]
        spread = bool(torch.isin(labels, aside).any())
        reason = "is broadcast over the channels of another axis" if spread else None
    return AxisLayout(len(labels), where["rows"], where["columns"], where["entries"], labels, found, reason)
