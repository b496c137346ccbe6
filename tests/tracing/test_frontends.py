"""What a program must keep: outputs, other batch sizes, and a model that is exactly as it was found."""

import random

import numpy as np
import pytest
import torch
from forwards import ZOO, A, made, mlp, same, targets
from torch import nn
from torch.nn import functional

from dagrow._model_state import preserve_state
from dagrow.errors import TraceError
from dagrow.tracing import Program, record, symbolic
from dagrow.tracing._verification import verify


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", ZOO)
def test_program_computes_what_the_model_computes(name, train):
    build, shape = ZOO[name]
    torch.manual_seed(0)
    model = build().train(train)
    program = record(model, torch.randn(3, *shape))
    assert all("val" in node.meta and "source" in node.meta for node in program.graph.nodes)
    for n in (2, 5):
        x = torch.randn(n, *shape)
        with preserve_state(model, weights=True):
            expected = model(x)
        with preserve_state(model, weights=True):
            found = program.run(x)
        assert type(found) is type(expected)
        if isinstance(found, torch.Tensor):
            same(found, expected)
    verify(program, torch.randn(7, *shape))


def state_of(model):
    """Everything that a trace must leave: bits, modes, hooks, attributes, gradients, random state."""
    return {
        "state": {k: v.clone() for k, v in model.state_dict().items()},
        "ids": [id(t) for t in [*model.parameters(), *model.buffers()]],
        "grads": [id(p.grad) for p in model.parameters()],
        "attributes": [sorted(vars(m)) for m in model.modules()],
        "modes": [m.training for m in model.modules()],
        "hooks": [[list(v.items()) for k, v in vars(m).items() if "hooks" in k] for m in model.modules()],
        "random": (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()),
        "grad mode": torch.is_grad_enabled(),
    }


def messy(self, x):
    self.calls += 1
    self.cache["last"] = x
    self.list.append(x)
    self.buffer_count += 1
    self.buffer_mean = self.buffer_mean * 0.9 + x.mean()
    self.note = x
    with torch.no_grad():
        self.weight.data.mul_(1.5)
        self.constant.add_(1)
    np.random.rand()
    random.random()
    if self.fails:
        raise ValueError("no")
    return self.bn(self.a(x)) * self.weight.sum() + torch.rand(1)


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_found(fails):
    model = made(
        messy,
        a=A(),
        bn=nn.BatchNorm1d(6),
        weight=nn.Parameter(torch.ones(6)),
        constant=torch.zeros(2),
        calls=0,
        buffer_count=torch.tensor(3),
        buffer_mean=torch.zeros(()),
        cache={},
        list=[],
        fails=fails,
    )
    model.a.register_forward_hook(lambda *_: None)
    model.a.eval()
    model(torch.randn(3, 4)).sum().backward() if not fails else None
    before, cache, listed, constant = (
        state_of(model),
        dict(model.cache),
        list(model.list),
        model.constant.clone(),
    )
    if fails:
        with pytest.raises(TraceError, match=r"ValueError on inputs float32\[3, 4\]: no") as caught:
            record(model, torch.randn(3, 4, generator=torch.Generator()))
        assert isinstance(caught.value.__cause__, ValueError)
    else:
        program = record(model, torch.randn(3, 4, generator=torch.Generator()))
        assert any("assigns buffer buffer_mean" in note for note in program.specialisations)
    after = state_of(model)
    same(after.pop("state"), before.pop("state"))
    assert after == before
    assert (model.cache, model.list) == (cache, listed)
    same(model.constant, constant)


def test_batch_norm_buffers_are_left_alone():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
    record(model, torch.randn(3, 4))
    assert model[1].num_batches_tracked == 0
    same(model[1].running_mean, torch.zeros(6))


def test_a_loss_still_alive_can_be_differentiated_after_tracing():
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    loss = model(torch.randn(3, 4)).sum()
    record(model, torch.randn(3, 4))
    loss.backward()


def test_lazy_parameters_are_refused():
    for front_end in (symbolic, lambda model: record(model, torch.ones(2, 3))):
        with pytest.raises(TraceError, match="no shape yet"):
            front_end(nn.Sequential(nn.LazyLinear(3)))


def test_symbolic_agrees_with_recording():
    model = mlp()
    a, b = symbolic(model), record(model, torch.randn(3, 4))
    assert [(n.op, n.target) for n in a.graph.nodes] == [(n.op, n.target) for n in b.graph.nodes]
    assert [n.meta["val"].shape[1:] for n in a.graph.nodes] == [n.meta["val"].shape[1:] for n in b.graph.nodes]
    x = torch.randn(5, 4)
    same(a.run(x), model(x))
    assert isinstance(a, Program)


def test_symbolic_with_constants_defaults_and_containers():
    def forward(self, x, mask=None):
        h = self.a(functional.relu(x.flatten(1)))
        return [h + self.constant + torch.ones(6), {"h": h if mask is None else h * mask}]

    model = made(forward, a=A(), constant=torch.full((6,), 2.0))
    before = sorted(vars(model))
    program = symbolic(model)
    assert sorted(vars(model)) == before
    assert targets(program, "placeholder") == ["x"]
    assert all(name.startswith("_constant") for name in program.constants)
    found = program.run(torch.zeros(3, 4))
    assert type(found) is list
    assert type(found[1]) is dict
    same(found[0], model(torch.zeros(3, 4))[0])


OPEN = {
    "conv": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()),
    "two inputs": lambda: made(lambda self, x, y: self.a(x) + y, a=A()),
    "norm first": lambda: nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)),
    "no weights": lambda: made(lambda self, x: x * 2),
    "control flow": lambda: made(lambda self, x: x if x.sum() > 0 else -x),
    "two widths": lambda: made(lambda self, x: (self.a(x), self.b(x)), a=nn.Linear(4, 2), b=nn.Linear(3, 2)),
}


@pytest.mark.parametrize("name", OPEN)
def test_symbolic_asks_for_inputs_where_it_cannot_know(name):
    with pytest.raises(TraceError, match=r"Give example inputs, dagrow\.trace\(model, example_inputs\)"):
        symbolic(OPEN[name]())
