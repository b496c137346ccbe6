"""A small model of several positions a sample, its data and its loss."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

DOUBLE, N = torch.float64, 90


def loss(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().sum() / len(output) / 2


class Tokens(nn.Module):
    """Three layers on several positions of a sample."""

    def __init__(self, activation: Callable[[Tensor], Tensor] = torch.tanh) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.three = nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 2)
        self.activation = activation
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.three(self.activation(self.two(self.activation(self.one(x)))))


def data(positions: int = 2) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    x = torch.randn(N, positions, 4, dtype=DOUBLE)
    return x, torch.sin(x @ torch.randn(4, 2, dtype=DOUBLE)) + torch.randn(N, positions, 2, dtype=DOUBLE)
