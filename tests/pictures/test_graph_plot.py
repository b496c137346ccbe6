"""The dag as it grew."""

from pathlib import Path

import pytest
from histories import check_drawn, grown_history

from dagrow import History

history = pytest.fixture(scope="module")(grown_history)


def test_it_is_drawn_and_looks_like_something(history: History, tmp_path: Path) -> None:
    check_drawn(history.graph, tmp_path)
