"""A history of a small network with a way around and a concatenation, for tests of records and pictures."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dagrow
from dagrow import AddNeurons, Grower, History

X = torch.randn(120, 5, generator=torch.Generator().manual_seed(0)).double()
Y = torch.tanh(X[:, :3] * X[:, 1:4])


class Net(nn.Module):
    """A chain, a way around it, and a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.side, self.head = nn.Linear(5, 2), nn.Linear(2, 2), nn.Linear(5, 1), nn.Linear(3, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.b(torch.tanh(self.a(x))))
        return self.head(torch.cat([h, torch.relu(self.side(x))], 1))


def grown_history() -> History:
    grower = Grower(
        dagrow.trace(Net(), X[:2]),
        nn.functional.mse_loss,
        [AddNeurons(k=2)],
        schedule=dagrow.EveryEpochs(2),
        stop=[dagrow.AfterEpoch(4)],
    )
    for epoch in range(6):
        grower.step(epoch, [(X, Y)], [(X[:40], Y[:40])] if epoch else None)
    return grower.history


def check_drawn(draw: Callable[[Any], None], folder: Path) -> None:
    """A figure is drawn in both formats, and there is something to see."""
    read = pytest.importorskip("matplotlib.image").imread
    draw(folder / "figure.png")
    drawn = read(folder / "figure.png")[..., :3]
    assert len({tuple(color) for color in drawn[::3, ::3].reshape(-1, 3).round(1).tolist()}) > 8
    draw(str(folder / "figure.svg"))
    assert (folder / "figure.svg").read_text().startswith("<?xml")
