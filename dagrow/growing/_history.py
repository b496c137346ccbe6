"""What happened while a model grew: plain records."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from rich.table import Table

from dagrow._text import Printable, render
from dagrow.errors import FigureError, HistoryError
from dagrow.pictures import Record, Snapshot, draw_graph, draw_plot, write_page


@dataclass(frozen=True)
class History(Printable, Sequence[Record]):
    """Records, oldest first; prints as a table of those in which something grew.

    Attributes:
        steps: the records.
        snapshots: the dag as it was at first, and after every step that changed it.
        over: why growing has ended, or None.
    """

    steps: tuple[Record, ...] = ()
    snapshots: tuple[Snapshot, ...] = field(default=(), repr=False)
    over: str | None = None

    def __getitem__(self, index: Any) -> Any:
        return self.steps[index]

    def __len__(self) -> int:
        return len(self.steps)

    def records(self) -> list[dict[str, Any]]:
        """What happened step by step.

        Returns:
            A flat dictionary per step, ready for JSON: what grew is counted, widths are ``width of <axis>``.
        """
        return [_flat(record) for record in self.steps]

    def growths(self) -> list[dict[str, Any]]:
        """What grew.

        Returns:
            A flat dictionary per growth, with its epoch, ready for JSON.
        """
        return [{"epoch": record.epoch, **asdict(grown)} for record in self.steps for grown in record.grown]

    def to_pandas(self, of: str = "records") -> Any:
        """The same for pandas.

        Args:
            of: ``"records"``, a row per step, or ``"growths"``, a row per growth.

        Returns:
            A ``pandas.DataFrame``.

        Raises:
            HistoryError: pandas is not installed, or ``of`` is neither of the two.
        """
        tables = {"records": self.records, "growths": self.growths}
        if of not in tables:
            raise HistoryError(f"to_pandas(of={of!r}): give one of {', '.join(map(repr, tables))}.")
        try:
            import pandas as pd
        except ImportError as error:
            raise HistoryError(f'to_pandas needs pandas ({error}): pip install "dagrow[history]"') from error
        return pd.DataFrame.from_records(tables[of]())

    def plot(self, path: str | Path) -> None:
        """Draws losses, widths and bottleneck over epochs.

        Args:
            path: of the figure; its ending is its format.

        Raises:
            FigureError: matplotlib is not installed, or the file cannot be written.
            HistoryError: the history is of no dag.
        """
        file = self._file(path)
        draw_plot(self.steps, self.snapshots[0].widths, file)

    def graph(self, path: str | Path) -> None:
        """Draws the dag, and when its units and layers were added.

        Args:
            path: of the figure; its ending is its format.

        Raises:
            FigureError: matplotlib is not installed, or the file cannot be written.
            HistoryError: the history is of no dag.
        """
        draw_graph(self.snapshots, self._file(path))

    def html(self, path: str | Path) -> None:
        """Writes an interactive page: the dag at any step, and all of the above. It loads nothing from anywhere.

        Args:
            path: of the page.

        Raises:
            FigureError: the file cannot be written.
            HistoryError: the history is of no dag.
        """
        write_page(self.steps, self.growths(), self.snapshots, self.over, self._file(path))

    def _file(self, path: str | Path) -> Path:
        """Where a picture goes, if there is anything to draw."""
        if not self.snapshots:
            raise HistoryError("this history holds no dag that could be drawn; take that of dagrow.fit or of a Grower.")
        if not isinstance(path, (str, PathLike)):
            raise FigureError(f"figure {path!r}: give the name of a file.")
        return Path(path)

    def __str__(self) -> str:
        table = Table("epoch", "train loss", "validation loss", "bottleneck", "grew", "parameters", "FLOPs")
        for r in self.steps:
            if r.grown:
                grew = ", ".join(f"{grown.where} {grown.neurons:+}" for grown in r.grown)
                share = "" if r.share is None else f"{r.share:.1%}"
                validation = "" if r.validation_loss is None else f"{r.validation_loss:.4g}"
                table.add_row(
                    str(r.epoch), f"{r.train_loss:.4g}", validation, share, grew, f"{r.parameters:,}", f"{r.flops:,}"
                )
        ending = f"Growing ended: {self.over}." if self.over else "Growing has not ended."
        left_out = dict.fromkeys(note for record in self.steps for note in record.left_out)
        lines = [render(table), *(f"Left out: {note}" for note in left_out), ending]
        return "\n".join(lines) if self.steps else "no step yet"


def _flat(record: Record) -> dict[str, Any]:
    values = asdict(record) | {"grown": len(record.grown), "neurons_added": sum(g.neurons for g in record.grown)}
    values["left_out"] = "; ".join(record.left_out)
    widths = values.pop("widths")
    return values | {f"width of {axis}": width for axis, width in widths.items()}
