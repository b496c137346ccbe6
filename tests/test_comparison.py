"""What counts as the same up to rounding."""

from typing import Any

import pytest
import torch
from torch import nn

from dagrow._comparison import alike, close, jittered, largest, rounding_between

X = torch.tensor([1.0, -1000.0, float("nan"), float("inf")])


def test_the_largest_magnitude_is_that_of_finite_entries() -> None:
    assert largest(X) == 1000
    assert largest(torch.tensor([True, False])) == 1
    assert largest(X[:0]) == largest(X[2:]) == 0


@pytest.mark.parametrize(
    ("actual", "same"),
    [
        (X + torch.tensor([0.05, 0.0, 0.0, 0.0]), True),  # the largest entry tells what rounding may do
        (X + torch.tensor([0.2, 0.0, 0.0, 0.0]), False),
        (X.nan_to_num(0.0), False),
        (X.double(), False),
        (X[:3], False),
        (X.tolist(), False),
        (None, False),
    ],
)
def test_tensors_are_close_up_to_what_their_type_tells_apart(actual: Any, same: bool) -> None:
    assert close(X, X.clone())
    assert close(X, actual) is same


def test_what_is_allowed_can_be_told() -> None:
    assert close(X, X + 0.5, allowed=0.5)
    assert not close(X, X + torch.tensor([1e-3, 0.0, 0.0, 0.0]), allowed=0.0)
    assert not close(torch.tensor([1, 2]), torch.tensor([1, 3]), allowed=5.0)
    assert alike(X, X + 1)
    assert not alike(X, X[:2])


def test_rounding_is_measured_with_weights_that_are_off_in_their_last_digit() -> None:
    layer, x = nn.Linear(8, 1, bias=False), torch.randn(1, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1e6, -1e6, 1, 1, 1, 1, 1, 1]]))
        x[0, 1] = x[0, 0]  # large terms cancel
        expected = layer(x)
        others = [torch.func.functional_call(layer, weights, (x,)) for weights in jittered(layer)]
        again = [torch.func.functional_call(layer, weights, (x,)) for weights in jittered(layer)]
    assert all(map(torch.equal, others, again))
    assert 1e-3 < rounding_between(expected, others) < 10
    assert rounding_between(expected, []) == rounding_between(3, others) == 0
