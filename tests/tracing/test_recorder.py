"""A recorded graph: one node a call, and no value that is read behind its back."""

import re

import pytest
import torch
from forwards import made, mlp, same, targets
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from dagrow.errors import TraceError
from dagrow.tracing import record


@settings(max_examples=15, deadline=None)
@given(st.lists(st.sampled_from(["residual", "relu", "view", "cat", "scale"]), max_size=6), st.integers(1, 5))
def test_random_models_stay_live_in_the_batch(steps, n):
    def forward(self, x):
        for step in steps:
            if step == "residual":
                x = x + self.a(x)
            elif step == "relu":
                x = functional.relu(x, inplace=True)
            elif step == "view":
                x = x.view(x.shape[0] * 2, x.shape[1] // 2).reshape(x.shape)
            elif step == "cat":
                x = torch.cat([x[:, :2], x[:, 2:]], 1)
            else:
                x = self.scale * x
        return x

    model = made(forward, a=nn.Linear(4, 4), scale=nn.Parameter(torch.ones(4)))
    program = record(model, torch.randn(3, 4))
    x = torch.randn(n, 4)
    with torch.no_grad():
        same(program.run(x.clone()), model(x.clone()))


READS = {
    "item": lambda self, x: x * x.sum().item(),
    "bool": lambda self, x: x if x.sum() > 0 else -x,
    "float": lambda self, x: x * float(x.sum()),
    "tolist": lambda self, x: x * x.tolist()[0][0],
    "numpy": lambda self, x: x + torch.from_numpy(x.detach().numpy()),
    "all": lambda self, x: x * 2 if (x == 1).all() else x,
}


NOTE = r"reads a value of the example \(test_recorder\.py:\d+\)"


@pytest.mark.parametrize("name", ["bool", "all", "tolist"])
def test_reading_a_value_that_is_the_same_for_another_batch_is_noted(name):
    assert any(re.search(NOTE, note) for note in record(made(READS[name]), torch.rand(3, 4)).specialisations)


@pytest.mark.parametrize("name", ["item", "float", "numpy"])
def test_reading_a_value_that_differs_for_another_batch_is_refused(name):
    with pytest.raises(TraceError, match=NOTE):
        record(made(READS[name]), torch.rand(3, 4))


@pytest.mark.parametrize("name", READS)
def test_reading_a_value_that_is_not_there_is_refused_with_line_reason_and_way_out(name):
    with pytest.raises(TraceError, match=r"test_recorder\.py:\d+: .*values of the example.*torch\.where"):
        record(made(READS[name]), torch.ones(3, 4, device="meta"))


def test_sizes_that_depend_on_values_are_followed():
    model, x = made(lambda self, x: x[x > 0] * 2), torch.randn(3, 4)
    same(record(model, x).run(-x), model(-x))


def test_every_call_of_a_shared_module_is_a_node():
    layer = nn.Linear(4, 4)
    program = record(nn.Sequential(layer, nn.ReLU(), layer), torch.ones(2, 4))
    assert targets(program, "call_module") == ["0", "1", "0"]


def test_hooks_of_the_user_run_once_and_are_not_recorded_twice():
    model = mlp()
    model[0].register_forward_hook(lambda module, args, out: out * 2)
    model[0].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    model[2].register_full_backward_hook(lambda module, a, b: None)
    program = record(model, torch.randn(2, 4))
    assert targets(program, "call_module") == ["0", "1", "2"]
    assert targets(program, "call_function") == []
    x = torch.randn(3, 4)
    same(program.run(x), model(x))
    assert len(model[2]._backward_hooks) == 1
