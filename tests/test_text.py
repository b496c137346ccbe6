"""Tables as plain text."""

from rich.table import Table

from dagrow._text import render


def table(*cells: str) -> Table:
    drawn = Table("name")
    for cell in cells:
        drawn.add_row(cell)
    return drawn


def test_names_are_printed_as_they_are() -> None:
    for name in ("blocks[0].linear", "[bold]head[/bold]", ":smile:"):
        assert name in render(table(name))
    assert "\x1b" not in render(table("name"))


def test_tables_stand_one_below_the_other_and_keep_to_the_width() -> None:
    lines = render(table("first" * 20), table("second"), width=40).splitlines()
    assert max(map(len, lines)) <= 40
    assert sum("name" in line for line in lines) == 2
    assert lines[-1].strip()
