"""What each layer cannot follow, in any precision."""

import pytest
import torch
from torch import Tensor, nn
from verbs import BATCHES, mean, traced

import dagrow


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("width", [16, 160])
def test_half_precision_is_measured_like_single(width: int) -> None:
    model = nn.Sequential(nn.Linear(width, 2), nn.Tanh(), nn.Linear(2, 4)).bfloat16()
    x = torch.randn(600, width).bfloat16()
    y = torch.sin(2 * x.float() @ torch.randn(width, 4) / width**0.5).bfloat16()
    batches = list(zip(x.split(100), y.split(100), strict=True))
    half = dagrow.bottlenecks(dagrow.trace(model, x[:3]), batches, nn.functional.mse_loss)
    single = dagrow.bottlenecks(
        dagrow.trace(model.float(), x[:3].float()), [(a.float(), b.float()) for a, b in batches], nn.functional.mse_loss
    )
    for edge in ("0", "2"):
        assert half[edge].explained == pytest.approx(single[edge].explained, rel=0.05)


def test_autocast_is_measured() -> None:
    model, x = nn.Sequential(nn.Linear(8, 2), nn.Tanh(), nn.Linear(2, 4)), torch.randn(200, 8)

    def step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return nn.functional.mse_loss(model(batch[0]).float(), batch[1])

    found = dagrow.bottlenecks(dagrow.trace(model, x[:2]), [(x, x[:, :4].sin())], step=step)
    assert found["2"].goal > found["2"].bottleneck > 0


def test_bottlenecks_are_a_mapping_that_prints() -> None:
    found = dagrow.bottlenecks(traced(), BATCHES, mean)
    assert set(found) == {"a", "b", "c"}
    values = [found[name].bottleneck for name in found]
    assert values == sorted(values, reverse=True)
    assert all(0 <= b.share <= 1 for b in found.values())
    assert "bottleneck" in str(found)
    assert found.samples == 60


@pytest.mark.parametrize(("spread", "samples"), [(0.1, 1500), (0.01, 1500), (0.01, 250)])
def test_single_precision_tells_what_double_does_or_that_it_is_a_bound(spread: float, samples: int) -> None:
    """Of features that hardly vary, as behind a ReLU, the mean is by far the largest direction."""
    torch.manual_seed(0)
    x = 1 + spread * torch.randn(samples, 600)
    target = (x[:, :4] - 1).sum(1, keepdim=True) / spread + torch.randn(samples, 1)
    batches = list(zip(x.split(250), target.split(250), strict=True))
    model = nn.Linear(600, 1, bias=False)
    single = dagrow.bottlenecks(dagrow.trace(model, x[:2]), batches, nn.functional.mse_loss)
    batches = [(part.double(), target.double()) for part, target in batches]
    double = dagrow.bottlenecks(dagrow.trace(model.double(), x[:2].double()), batches, nn.functional.mse_loss)
    share, exact = (next(iter(found.values())).share for found in (single, double))
    is_bound = next(iter(single.values())).is_bound
    assert is_bound == (spread == 0.01 and samples == 1500)
    assert ("≤ " in str(single)) == ("rounding hides" in str(single)) == is_bound
    assert not next(iter(double.values())).is_bound
    if is_bound:
        assert share > exact - 1e-3
    else:
        assert share == pytest.approx(exact, abs=2e-3)
    assert (exact < 1e-6) == (samples == 250)  # fewer rows than features follow anything
