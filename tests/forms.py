"""The forms in which second moments are kept: sums of products, or rows."""

from contextlib import AbstractContextManager
from unittest import mock

from hypothesis import strategies

MOST = strategies.sampled_from([0, 100])  #: rows that are kept


def by_rows(most: int) -> AbstractContextManager[object]:
    """A context in which rows of any feature are kept, up to a number of them; beyond it products are summed."""
    return mock.patch("dagrow.statistics._kept_rows.most_rows", return_value=most)
