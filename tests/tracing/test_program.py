"""Running a graph."""

import copy

import torch
from forwards import made, mlp
from torch import nn

from dagrow.tracing import record


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


def test_programs_can_be_copied():
    program = record(mlp(), torch.randn(2, 4))
    twin = copy.deepcopy(program.graph)
    assert [n.target for n in twin.nodes] == [n.target for n in program.graph.nodes]
    assert twin.output_node().meta["structure"] == 0
