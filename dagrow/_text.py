"""Tables as plain text."""

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
