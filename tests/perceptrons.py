"""Perceptrons in double precision, and batches for them."""

from itertools import pairwise

import torch
from torch import Tensor, nn

Batches = list[tuple[Tensor, Tensor]]


def mlp(*widths: int, act: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, o in pairwise(widths):
        layers += [nn.Linear(i, o), act()]
    return nn.Sequential(*layers[:-1]).double()


def data(n: int = 60, i: int = 3, o: int = 2, dtype: torch.dtype = torch.float64) -> Batches:
    x = torch.randn(n, i, dtype=dtype)
    return list(zip(x.split(20), torch.sin(2 * x[:, :o]).split(20), strict=True))
