"""Which modules become one node."""

import torch
from forwards import made, mlp, same, targets
from torch import nn

from dagrow.tracing import record
from dagrow.tracing._leaf_modules import is_leaf


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
