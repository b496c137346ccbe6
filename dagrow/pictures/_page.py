"""A history as one interactive HTML page, which needs nothing from anywhere else."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.resources import files
from math import isfinite
from pathlib import Path

from dagrow.pictures._figures import check_place, write_bytes
from dagrow.pictures._graph_layout import graph_layout
from dagrow.pictures._records import Record, Snapshot

PLACE = "/*DATA*/"  #: where the page takes its data


def write_page(
    records: Sequence[Record],
    growths: Sequence[Mapping[str, object]],
    snapshots: Sequence[Snapshot],
    over: str | None,
    path: Path,
) -> None:
    """The dag at any step, with losses, widths, bottleneck, parameters and growths.

    Args:
        records: oldest first.
        growths: the row of each in the table, oldest first.
        snapshots: of the dag, oldest first, at least one.
        over: why growing has ended, or None.
        path: of the page.

    Raises:
        FigureError: the file cannot be written.
    """
    check_place(path)
    data = {
        "steps": [asdict(record) for record in records],
        "growths": growths,
        "over": over,
        "first": snapshots[0].widths,
        **asdict(graph_layout(snapshots)),
    }
    text = json.dumps(_plain(data)).replace("</", "<\\/")  # names may not end the script
    page = files("dagrow.pictures").joinpath("page.html").read_text(encoding="utf-8")
    write_bytes(page.replace(PLACE, text).encode(), path)


def _plain(value: object) -> object:
    """JSON has no numbers that are not finite."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not isfinite(value) else value
