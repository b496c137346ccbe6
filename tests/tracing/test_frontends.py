"""What a program must keep: outputs, other batch sizes, and a model that is exactly as it was found."""

import collections
import copy
import dataclasses
import functools
import random
import re

import einops
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from dagrow._model_state import preserve_state
from dagrow.errors import TraceError
from dagrow.tracing import Program, bind, record, symbolic
from dagrow.tracing._leaf_modules import is_leaf
from dagrow.tracing._verification import verify

Pair = collections.namedtuple("Pair", ["first", "second"])


@dataclasses.dataclass
class Answer:
    logits: torch.Tensor
    extra: dict


def made(function, **parts):
    """A module class with `function` as its forward, so that the signature is the function's own."""
    model = type("Made", (nn.Module,), {"forward": function})()
    for name, part in parts.items():
        if isinstance(part, torch.Tensor) and not isinstance(part, nn.Parameter) and name.startswith("buffer"):
            model.register_buffer(name, part)
        else:
            setattr(model, name, part)
    return model


def mlp():
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


def targets(program, op):
    return [node.target for node in program.graph.nodes if node.op == op]


def same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def live_sizes(self, x):
    n, w = x.shape
    h = self.a(x).view(n * 2, -1).reshape(x.size(0), 6)
    return h[: n - 1 + 1] * (x.numel() // w // n) + torch.arange(n % (n + 1)).unsqueeze(1)


def nested(self, x):
    h = self.a(x)
    return {"pair": Pair(h, [h + 1, 2]), "answer": Answer(h * 2, {"k": (h, None)}), "n": x.shape[0]}


def in_place(self, x):
    h = self.a(x)
    functional.relu(h, inplace=True)
    h[:, 0] = h[:, 1] * 2
    h += 1
    return h


def directly(self, x):
    return x @ self.weight.t() + self.buffer + self.constant + self.a.weight.sum()


def residual(self, x):
    return torch.cat([x + self.d(self.b(self.a(x).relu())), x], dim=-1)


def whole_numbers(self, x):
    for _ in range(self.depth):
        x = self.a(x) if x.dim() == 2 and self.depth else x
    return 1 - x / 2


A = functools.partial(nn.Linear, 4, 6)
ZOO = {
    "mlp": (mlp, (4,)),
    "root leaf": (A, (4,)),
    "residual": (lambda: made(residual, a=A(), b=nn.Linear(6, 4), d=nn.Dropout()), (4,)),
    "literals": (lambda: made(lambda self, x: self.a(x).view(-1, 2, 3).flatten(1), a=A()), (4,)),
    "live sizes": (lambda: made(live_sizes, a=A()), (4,)),
    "nested": (lambda: made(nested, a=A()), (4,)),
    "in place": (lambda: made(in_place, a=A()), (4,)),
    "dropout": (lambda: made(lambda self, x: functional.dropout(x, 0.5, self.training) + x), (4,)),
    "directly": (
        lambda: made(
            directly,
            a=A(),
            weight=nn.Parameter(torch.randn(6, 4)),
            buffer=torch.ones(6),
            constant=torch.ones(6),
        ),
        (4,),
    ),
    "control flow": (lambda: made(whole_numbers, a=nn.Linear(4, 4), depth=3), (4,)),
    "conv": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(True), nn.Flatten()),
        (3, 5, 5),
    ),
    "encoder": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (5, 8)),
    "lstm": (lambda: nn.LSTM(4, 3, batch_first=True), (5, 4)),
}


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


READS = {
    "item": lambda self, x: x * x.sum().item(),
    "bool": lambda self, x: x if x.sum() > 0 else -x,
    "float": lambda self, x: x * float(x.sum()),
    "tolist": lambda self, x: x * x.tolist()[0][0],
    "numpy": lambda self, x: x + torch.from_numpy(x.detach().numpy()),
    "all": lambda self, x: x * 2 if (x == 1).all() else x,
}


NOTE = r"reads a value of the example \(test_frontends\.py:\d+\)"


@pytest.mark.parametrize("name", ["bool", "all", "tolist"])
def test_reading_a_value_that_is_the_same_for_another_batch_is_noted(name):
    assert any(re.search(NOTE, note) for note in record(made(READS[name]), torch.rand(3, 4)).specialisations)


@pytest.mark.parametrize("name", ["item", "float", "numpy"])
def test_reading_a_value_that_differs_for_another_batch_is_refused(name):
    with pytest.raises(TraceError, match=NOTE):
        record(made(READS[name]), torch.rand(3, 4))


@pytest.mark.parametrize("name", READS)
def test_reading_a_value_that_is_not_there_is_refused_with_line_reason_and_way_out(name):
    with pytest.raises(TraceError, match=r"test_frontends\.py:\d+: .*values of the example.*torch\.where"):
        record(made(READS[name]), torch.ones(3, 4, device="meta"))


def test_sizes_that_depend_on_values_are_followed():
    model, x = made(lambda self, x: x[x > 0] * 2), torch.randn(3, 4)
    same(record(model, x).run(-x), model(-x))


