"""A network with a norm between two widths, one of them laid out anew, and all bits of a model."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import dagrow
from dagrow import AddNeurons

X = torch.randn(24, 5, generator=torch.Generator().manual_seed(0))
Y = torch.stack([X[:, 0] * X[:, 1], X[:, 2].abs()], 1)
BATCHES = [(X, Y)]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b, self.c = nn.Linear(5, 3), nn.BatchNorm1d(3), nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.b(torch.tanh(self.norm(self.a(x))).view(-1, 3))))


def setting() -> tuple[Net, Any]:
    torch.manual_seed(0)
    model = Net()
    return model, dagrow.trace(model, X)


def grow(dag: Any, axis: str = "a", k: int = 2, init: Any = "optimal", **kwargs: Any) -> dagrow.Receipt:
    operator = AddNeurons(k=k, init=init, axes=(axis,), ridge=1e-3, folds=1)
    return dagrow.propose(dag, BATCHES, functional.mse_loss, [operator])[0].apply(0.5, **kwargs)


def state(model: nn.Module) -> dict[str, Any]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    found: dict[str, Any] = {n: (id(t), t.detach().clone(), t.grad) for n, t in tensors.items()}
    sizes = {n: {k: v for k, v in vars(m).items() if isinstance(v, int)} for n, m in model.named_modules()}
    return {**found, "sizes": sizes, "class": type(model)}


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    for key, value in a.items():
        if isinstance(value, tuple):
            assert value[0] == b[key][0]
            assert torch.equal(value[1], b[key][1]), key
            assert value[2] is b[key][2]
        else:
            assert value == b[key]
