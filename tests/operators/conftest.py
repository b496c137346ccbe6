"""A small network with its data."""

import pytest
import torch
from torch import Tensor
from wired import DOUBLE, Net


@pytest.fixture
def net() -> tuple[Net, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    x = torch.randn(300, 5, dtype=DOUBLE)
    y = torch.sin(x @ torch.randn(5, 2, dtype=DOUBLE))
    return Net().double(), list(zip(x.split(100), y.split(100), strict=True))
