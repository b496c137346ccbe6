"""Short runs of the demo."""

import pytest
from demo_runs import TINY

from dagrow.reporting._data import Dataset, digits
from dagrow.reporting._demo import Run, run


@pytest.fixture(scope="session")
def data() -> Dataset:
    return digits(0)


@pytest.fixture(scope="session")
def runs(data) -> list[Run]:
    return [run(data, TINY, seed) for seed in (0, 1)]
