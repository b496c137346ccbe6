"""Two layers with something in between, and batches for them."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

import dagrow

N = 48


class Between(nn.Module):
    """Two layers with something in between."""

    def __init__(self, between: Callable[["Between", Tensor], Tensor], width: int = 4, **tensors: Tensor) -> None:
        super().__init__()
        self.first, self.last, self.between = nn.Linear(3, width), nn.Linear(width, 2), between
        for name, tensor in tensors.items():
            setattr(self, name, tensor) if isinstance(tensor, nn.Parameter) else self.register_buffer(name, tensor)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self, self.first(x)))


def data(*shape: int) -> list[tuple[Tensor, Tensor]]:
    x = torch.randn(N, *shape, dtype=torch.float64)
    return list(zip(x.split(16), torch.sin(x.flatten(1)[:, :2] * 2).split(16), strict=True))


def dag_of(model: nn.Module, *shape: int) -> dagrow.Dag:
    return dagrow.trace(model.double(), torch.randn(3, *shape, dtype=torch.float64))


def loss(output: Tensor, target: Tensor) -> Tensor:
    return (output.flatten(1)[:, :2] - target).square().mean()
