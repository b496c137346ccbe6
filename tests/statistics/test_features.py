"""Features: rows that a batch leaves."""

import pytest
import torch
from torch import nn

import dagrow
from dagrow import AddNeurons


@pytest.mark.parametrize("size", [(6, 4), (5, 5), (8, 6)])
def test_images_of_another_size_than_the_example(size: tuple[int, int]) -> None:
    first, second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3)
    model = nn.Sequential(first, nn.Tanh(), second, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    dag, x = dagrow.trace(model, torch.randn(2, 3, 4, 6)), torch.randn(8, 3, *size)
    with pytest.raises(
        dagrow.BatchError, match=f"{size[0]}x{size[1]} positions for a batch, but 4x6.*pad or crop them"
    ):
        dagrow.propose(dag, [(x, torch.randn(8, 2))], nn.MSELoss(), [AddNeurons(k=1)])
