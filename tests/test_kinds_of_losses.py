"""Losses of every kind: the gain is minus the slope of the loss, and the losses that are reported are the user's."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import dagrow
from dagrow import AddNeurons, LossError, MoveWeights
from dagrow.statistics import Objective

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(60, 4, generator=GENERATOR).double()
Y = X[:, :3] * X[:, 1:]
BATCHES = list(zip(X.split(20), Y.split(20), strict=True))
LABELS = [(x, (y[:, 0] > 0).long() + (y[:, 1] > 0).long()) for x, y in BATCHES]
OPERATORS = [MoveWeights(ridge=1e-3, folds=1), AddNeurons(k=2, ridge=1e-3, folds=1)]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()


def contrastive(output: Tensor, view: Tensor) -> Tensor:
    near = functional.normalize(output) @ functional.normalize(view).T / 0.1
    return functional.cross_entropy(near, torch.arange(len(output)))


def contrastive_within(output: Tensor, _: Tensor) -> Tensor:
    """Each sample against all others, and not itself."""
    z = functional.normalize(output)
    near = (z @ z.T / 0.5).masked_fill(torch.eye(len(z), dtype=torch.bool), -torch.inf)
    return functional.cross_entropy(near, torch.arange(len(z)).roll(1))


def decorrelated(output: Tensor, target: Tensor) -> Tensor:
    a, b = ((z - z.mean(0)) / z.std(0) for z in (output, target))
    return (a.T @ b / len(a) - torch.eye(a.shape[1])).square().sum()


def masked(output: Tensor, target: Tensor) -> Tensor:
    mask = target.abs() < 1
    return ((output - target).square() * mask).sum() / mask.sum()


def ranked(output: Tensor, target: Tensor) -> Tensor:
    first, second = output[:, 0], target[:, 0]
    return functional.softplus(-(first[:, None] - first) * (second[:, None] - second).sign()).mean()


START = float((net()(X[:20]) * Y[:20]).mean().detach())
WEIGHTS = torch.tensor([0.2, 3.0, 1.0]).double()
#: batches, loss, what is found out
LOSSES: dict[str, tuple[Any, Callable[[Tensor, Tensor], Tensor], str]] = {
    "mean": (BATCHES, functional.mse_loss, "mean"),
    "sum": (BATCHES, lambda o, t: functional.mse_loss(o, t, reduction="sum"), "sum"),
    "sum over a constant": (BATCHES, lambda o, t: (o - t).square().sum() / 64, "sum"),
    "negative mean": (BATCHES, lambda o, t: -(o * t).mean(), "mean"),
    "mean that nearly vanishes": (BATCHES, lambda o, t: (o * t).mean() - START, "mean"),
    "sum with a constant": (BATCHES, lambda o, t: (o - t).square().sum() + 1e3, "sum"),
    "root of a mean": (BATCHES, lambda o, t: (o - t).square().mean().sqrt(), "mean"),
    "class weights": (LABELS, lambda o, t: functional.cross_entropy(o, t, WEIGHTS), "mean"),
    "summed class weights": (LABELS, lambda o, t: functional.cross_entropy(o, t, WEIGHTS, reduction="sum"), "sum"),
    "ignored samples": (LABELS, lambda o, t: functional.cross_entropy(o, t, ignore_index=2), "mean"),
    "masked mean": (BATCHES, masked, "mean"),
    "in-batch negatives": (BATCHES, contrastive, "mean"),
    "ranks": (BATCHES, ranked, "mean"),
    "in-batch negatives but itself": (BATCHES, contrastive_within, "batch"),
    "cross-correlation": (BATCHES, decorrelated, "batch"),
    "norm": (BATCHES, lambda o, t: (o - t).norm(), "batch"),
    "sum of squares of a sum": (BATCHES, lambda o, t: (o - t).sum(0).square().sum(), "batch"),
}


def slope(growth: dagrow.Growth, of: Callable[[float], float], step: float = 1e-5) -> float:
    size = step / max(1.0, growth.gain)
    return (8 * (of(size) - of(-size)) - (of(2 * size) - of(-2 * size))) / (12 * size)


@pytest.mark.parametrize("name", LOSSES)
def test_the_gain_is_the_slope_of_the_losses_that_the_user_states(name: str) -> None:
    batches, loss, reduction = LOSSES[name]
    model = net()
    dag = dagrow.trace(model, X)
    given: Any = {"reduction": reduction} if reduction == "batch" else {}
    if given:
        with pytest.raises(LossError, match=r"mean over samples gives 1, a sum gives 2.*reduction=.*'batch'"):
            dagrow.propose(dag, batches, loss, OPERATORS)
    growths = dagrow.propose(dag, batches, loss, OPERATORS, **given)
    assert len(growths) == 3
    assert growths[0].objective.reduction == reduction
    per_sample = 1 / 20 if reduction == "sum" else 1.0

    def stated(growth: dagrow.Growth, gamma: float) -> float:
        """The mean of the user's scalars, on a model that has grown."""
        receipt = growth.apply(gamma)
        with torch.no_grad():
            total = sum(float(loss(model(x), y)) for x, y in batches) / len(batches)
        assert receipt.loss_after == pytest.approx(total, rel=1e-9, abs=1e-12)
        receipt.undo()
        return total

    for growth in growths:
        assert -slope(growth, growth.loss) == pytest.approx(growth.gain, rel=1e-5)
        assert -per_sample * slope(growth, lambda g, growth=growth: stated(growth, g)) == pytest.approx(
            growth.gain, rel=1e-5
        )


