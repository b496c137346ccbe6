"""Tables as plain text."""

from html import escape

from rich.console import Console
from rich.table import Table


def render(*tables: Table, width: int = 130) -> str:
    """Draws tables without colours.

    Args:
        tables: one below the other.
        width: the most columns of text.

    Returns:
        The text.
    """
    console = Console(width=width, color_system=None, markup=False, emoji=False)  # names may hold brackets and colons
    with console.capture() as capture:
        for table in tables:
            console.print(table)
    return capture.get().rstrip()


class Printable:
    """What prints as a table shows the same in a notebook."""

    def _repr_html_(self) -> str:
        style = "line-height: 1.2; white-space: pre; font-family: monospace"
        return f'<pre style="{style}">{escape(str(self))}</pre>'
