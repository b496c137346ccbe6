"""Moments of a small model of tokens, measured in batches of any sizes."""

import torch
from torch import nn
from zoo import mean_loss

import dagrow
from dagrow.solvers import Moments
from dagrow.statistics import InputFeatures, Objective, OutputGoal, measure

READS, GOAL = InputFeatures("2"), OutputGoal("2")
PAIRS = [(READS, READS), (READS, GOAL), (GOAL, GOAL), (InputFeatures("0"), READS)]


def model(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 2, bias=False)).to(dtype)


def samples(*leading: int, n: int = 22, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, *leading, 3, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randn(n, *leading, 2, generator=generator, dtype=torch.float64).to(dtype)


def measured(net: nn.Module, x, y, *sizes: int, loss=mean_loss, folds: int = 4, **options) -> Moments:
    batches = list(zip(x.split(sizes or len(x)), y.split(sizes or len(y)), strict=True))
    return measure(dagrow.trace(net, x[:2]), Objective(net, batches, loss), PAIRS, folds=folds, **options)


def close(a: torch.Tensor, b: object, rtol: float = 1e-12) -> None:
    b = torch.as_tensor(b, dtype=torch.float64)
    assert float((a - b).abs().max()) <= rtol * float(b.abs().max())
