"""Three layers with a loss and batches, for the verbs."""

from typing import Any

import torch
from torch import Tensor, nn

import dagrow

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(60, 4, generator=GENERATOR).double()
Y = X[:, :2] * X[:, 2:]
BATCHES = [(X, Y)]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 2)
        self.double()

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        h = self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))
        return h if scale is None else h * scale


def traced(example: Any = X) -> Any:
    return dagrow.trace(Net(), example)


def mean(output: Tensor, target: Tensor) -> Tensor:
    return ((output - target) ** 2).sum(1).mean()