@pytest.mark.parametrize("reduction", ["mean", "sum", "batch"])
def test_a_reduction_that_is_given_is_believed(reduction: Any) -> None:
    dag = dagrow.trace(net(), X)
    norm = LOSSES["norm"][1]
    growth = dagrow.propose(dag, BATCHES, norm, [MoveWeights(folds=1)], reduction=reduction)[0]
    assert -slope(growth, growth.loss) == pytest.approx(growth.gain, rel=1e-5)
    times = 20 if reduction == "sum" else 1
    edges = dagrow.bottlenecks(dag, BATCHES, norm, reduction=reduction)
    assert edges.loss == pytest.approx(growth.loss(0.0) * times)
    assert edges.loss == pytest.approx(sum(float(norm(dag.model(x), y).detach()) for x, y in BATCHES) / 3)


def test_every_verb_reports_the_loss_that_the_user_states() -> None:
    """A sum is not divided by the samples, wherever it is printed."""
    dag, loss = dagrow.trace(net(), X), LOSSES["sum"][1]
    batches = list(zip(X.split(25), Y.split(25), strict=True))
    before = sum(float(loss(dag.model(x), y).detach()) for x, y in batches) / 3
    assert dagrow.bottlenecks(dag, batches, loss).loss == pytest.approx(before)
    assert dagrow.grow(dag, batches, loss, OPERATORS).loss_before == pytest.approx(before)
    after = sum(float(loss(dag.model(x), y).detach()) for x, y in batches) / 3
    grower = dagrow.Grower(dag, loss, [AddNeurons(k=1)])
    receipt = grower.step(0, batches, BATCHES[:1])
    assert grower.history[0].train_loss == pytest.approx(after)
    assert grower.history[0].validation_loss == receipt.loss_before
    optimizer = torch.optim.SGD(dag.model.parameters(), lr=0.0)
    history = dagrow.fit(dag, batches, loss, [AddNeurons(k=1)], epochs=1, optimizer=optimizer)
    last = sum(float(loss(dag.model(x), y).detach()) for x, y in batches) / 3
    assert history[0].train_loss >= last
    assert history[0].train_loss == pytest.approx(receipt_start(history))


def receipt_start(history: Any) -> float:
    return history[0].grown[0].loss_before if history[0].grown else history[0].loss


