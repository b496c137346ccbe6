"""TODO reporting."""

from dagrow.reporting._cli import main

__all__ = [
    "main",
]
