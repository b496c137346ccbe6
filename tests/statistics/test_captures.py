"""What a batch leaves: several images a sample, and groups of samples."""

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import dagrow
from dagrow import AddNeurons
from dagrow.statistics._captures import Batch

DRAWN = settings(
    max_examples=25,
    derandomize=True,
    deadline=None,
    database=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)


class Frames(nn.Module):
    """A model of images that is given several of them a sample."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, frames: Tensor) -> Tensor:
        return self.net(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])


@pytest.mark.parametrize("solver", ["svd", "als"])
@pytest.mark.parametrize("samples", [3, 4])
def test_several_images_a_sample(samples: int, solver: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 3, 3)).double()
    frames, goal = torch.randn(samples, 4, 2, 7, 7).double(), torch.randn(samples, 4, 3, 5, 5).double()
    operator = AddNeurons(k=1, solver=solver, folds=1)

    def gain(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
        (growth,) = dagrow.propose(dagrow.trace(model, x[:2]), [(x, y)], nn.MSELoss(reduction="sum"), [operator])
        return growth.gain * len(x), growth.drop * len(x)

    expected = gain(net, frames.flatten(0, 1), goal.flatten(0, 1))
    assert gain(Frames(net), frames, goal) == pytest.approx(expected, rel=1e-9)


@given(folds=st.integers(1, 4), samples=st.integers(1, 9), images=st.integers(1, 3), seen=st.integers(0, 5))
@DRAWN
def test_groups_of_samples(folds: int, samples: int, images: int, seen: int) -> None:
    batch = Batch({}, samples, seen, folds)
    image = torch.arange(samples * images * 2.0).view(-1, 2, 1)
    grouped = batch.grouped(image)
    assert torch.equal(batch.ungrouped(grouped), image)
    for group, fold in enumerate(batch.groups):
        own = [i for i in range(samples) if (seen + i) % folds == fold]
        expected = image.view(samples, -1)[own].flatten()
        samples_of_fold = grouped.unflatten(1, (len(batch.groups), 2))[:, group].flatten()
        assert torch.equal(samples_of_fold[: len(expected)], expected)
        assert not samples_of_fold[len(expected) :].any()
