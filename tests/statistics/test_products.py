"""Convolutions: their sums against rows, their theory against slow truths, and what they grow into."""

import copy

import numpy as np
import pytest
import reference as truth
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from images import Kernel, Plan, built, kernels, plans
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from zoo import case_of

import dagrow
from dagrow import AddNeurons
from dagrow.errors import NoPlaceError
from dagrow.layers import rule_for
from dagrow.statistics import Feature, InputFeatures, Objective, PulledGoal, ResidualGoal, measure
from dagrow.statistics._captures import Batch
from dagrow.statistics._measure import _BatchHooks
from dagrow.statistics._products import _from_rows, product

DRAWN = settings(
    max_examples=25,
    derandomize=True,
    deadline=None,
    database=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)
SPACES = st.sampled_from((1, 2, 3)).flatmap(lambda space: st.tuples(kernels(space), kernels(space)))


def image(space: int, channels: int, n: int = 3) -> Tensor:
    return torch.randn(n, channels, *(5, 4, 3)[:space], dtype=torch.float64)


@given(kernel=SPACES)
@DRAWN
def test_patches_are_those_of_loops(kernel: tuple[Kernel, Kernel]) -> None:
    layer, x = kernel[0].layer(2, 3).double(), image(len(kernel[0].size), 2)
    try:
        written = layer(x)
    except RuntimeError:
        assume(False)
    rule = rule_for(layer, dagrow.layers.DEFAULT_RULES)
    found = rule.features(layer, x)
    torch.testing.assert_close(found, torch.cat([truth.patches(layer, x[n : n + 1]) for n in range(3)]))
    o, i = rule.dims["weight"]
    matrix = layer.weight.movedim((o, i), (0, 1)).flatten(1)
    again = found @ matrix.T + (0 if layer.bias is None else layer.bias)
    torch.testing.assert_close(again, rule.rows(layer, written))


def captured(case, dag, pairs) -> Batch:
    """What the first batch leaves at the layers of all features."""
    objective = Objective(dag.model.eval(), case.batches, case.loss)
    objective.probe()
    with _BatchHooks(dag, {f for pair in pairs for f in pair}, {}, {}) as watch:
        batch, n = next(iter(objective))
        captures = watch.harvest(objective.value(batch), -1.0)
    return Batch(captures, n, seen=1, folds=3)


def resumed(steps, moments=None):
    """What comes next, unless that needs a preview; None at the end."""
    try:
        needs = steps.send(moments)
    except StopIteration:
        return None
    return needs if needs.preview is None else None


def norm(feature: Feature, batch: Batch) -> float:
    """Of its rows; of a difference, that of the larger side."""
    if isinstance(feature, ResidualGoal):
        return max(norm(feature.goal, batch), float((feature.goal.rows(batch) - feature.rows(batch)).norm()))
    if isinstance(feature, PulledGoal):
        return norm(feature.goal, batch) * feature.arrival.index.shape[1]
    return float(feature.rows(batch).norm())


@pytest.mark.parametrize("solver", ["svd", "als"])
@given(plan=plans())
@DRAWN
def test_sums_from_images_are_those_from_rows(plan: Plan, solver: str) -> None:
    case = built(plan)
    assume(case is not None)
    dag = case.copy()
    try:
        waiting = AddNeurons(k=2, solver=solver, folds=3).candidates(dag)
    except NoPlaceError:  # nothing grows, or by no closed form
        assume(False)
    objective = Objective(dag.model, case.batches, case.loss)
    waiting = [(steps, next(steps)) for steps in (c.steps(objective) for c in waiting)]
    while waiting:
        pairs = [pair for _, needs in waiting for pair in needs.pairs]
        batch = captured(case, dag, pairs)
        for x, y in set(pairs):
            expected = _from_rows(x, y, batch)
            if isinstance(x, InputFeatures):
                basis = torch.randn(x.rows(batch).shape[1], 2).double()
                torch.testing.assert_close(x.projected(batch, basis), x.rows(batch) @ basis, rtol=1e-10, atol=1e-10)
            size = norm(x, batch) * norm(y, batch)
            torch.testing.assert_close(product(x, y, batch), expected, rtol=0, atol=1e-11 * size)
        m = measure(dag, objective, pairs, folds=3)
        waiting = [(steps, needs) for steps, _ in waiting if (needs := resumed(steps, m)) is not None]


