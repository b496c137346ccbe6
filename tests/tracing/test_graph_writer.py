"""Arguments, constants, outputs and regions of autocast, as nodes."""

import pytest
import torch
from forwards import ZOO, A, Answer, Pair, made, nested, same, targets
from torch import nn

from dagrow.errors import TraceError
from dagrow.tracing import record


def test_nested_output_comes_back_as_the_same_structure():
    model = made(nested, a=A())
    x = torch.randn(3, 4)
    found = record(model, torch.randn(2, 4)).run(x)
    assert isinstance(found["pair"], Pair)
    assert isinstance(found["answer"], Answer)
    assert found["n"] == 3
    assert type(found["pair"].second) is list
    same(found["answer"].extra["k"][0], model.a(x))


def test_two_inputs_keywords_and_nested_inputs():
    model = made(lambda self, x, mask=None, *, pair: self.a(x) * mask + pair["p"][0], a=A())
    x, mask, pair = torch.randn(3, 4), torch.ones(3, 6), {"p": (torch.randn(3, 6), 1)}
    program = record(model, {"x": x, "mask": mask, "pair": pair})
    assert targets(program, "placeholder") == ["x", "mask", "pair"]
    same(program.run(x, mask=mask, pair=pair), model(x, mask, pair=pair))
    assert any("pair['p'][1] = 1" in note for note in program.specialisations)
    with pytest.raises(TraceError, match="other values of"):
        program.run(x, pair=pair)
    with pytest.raises(TraceError, match="other values of"):
        program.run(x, mask, pair={"p": (pair["p"][0], 2)})


def test_one_tensor_given_twice_is_two_inputs():
    model = made(lambda self, x, y: x - 2 * y)
    x = torch.randn(3, 2)
    same(record(model, (x, x)).run(x, x + 1), x - 2 * (x + 1))


def test_starred_arguments():
    model = made(lambda self, *xs, **named: xs[0] + xs[1] * named["z"])
    x, z = torch.randn(3, 2), torch.randn(2)
    recorder_inputs = (x, x)
    with pytest.raises(TraceError, match="KeyError"):
        record(model, recorder_inputs)
    program = record(made(lambda self, *xs: xs[0] + 2 * xs[1]), (x, z))
    assert targets(program, "placeholder") == ["*xs"]
    same(program.run(x, z + 1), x + 2 * (z + 1))


def test_parameters_buffers_and_constants_used_directly():
    model = ZOO["directly"][0]()
    model.alias = model.weight
    program = record(model, torch.randn(2, 4))
    assert targets(program, "get_attr") == ["weight", "buffer", "_constant0", "a.weight"]
    assert program.constants["_constant0"] is model.constant
    with torch.no_grad():
        model.weight.add_(1.0)
    x = torch.randn(3, 4)
    same(program.run(x), model(x))


def test_a_custom_autograd_function_is_noted():
    class Flip(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, g):
            return -g

    program = record(made(lambda self, x: Flip.apply(self.a(x)) + 1, a=A()), torch.randn(2, 4))
    assert any("forward of Flip" in note for note in program.specialisations)


def test_regions_of_autocast_are_kept():
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            h = self.a(x)
            with torch.autocast("cpu", enabled=False):
                h = torch.tanh(h.float() @ self.a.weight)
            h = self.a(h)
        return self.b(h.float())

    model, x = made(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 2)), torch.randn(3, 4)
    program = record(model, x)
    same(program.run(x), model(x))
    assert not torch.is_autocast_enabled("cpu")
    assert "autocast" in program.obstacle


def test_a_cache_that_was_filled_before_is_a_constant():
    class Caching(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.cache = nn.Parameter(torch.randn(4)), {}

        def forward(self, x):
            if "table" not in self.cache:
                self.cache["table"] = self.table * 2
            return x + self.cache["table"]

    model, x = Caching(), torch.randn(3, 4)
    expected = model(x)
    cached = model.cache["table"]
    assert torch.equal(record(model, x).run(x), expected)
    assert model.cache["table"] is cached
