"""Tables tell from which positions each position is computed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from dagrow.layers import tables_of

X = torch.rand(2, 3, 11, generator=torch.Generator().manual_seed(0))


def windows(x: Tensor, table: Tensor, outside: float) -> Tensor:
    """The entries that each position is computed from ``[n, c, out, taps]``."""
    entries = x[..., table.clamp_min(0).flatten()].unflatten(-1, table.shape)
    return entries.masked_fill(table < 0, outside)


def largest(x: Tensor, table: Tensor) -> Tensor:
    return windows(x, table, -torch.inf).amax(-1)


def mean(x: Tensor, table: Tensor) -> Tensor:
    return windows(x, table, 0.0).sum(-1) / (table >= 0).sum(-1)


def copy(x: Tensor, table: Tensor) -> Tensor:
    return windows(x, table, 0.0).sum(-1)


@pytest.mark.parametrize(
    ("name", "settings", "computed"),
    [
        ("max_pool1d", {"kernel_size": 3}, largest),
        ("max_pool1d", {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 2}, largest),
        ("max_pool1d", {"kernel_size": 4, "stride": 3, "padding": 2, "ceil_mode": True}, largest),
        ("max_pool1d", {"kernel_size": 1, "stride": 4, "ceil_mode": True}, largest),
        ("avg_pool1d", {"kernel_size": 2, "ceil_mode": True}, mean),
        ("adaptive_avg_pool1d", {"output_size": 4}, mean),
        ("adaptive_max_pool1d", {"output_size": 3}, largest),
        ("interpolate", {"size": 7}, copy),
        ("interpolate", {"scale_factor": 2}, copy),
        ("pad", {"pad": (2, 1)}, copy),
        ("pad", {"pad": (2, 3), "mode": "reflect"}, copy),
        ("pad", {"pad": (1, 2), "mode": "circular"}, copy),
    ],
)
def test_a_function_computes_from_what_its_table_tells(
    name: str, settings: dict[str, Any], computed: Callable[[Tensor, Tensor], Tensor]
) -> None:
    tables = tables_of(name, None, (X,), settings)
    assert tables is not None
    (table,) = tables(X.shape)
    torch.testing.assert_close(computed(X, table), getattr(functional, name)(X, **settings))


@pytest.mark.parametrize(
    ("module", "computed"),
    [
        (nn.MaxPool1d(3, 2), largest),
        (nn.AdaptiveAvgPool1d(5), mean),
        (nn.Upsample(scale_factor=2), copy),
        (nn.ReplicationPad1d((1, 3)), copy),
    ],
)
def test_a_module_has_the_table_of_its_function(module: Any, computed: Callable[[Tensor, Tensor], Tensor]) -> None:
    tables = tables_of(None, module)
    assert tables is not None
    (table,) = tables(X.shape)
    torch.testing.assert_close(computed(X, table), module(X))


def test_each_dimension_of_space_has_its_own_table() -> None:
    tables = tables_of("max_pool2d", None, (None, (2, 3)))
    assert [tuple(table.shape) for table in tables((5, 7, 8, 9))] == [(4, 2), (3, 3)]


def test_what_is_no_operation_on_space_has_no_tables() -> None:
    assert tables_of("relu", None, (X,)) is None
    assert tables_of("max_pool1d", None, (X, torch.tensor(2))) is None
    assert tables_of(None, nn.Linear(3, 3)) is None


def test_a_pool_that_tells_its_indices_has_the_tables_of_one_that_does_not() -> None:
    calls = [("max_pool1d", {}), ("max_pool1d_with_indices", {"return_indices": True})]
    (table,), (other,) = (tables_of(name, None, (X, 2), kwargs)(X.shape) for name, kwargs in calls)  # type: ignore[misc]
    assert torch.equal(table, other)
