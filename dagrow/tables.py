"""Edges and axes as tables of plain text."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from dagrow.edges import Axis, Edge

__all__ = ["render", "tables"]


def render(*tables: Table, width: int = 130) -> str:
    """Rich tables as plain text."""
    console = Console(width=width, color_system=None, markup=False, emoji=False)  # names may hold brackets and colons
    with console.capture() as capture:
        for table in tables:
            console.print(table)
    return capture.get().rstrip()


def tables(title: str, edges: Sequence[Edge], axes: Sequence[Axis]) -> tuple[Table, Table]:
    """A table of edges and a table of axes."""
    first = Table("edge", "layer", "reads -> writes", "grows", "why not", title=title, title_justify="left")
    for edge in edges:
        i, o = edge.rule.widths(edge.module)
        first.add_row(
            edge.name, type(edge.module).__name__, f"{i} -> {o}", "yes" if edge.growable else "no", edge.reason or ""
        )
    second = Table("axis", "width", "written by", "read by", "riders", "grows", "why not")
    for axis in axes:
        second.add_row(
            axis.name, str(axis.width), _names(axis.producers), _names(axis.consumers), _names(axis.riders),
            "yes" if axis.growable else "no", axis.reason or "",
        )  # fmt: skip
    return first, second


def _names(items: Sequence[Any]) -> str:
    return ", ".join(item.name for item in items)
