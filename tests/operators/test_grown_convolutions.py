"""Neurons between convolutions: their theory against slow truths, what they grow into, and what they cost."""

import pytest
import reference as truth
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from images import Kernel, kernels
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from zoo import case_of

import dagrow
from dagrow import AddNeurons

DRAWN = settings(
    max_examples=25,
    derandomize=True,
    deadline=None,
    database=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)
SPACES = st.sampled_from((1, 2, 3)).flatmap(lambda space: st.tuples(kernels(space), kernels(space)))


def pair(first: Kernel, second: Kernel, activation: str = "Identity", seed: int = 0):
    """Two convolutions, and a loss on what the second writes."""
    torch.manual_seed(seed)
    between = getattr(nn, activation)()
    model = nn.Sequential(first.layer(2, 2), between, second.layer(2, 3))
    return case_of(model, 2, *(5, 4, 3)[: len(first.size)], sizes=(9, 14), seed=seed)


def slow(case) -> dict:
    """b, p and v of the second convolution of a pair, and where it reads, by the reference."""
    model, producer, consumer = case.model.eval(), case.model[0], case.model[2]
    x, y = (torch.cat(side) for side in zip(*case.batches, strict=True))
    with torch.no_grad():
        hidden = tuple(producer(x[:1]).shape[2:])
    return {
        "B": truth.features(model, x, consumer, consumer.bias is not None),
        "P": truth.features(model, x, producer, producer.bias is not None),
        "V": truth.goals(model, case.loss, x, y, consumer),
        "index": truth.read_at(consumer, hidden),
    }


def drawn_pair(kernel: tuple[Kernel, Kernel], activation: str = "Identity"):
    try:
        case = pair(*kernel, activation)
    except (RuntimeError, ValueError):
        return None
    return case if case.copy().axis("0").growable else None


def test_a_chain_of_biased_convolutions_grows_again_and_again() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(3, 3, 3, stride=2),
        nn.Tanh(),
        nn.Conv2d(3, 2, 2),
        nn.Flatten(),
    )
    case = case_of(model, 2, 6, 5, sizes=(20, 20))
    dag, x = case.copy(), case.batches[0][0]
    for where in ("0", "0", "0", "2", "0", "2"):
        before = dag.model(x)
        (growth, *_) = dagrow.propose(dag, case.batches, case.loss, [AddNeurons(k=2, axes=(where,))])
        torch.testing.assert_close(dag.model(x), before, rtol=0, atol=0)
        receipt = growth.apply(0.0)
        torch.testing.assert_close(dag.model(x), before, rtol=0, atol=1e-10)
        receipt.undo()
        assert dagrow.grow(dag, case.batches, case.loss, [AddNeurons(k=2, axes=(where,))]).neurons in (0, 2)
    assert dag.model[0].weight.shape[0] > 3


def digits(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images of stripes, whose direction is their class."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 4
    at = torch.stack(torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij"))
    turns = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.7, 0.7], [0.7, -0.7]])[y]
    phase = 6 * torch.rand(n, 1, 1, generator=generator)
    x = torch.sin(2 * torch.einsum("nd, dhw -> nhw", turns, at) + phase)
    return (x + 0.5 * torch.randn(n, 8, 8, generator=generator))[:, None].double(), y


@pytest.mark.parametrize(
    "layers",
    [
        [nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(3, 2, 2, dilation=2)],
        [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, groups=2, stride=2), nn.Conv2d(4, 2, 1)],
        [nn.ConvTranspose2d(2, 3, 3, stride=2), nn.Tanh(), nn.ConvTranspose2d(3, 2, 4, stride=3, padding=2)],
        [nn.Conv2d(2, 3, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(48, 2)],
    ],
    ids=["convolutions", "groups", "transposed", "flatten"],
)
def test_cost_is_what_torch_counts(layers: list[nn.Module]) -> None:
    model, x = nn.Sequential(*layers), torch.randn(3, 2, 10, 10)

    def count() -> tuple[int, int]:
        with FlopCounterMode(display=False) as counter:
            model(x)
        return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // len(x)

    for axis in [axis.name for axis in dagrow.trace(model, x).axes if axis.growable]:
        before, zero = count(), AddNeurons(k=2, init="zero", folds=1, axes=(axis,))
        (growth,) = dagrow.propose(dagrow.trace(model, x), [(x, model(x).detach())], nn.MSELoss(), [zero])
        growth.apply(1.0)
        assert (growth.cost.parameters, growth.cost.flops) == tuple(b - a for a, b in zip(before, count(), strict=True))
