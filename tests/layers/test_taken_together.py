"""Operations that take entries together do so along the dimensions that they say, and no others."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from dagrow.layers import taken_dims

X = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0))
CALLS: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = [
    (torch.sort, (), {}),
    (torch.sort, (1,), {}),
    (torch.argsort, (), {"dim": 1, "descending": True}),
    (torch.msort, (), {}),
    (torch.topk, (2, 0), {}),
    (torch.kthvalue, (2,), {}),
    (torch.mode, (1,), {"keepdim": True}),
    (torch.cummax, (1,), {}),
    (torch.diff, (2, 1), {}),
    (torch.fft.rfft, (), {"dim": 1}),
    (torch.fft.ifft2, (), {}),
    (torch.fft.fftn, (), {}),
    (torch.fft.fftshift, (1,), {}),
    (torch.repeat_interleave, (torch.tensor([1, 0, 2, 1]), 1), {}),
]


@pytest.mark.parametrize(("function", "args", "kwargs"), CALLS)
def test_entries_meet_along_these_dimensions_only(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    node = fx.Graph().call_function(function)
    dims = taken_dims(node, None, (X, *args), kwargs)
    assert dims is not None
    for dim in set(range(3)) - set(dims):
        whole = first(function(X, *args, **kwargs)).movedim(dim, 0)
        parts = [first(function(X.narrow(dim, at, 1), *args, **kwargs)) for at in range(X.shape[dim])]
        torch.testing.assert_close(whole, torch.cat([part.movedim(dim, 0) for part in parts]))


def test_unpooling_and_what_takes_nothing_together() -> None:
    call = fx.Graph().call_module("pool")
    assert taken_dims(call, nn.MaxUnpool2d(2), (X[None], X[None]), {}) == (2, 3)
    assert taken_dims(call, nn.Softmax(1), (X,), {}) is None
    assert taken_dims(fx.Graph().call_function(torch.relu), None, (X,), {}) is None


def first(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]
