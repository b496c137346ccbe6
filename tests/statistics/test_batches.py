"""What messages and callers can tell of batches, and of exceptions that came with them."""

import einops
import pytest
import torch

import dagrow
from dagrow.statistics import is_of_own_class


class StopSearchError(Exception):
    """Of the user's own, to leave a loop."""


@pytest.mark.parametrize(
    ("error", "own"),
    [
        (StopSearchError(), True),
        (RuntimeError(), False),
        (torch.OutOfMemoryError(), False),
        (einops.EinopsError(), False),
        (dagrow.BatchError("of ours"), False),  # wherever the package lies
    ],
    ids=lambda case: type(case).__name__,
)
def test_classes_of_exceptions_that_are_the_users(error: Exception, own: bool) -> None:
    assert is_of_own_class(error) is own