def test_guards_and_baked_sizes_are_noted():
    def forward(self, x):
        half = int(x.shape[1]) // 2
        if x.shape[0] * 2 > 3 and x.size(1) == 4:
            x = x / x.shape[1]
        return x[:, :half] * len(x.shape)

    program = record(made(forward), torch.randn(3, 4))
    notes = "\n".join(program.specialisations)
    assert "(x.shape[0] * 2) > 3 is True (test_frontends.py:" in notes
    assert "x.size(1) == 4 is True" in notes
    assert "x.shape[1] = 4 is baked in" in notes


def test_a_baked_batch_size_is_found_by_the_second_batch():
    with pytest.raises(TraceError, match=r"a batch of 2[\s\S]*__len__ bakes"):
        record(made(lambda self, x: x.view(len(x), 2, 2)), torch.randn(3, 4))
    with pytest.raises(TraceError, match="differs from the model at output"):
        record(made(lambda self, x: x / float(x.shape[0])), torch.randn(3, 4))


def test_a_model_that_refuses_another_batch_is_noted():
    program = record(made(lambda self, x: x.view(3, 4) + 1), torch.randn(3, 4))
    assert any("refuses a batch of 4" in note for note in program.specialisations)
    assert any("verified at one batch size only" in note for note in program.specialisations)


def test_a_forward_that_treats_a_batch_of_one_apart_is_noted():
    program = record(made(lambda self, x: x + 1 if x.shape[0] == 1 else x), torch.randn(2, 4))
    assert any("does not hold for a batch of 1" in note for note in program.specialisations)


def test_meta_inputs_are_recorded_but_not_verified():
    program = record(mlp(), torch.ones(2, 4, device="meta"))
    assert any("not verified" in note for note in program.specialisations)
    assert program.run(torch.ones(5, 4)).shape == (5, 3)


def test_leaf_rule():
    class Same(nn.Linear):
        def extra(self):
            return 1

    class Other(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    patched = nn.Linear(1, 1)
    patched.forward = lambda x: x
    assert all(map(is_leaf, [Same(1, 1), nn.LSTM(1, 1), nn.Identity()]))
    assert not any(map(is_leaf, [Other(1, 1), patched, mlp(), nn.ModuleList()]))
    assert not any(map(is_leaf, [nn.TransformerEncoderLayer(2, 1), nn.MultiheadAttention(2, 1)]))


def test_every_call_of_a_shared_module_is_a_node():
    layer = nn.Linear(4, 4)
    program = record(nn.Sequential(layer, nn.ReLU(), layer), torch.ones(2, 4))
    assert targets(program, "call_module") == ["0", "1", "0"]


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


def test_operators_have_one_spelling():
    program = record(made(lambda self, x: (1 - x) * 2 + x.add(x) / x), torch.randn(2, 4))
    found = [target.__name__ for target in targets(program, "call_function")]  # 1 - x is Tensor.rsub or operator.sub
    assert found == ["sub", "mul", "add", "truediv", "add"]


def test_grad_mode_of_the_forward_is_kept():
    def forward(self, x):
        with torch.no_grad():
            h = self.a(x)
        return self.b(h)

    model = made(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 2))
    program = record(model, torch.randn(2, 4))
    program.run(torch.randn(2, 4)).sum().backward()
    assert model.a.weight.grad is None
    assert model.b.weight.grad is not None
    with torch.no_grad():
        assert not program.run(torch.randn(2, 4)).requires_grad
    assert torch.is_grad_enabled()


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


def test_a_cache_keyed_by_size_keeps_sizes_live():
    @functools.lru_cache
    def twice(n):
        return n * 2

    model = made(lambda self, x: x.view(twice(x.shape[0]), -1))
    twice(3)
    assert record(model, torch.randn(3, 4)).run(torch.randn(5, 4)).shape == (10, 2)
    assert type(twice(3)) is int


def test_einops_sizes_stay_live_behind_its_caches():
    model = made(lambda self, x: einops.rearrange(x, "b (h d) -> (b h) d", h=2))
    model(torch.zeros(3, 4))
    assert record(model, torch.zeros(3, 4)).run(torch.zeros(5, 4)).shape == (10, 2)


def test_shapes_are_still_shapes_and_loops_over_them_are_noted():
    def forward(self, x):
        assert type(x.shape) is torch.Size
        return sum(x[:, t] for t in range(x.shape[1]))

    program = record(made(forward), torch.zeros(3, 4))
    assert any("x.shape is read next to range()" in note for note in program.specialisations)


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


def test_scripted_and_compiled_parts_are_opaque():
    part = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    for closed in (torch.jit.script(part), torch.compile(part)):
        model, x = (
            made(lambda self, x: self.b(self.part(self.a(x))), a=nn.Linear(4, 4), part=closed, b=nn.Linear(4, 2)),
            torch.randn(3, 4),
        )
        program = record(model, x)
        same(program.run(x), model.b(part(model.a(x))))
        assert targets(program, "call_module") == ["a", "part", "b"]


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


def test_programs_can_be_copied():
    program = record(mlp(), torch.randn(2, 4))
    twin = copy.deepcopy(program.graph)
    assert [n.target for n in twin.nodes] == [n.target for n in program.graph.nodes]
    assert twin.output_node().meta["structure"] == 0


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
