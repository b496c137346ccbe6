"""How users give inputs."""

import pytest
import torch
from forwards import mlp

from dagrow.errors import TraceError
from dagrow.tracing import bind, record


@pytest.mark.parametrize("given_", [3, "x", None, {1: torch.ones(1)}])
def test_bind_refuses_what_is_not_inputs(given_):
    with pytest.raises(TraceError, match="Give a tensor, a tuple"):
        bind(given_)


def test_bind():
    x = torch.ones(1)
    assert bind(x) == ((x,), {})
    assert bind([x, 1]) == ((x, 1), {})
    assert bind({"x": x}) == ((), {"x": x})


def test_inputs_that_do_not_fit_the_signature():
    with pytest.raises(TraceError, match=r"cannot be called with these inputs .*float32\[2, 4\]"):
        record(mlp(), (torch.ones(2, 4), torch.ones(2)))