# ---------------------------------------------------------------- theory


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


# ---------------------------------------------------------------- growing on


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


# ---------------------------------------------------------------- samples, sizes, units


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
        found = grouped.unflatten(1, (len(batch.groups), 2))[:, group].flatten()
        assert torch.equal(found[: len(expected)], expected)
        assert not found[len(expected) :].any()


@pytest.mark.parametrize("size", [(6, 4), (5, 5), (8, 6)])
def test_images_of_another_size_than_the_example(size: tuple[int, int]) -> None:
    first, second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3)
    model = nn.Sequential(first, nn.Tanh(), second, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    dag, x = dagrow.trace(model, torch.randn(2, 3, 4, 6)), torch.randn(8, 3, *size)
    with pytest.raises(dagrow.BatchError, match=f"{size[0]}x{size[1]} positions for a batch, but 4x6"):
        dagrow.propose(dag, [(x, torch.randn(8, 2))], nn.MSELoss(), [AddNeurons(k=1)])


class Padded(nn.Module):
    """A shortcut that pads channels with zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3, 2, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(torch.relu(self.second(h) + nn.functional.pad(h[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1))))


@pytest.mark.parametrize("solver", ["svd", "als"])
def test_a_shortcut_that_pads_channels(solver: str) -> None:
    torch.manual_seed(0)
    model, x = Padded().double(), torch.randn(4, 3, 10, 10).double()
    dag, batches = dagrow.trace(model, x[:2]), [(x, torch.randn(4, 2, 4, 4).double())]
    for growth in dagrow.propose(dag, batches, nn.MSELoss(), [AddNeurons(k=1, solver=solver, folds=1)]):
        assert growth.gain == pytest.approx((growth.loss(-1e-5) - growth.loss(1e-5)) / 2e-5, rel=1e-4)


UNITS = {
    "group norm": [nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 3, 1)],
    "groups": [nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.ReLU(), nn.Conv2d(4, 3, 1)],
    "reduction": [
        nn.Conv2d(3, 4, 3),
        nn.Conv2d(4, 2, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.Conv2d(2, 3, 1, padding=1),
    ],
    "multiplier": [
        nn.Conv2d(3, 2, 3, padding=1),
        nn.Conv2d(2, 4, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.Conv2d(4, 3, 1),
    ],
}


@pytest.mark.parametrize("solver", ["svd", "als", "joint"])
@pytest.mark.parametrize("layers", UNITS.values(), ids=UNITS)
def test_channels_of_a_unit_are_no_twins(layers: list[nn.Module], solver: str) -> None:
    torch.manual_seed(0)
    model, x = copy.deepcopy(nn.Sequential(*layers)).double(), torch.randn(40, 3, 6, 6).double()
    y = x.tanh().roll(1, 1)
    dag, width = dagrow.trace(model, x[:2]), model[-1].in_channels
    dagrow.propose(dag, [(x, y)], nn.MSELoss(), [AddNeurons(k=2, solver=solver)])[0].apply(0.1)
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(20):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    fan_in = torch.cat([model[0].weight.detach().flatten(1), model[0].bias.detach()[:, None]], 1)
    assert fan_in.norm(dim=1).min() > 0.01  # none is dead
    new = model[:-1](x).detach()[:, width:].transpose(0, 1).flatten(1)
    assert len(new) in (2, 4, 8)  # two units of one, two or four channels
    assert new.std(1).min() > 0.01
    alike = torch.corrcoef(new).abs() - torch.eye(len(new))
    assert alike.max() < 0.95


# ---------------------------------------------------------------- cost


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
