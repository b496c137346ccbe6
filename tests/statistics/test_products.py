"""Convolutions: their sums against rows, their theory against slow truths, and what they grow into."""

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
