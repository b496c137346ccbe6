"""Neurons between convolutions: their theory against slow truths, what they grow into, and what they cost."""

import copy

import numpy as np
import pytest
import reference as truth
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
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


@given(kernel=SPACES)
@DRAWN
def test_directions_between_convolutions_are_those_of_the_slow_truth(kernel: tuple[Kernel, Kernel]) -> None:
    case = drawn_pair(kernel)
    assume(case is not None)
    found = case.propose(AddNeurons(k=2, folds=1), case.copy())[0]
    assume(found.singular_values is not None)  # a consumer may read nothing but margins
    d = slow(case)
    expected = truth.neurons_between(**d)[:2]
    values = np.zeros(len(expected))
    values[: len(found.singular_values)] = found.singular_values  # the rest is rounding, and left out
    assert abs(values - expected).max() <= 1e-7 * truth.energy(d["V"]) ** 0.5


@given(kernel=SPACES, activation=st.sampled_from(("Identity", "Tanh", "ReLU")), solver=st.sampled_from(("svd", "als")))
@DRAWN
def test_the_bottleneck_of_a_growth_is_that_of_brute_force(
    kernel: tuple[Kernel, Kernel], activation: str, solver: str
) -> None:
    case = drawn_pair(kernel, activation)
    assume(case is not None)
    dag, d = case.copy(), slow(case)
    growth = case.propose(AddNeurons(k=2, folds=1, solver=solver), dag)[0]
    bottleneck = dagrow.bottlenecks(dag, case.batches, case.loss)["2"].bottleneck
    energy = truth.energy(d["V"])
    assert abs(bottleneck - truth.bottleneck(d["B"], d["V"])) <= 1e-8 * energy
    receipt = growth.apply(0.0)
    read = truth.features(dag.model.eval(), torch.cat([x for x, _ in case.batches]), dag.model[2], bias=False)
    taps = read.shape[-1] // dag.model[2].in_channels
    new = [
        c * taps + t for c in receipt.parameters["2.weight"][dag.edge("2").rule.dims["weight"][1]] for t in range(taps)
    ]
    fit = truth.explained(d["B"], read[..., new], d["V"], "centred" if dag.edge("2").bias else "raw")
    assert abs(bottleneck - growth.drop - truth.energy(fit.residual)) <= 1e-8 * energy
    assert abs(growth.gain - fit.gain) <= 1e-8 * energy


@given(kernel=SPACES, activation=st.sampled_from(("Identity", "Tanh", "ReLU")), folds=st.sampled_from((1, 4)))
@DRAWN
def test_als_is_never_worse_than_svd(kernel: tuple[Kernel, Kernel], activation: str, folds: int) -> None:
    case = drawn_pair(kernel, activation)
    assume(case is not None)
    svd, als = (case.propose(AddNeurons(k=2, folds=folds, ridge=0.0, solver=s), case.copy())[0] for s in ("svd", "als"))
    assert als.drop >= svd.drop - 1e-9 * truth.energy(slow(case)["V"])


def test_als_finds_more_than_svd_where_slots_overlap() -> None:
    kernel = Kernel((3, 3), (1, 1), (1, 1), (1, 1))
    gained = []
    for seed in range(6):
        case = pair(kernel, kernel, seed=seed)
        d, fans = slow(case), []
        for solver in ("svd", "als"):
            dag = case.copy()
            receipt = case.propose(AddNeurons(k=1, folds=1, solver=solver), dag)[0].apply(0.0)
            (row,) = receipt.parameters["0.weight"][0]
            fans.append(torch.cat([dag.model[0].weight[row].flatten(), dag.model[0].bias[row][None]]).detach().numpy())
        svd, als = (truth.fall_between(**d, fan_in=fan[:, None]) for fan in fans)
        assert als >= svd * (1 - 1e-9)
        gained.append(als / svd)
    assert max(gained) > 1.05


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


@pytest.mark.parametrize("gamma", [0.01, 0.1, 1.0])
def test_in_train_mode_the_loss_follows_the_prediction(gamma: float) -> None:
    """New channels pass a BatchNorm as they were measured, whether it norms by its statistics or by the batch."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1),
        nn.BatchNorm2d(2),
        nn.ReLU(),
        nn.Conv2d(2, 2, 3, padding=1),
        nn.BatchNorm2d(2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2, 4),
    ).double()
    x, y = digits(400, 1)
    loss, optimizer = nn.functional.cross_entropy, torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(60):
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()
    for where in ("0", "3"):
        dag = dagrow.trace(copy.deepcopy(model), x[:2])
        growth = dagrow.propose(dag, [(x, y)], loss, [AddNeurons(k=3, axes=(where,))])[0]
        trained = copy.deepcopy(dag.model).train()
        before = float(loss(trained(x), y)), growth.loss(0.0)
        predicted = growth.loss(gamma)  # what the line search sees, in eval mode
        growth.apply(gamma)
        after = float(loss(dag.model.train()(x), y)), predicted
        assert after[0] / before[0] == pytest.approx(after[1] / before[1], rel=0.05)
        assert after[0] == pytest.approx(after[1], rel=0.05)


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
