"""Matplotlib figures in files, and what to say where there can be none."""

import io
from pathlib import Path
from typing import Any

from dagrow.errors import FigureError

TRAIN, VALIDATION, SHARE, BEGINNING, BAND = "#3d5a80", "#d1495b", "#0b6e4f", "#b8bec7", "#dfe4ea"  #: colours


def check_figure(path: Path) -> None:
    """Finds out early whether a figure can be written.

    Args:
        path: of the figure; its ending is its format.

    Raises:
        FigureError: it cannot.
    """
    formats = _backend()[1]
    if path.suffix.lstrip(".").lower() not in formats:
        raise FigureError(f"figure {path}: the name must end in one of {', '.join(f'.{k}' for k in sorted(formats))}.")
    check_place(path)


def check_place(path: Path) -> None:
    """Finds out early whether a file can be put somewhere.

    Args:
        path: of the file.

    Raises:
        FigureError: it cannot.
    """
    if path.is_dir():
        raise FigureError(f"figure {path} is a folder; give a file.")
    if not path.parent.is_dir():
        raise FigureError(f"figure {path}: there is no folder {path.parent} to write it to.")


def _backend() -> tuple[Any, dict[str, str]]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise FigureError(
            f'the figure needs matplotlib ({error}): pip install "dagrow[history]", or, for the demo, '
            'pip install "dagrow[demo]"'
        ) from error
    return Figure, FigureCanvasAgg.get_supported_filetypes()


def empty_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure.

    Args:
        width: in inches.
        height: in inches.

    Returns:
        A ``matplotlib.figure.Figure``.

    Raises:
        FigureError: matplotlib is not installed.
    """
    return _backend()[0](figsize=(width, height), layout="constrained")


def tidy(axes: Any) -> None:
    """Makes axes over epochs look like all others.

    Args:
        axes: of matplotlib.
    """
    axes.set_xlabel("epoch")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def write(drawing: Any, path: Path) -> None:
    """Writes a figure to a file.

    Args:
        drawing: a matplotlib figure.
        path: of the file; its ending is its format.

    Raises:
        FigureError: it cannot be written.
    """
    write_bytes(rendered(drawing, path.suffix.lstrip(".").lower()), path)


def rendered(drawing: Any, kind: str) -> bytes:
    """A figure as the content of a file.

    Args:
        drawing: a matplotlib figure.
        kind: "png", "svg" or another of matplotlib's formats.

    Returns:
        What would be in the file.
    """
    content = io.BytesIO()
    drawing.savefig(content, format=kind, dpi=130)
    return content.getvalue()


def write_bytes(content: bytes, path: Path) -> None:
    """Writes a file.

    Args:
        content: of the file.
        path: of the file.

    Raises:
        FigureError: it cannot be written.
    """
    try:
        path.write_bytes(content)
    except OSError as error:
        raise FigureError(f"figure {path} cannot be written: {error.strerror or error}.") from error


def colormap(name: str) -> Any:
    from matplotlib import colormaps

    return colormaps[name]


def short_name(name: str, length: int = 22) -> str:
    """The end tells names of modules apart."""
    return name if len(name) <= length else f"…{name[1 - length :]}"
