"""A small network with its batches, and the same traced."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional

import dagrow

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
Y = X[:, :2] * X[:, 2:]
BATCHES = [(X, Y)]
MSE = functional.mse_loss


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))


def setting() -> tuple[nn.Module, Any]:
    model = net()
    return model, dagrow.trace(model, X)