def test_gains_do_not_depend_on_batches_of_a_sum_with_a_penalty() -> None:
    """The penalty is not of the samples; it shows in the gradient of no output."""
    model = net()
    dag = dagrow.trace(model, X)

    def step(network: nn.Module, batch: Any) -> Tensor:
        x, y = batch
        return (network(x) - y).square().sum() + 10 * sum(p.square().sum() for p in network.parameters())

    growth = dagrow.propose(dag, BATCHES, step=step, operators=[MoveWeights(folds=1)])[0]
    plain = dagrow.propose(dag, [(X, Y)], LOSSES["sum"][1], [MoveWeights(folds=1)])[0]
    assert growth.objective.reduction == "sum"
    assert sum(gain for at, gain in growth.gain_from.items() if "penalty" not in at) == pytest.approx(plain.gain)


class OfBatches(nn.Module):
    """Its batch size is written into it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = net()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.view(20, 4)).view(20, -1)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_batch_size_may_be_written_into_the_model(reduction: str) -> None:
    dag = dagrow.trace(OfBatches(), X[:20])
    found = Objective(dag.model, BATCHES, lambda o, t: functional.mse_loss(o, t, reduction=reduction))
    assert found.reduction == reduction
    before = found.mean()
    assert dagrow.grow(dag, BATCHES, functional.mse_loss, OPERATORS).loss_after < before
    short = [*BATCHES, (X[:7], Y[:7])]
    with pytest.raises(RuntimeError, match=r"(?s)batch 3 of batches.*has 7 samples, the first had 20.*drop_last=True"):
        dagrow.bottlenecks(dag, short, functional.mse_loss)


class Graph(nn.Module):
    """One graph is the batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 4).double(), nn.Linear(4, 3).double()

    def forward(self, x: Tensor, near: Tensor) -> Tensor:
        return near @ self.b(torch.tanh(near @ self.a(x)))


NEAR = torch.softmax(torch.randn(20, 20, generator=GENERATOR).double(), 1)
SOME = torch.arange(20) % 3 == 0


@pytest.mark.parametrize(
    ("loss", "reduction"),
    [
        (lambda o, t: functional.mse_loss(o, t), "mean"),
        (lambda o, t: functional.mse_loss(o, t, reduction="sum"), "sum"),
        (lambda o, t: functional.mse_loss(o[SOME.repeat(len(o) // 20)], t[SOME.repeat(len(o) // 20)]), "mean"),
    ],
)
def test_one_graph_may_be_the_batch(loss: Any, reduction: str) -> None:
    model, x = Graph(), X[:20]
    dag, batches = dagrow.trace(model, (x, NEAR)), [((x, NEAR), Y[:20])]
    growths = dagrow.propose(dag, batches, loss, [AddNeurons(k=2, folds=1, ridge=1e-6)])
    assert growths[0].objective.reduction == reduction
    assert -slope(growths[0], growths[0].loss) == pytest.approx(growths[0].gain, rel=1e-4)


def test_a_mask_of_one_batch_does_not_tell_a_mean_from_a_sum() -> None:
    """Its entries are some of the first copy; both would look alike."""
    dag = dagrow.trace(Graph(), (X[:20], NEAR))
    chosen = torch.tensor([0, 3, 7, 11, 13, 17, 18])

    def step(model: nn.Module, batch: Any) -> Tensor:
        x, near, y, which = batch
        return functional.mse_loss(model(x, near)[which], y[which])

    batches = [(X[:20], NEAR, Y[:20], chosen)]
    with pytest.raises(LossError, match=r"by its place in the batch.*reduction="):
        dagrow.bottlenecks(dag, batches, step=step)
    growths = dagrow.propose(dag, batches, step=step, operators=[AddNeurons(k=2, folds=1)], reduction="batch")
    assert -slope(growths[0], growths[0].loss) == pytest.approx(growths[0].gain, rel=1e-4)
