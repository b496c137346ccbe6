"""Two layers, used in any way that a forward can be written."""

from collections.abc import Callable
from typing import Any

import torch
from conformance import Made
from torch import nn

X = torch.randn(4, 6, dtype=torch.float64)


def made(forward: Callable[..., Any], **parts: Any) -> nn.Module:
    torch.manual_seed(0)
    return Made(forward, {"a": nn.Linear(6, 8), "b": nn.Linear(8, 3), **parts}).double().eval()
