"""Weights that reach a loss by another way than the layer's output are refused or noted, and nothing else is."""

from collections.abc import Callable
from typing import Any

import perceptrons
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.functional import linear, mse_loss

import dagrow
from dagrow import AddConnection, AddNeurons, LossError, MoveWeights, testing
from dagrow.statistics import InputFeatures, Objective, OutputGoal, measure
from dagrow.statistics._trials import Trials

Step = Callable[[nn.Module, Any], Tensor]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def plain(model: nn.Module, batch: Any) -> Tensor:
    return mse_loss(model(batch[0]), batch[1])


def gradient_penalty(model: nn.Module, batch: Any) -> Tensor:
    with torch.enable_grad():
        x = batch[0].clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return (slope.norm(dim=1) - 1).square().mean()


def residual_of_an_equation(model: nn.Module, batch: Any) -> Tensor:
    with torch.enable_grad():
        x = batch[0].clone().requires_grad_()
        u = model(x)
        (first,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x, create_graph=True)
    return (second.sum(1) + u[:, 0]).square().mean()


def forward_derivative(model: nn.Module, batch: Any) -> Tensor:
    with forward_ad.dual_level():
        output = model(forward_ad.make_dual(batch[0], torch.ones_like(batch[0])))
        value, tangent = forward_ad.unpack_dual(output)
        return mse_loss(value, batch[1]) + (0 if tangent is None else tangent.square().mean())


def derivative_by_a_transform(model: nn.Module, batch: Any) -> Tensor:
    return vmap(grad(lambda x: model(x).sum()))(batch[0]).square().mean()


def tangent_by_a_transform(model: nn.Module, batch: Any) -> Tensor:
    return jvp(model, (batch[0],), (torch.ones_like(batch[0]),))[1].square().mean()


def weights_beside(model: nn.Module, batch: Any) -> Tensor:
    return plain(model, batch) * (1 + model[4].weight.square().sum())


def tied_in_the_step(model: nn.Module, batch: Any) -> Tensor:
    return mse_loss(linear(model(batch[0])[:, :1].expand(-1, model[4].in_features), model[4].weight), batch[1])


def other_weights(model: nn.Module, batch: Any) -> Tensor:
    return mse_loss(functional_call(model, {n: 2 * p for n, p in model.named_parameters()}, (batch[0],)), batch[1])


def detached_weights(model: nn.Module, batch: Any) -> Tensor:
    return mse_loss(functional_call(model, {n: p.detach() for n, p in model.named_parameters()}, batch[0]), batch[1])


@pytest.mark.parametrize("operator", [MoveWeights(), AddNeurons(k=1), AddNeurons(k=1, init="random"), AddConnection()])
@pytest.mark.parametrize(
    ("step", "cause"),
    [
        (gradient_penalty, r"takes derivatives \(torch.autograd.grad\)"),
        (residual_of_an_equation, r"takes derivatives \(torch.autograd.grad\)"),
        (forward_derivative, r"takes derivatives \(torch.autograd.forward_ad\)"),
        (derivative_by_a_transform, "inside a transform of torch.func"),
        (tangent_by_a_transform, "inside a transform of torch.func"),
        (weights_beside, "uses these weights once more"),
        (tied_in_the_step, "uses these weights once more"),
        (other_weights, "with other weights than the model's own"),
        (detached_weights, "with other weights than the model's own"),
    ],
    ids=lambda case: getattr(case, "__name__", ""),
)
def test_another_way_is_refused_with_its_cause(step: Step, cause: str, operator: dagrow.operators.Operator) -> None:
    model = perceptrons.mlp(3, 4, 4, 2)
    dag, before = dagrow.trace(model, torch.randn(2, 3).double()), [p.clone() for p in model.parameters()]
    with pytest.raises(LossError, match=cause):
        dagrow.propose(dag, perceptrons.data(), step=step, operators=[operator])
    assert all(p.grad is None and torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("init", ["zero", "copy"])
def test_what_needs_no_gradient_grows_under_derivatives(init: str) -> None:
    dag = dagrow.trace(perceptrons.mlp(3, 4, 2), torch.randn(2, 3).double())
    growth = dagrow.propose(dag, perceptrons.data(), step=gradient_penalty, operators=[AddNeurons(k=2, init=init)])[0]
    assert growth.gain == 0
    assert growth.loss(1.0) == pytest.approx(growth.loss(0.0), rel=1e-9)
    assert growth.notes == ()


def test_frozen_weights_are_compared_too() -> None:
    dag = dagrow.trace(perceptrons.mlp(3, 4, 2).requires_grad_(False), torch.randn(2, 3).double())
    with pytest.raises(LossError, match="takes derivatives"):
        dagrow.propose(dag, perceptrons.data(), step=gradient_penalty)
    assert not any(parameter.requires_grad for parameter in dag.model.parameters())


def straight_through(model: nn.Module, batch: Any) -> Tensor:
    h = model[:2](batch[0])
    return mse_loss(model[2:](h + ((4 * h).round() / 4 - h).detach()), batch[1])


class _Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


def reversed_gradient(model: nn.Module, batch: Any) -> Tensor:
    return mse_loss(model[2:](_Reversed.apply(model[:2](batch[0]))), batch[1])


def clipped_gradient(model: nn.Module, batch: Any) -> Tensor:
    h = model[:2](batch[0])
    if h.requires_grad:
        h.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))
    return mse_loss(model[2:](h), batch[1])


def detached_target(model: nn.Module, batch: Any) -> Tensor:
    y = model(batch[0])
    return (y[:, 0] - y[:, 1].detach() - batch[1][:, 0]).square().mean()


def balanced(model: nn.Module, batch: Any) -> Tensor:
    first, second = (model(batch[0]) - batch[1]).square().mean(0)
    return first + second * (first / second).detach()


def weighted_by_a_derivative(model: nn.Module, batch: Any) -> Tensor:
    with torch.enable_grad():
        x = batch[0].clone().requires_grad_()
        y = model(x)
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    return ((y - batch[1]).square().sum(1) * (1 + slope.detach().norm(dim=1))).mean()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("step", "noted"),
    [
        (straight_through, ["0"]),
        (reversed_gradient, ["0"]),
        (clipped_gradient, ["0"]),
        (detached_target, ["0"]),  # at the layer itself the target does not move along the gradient
        (balanced, ["0", "2"]),
        (weighted_by_a_derivative, ["0", "2"]),
    ],
    ids=lambda case: getattr(case, "__name__", ""),
)
def test_gradients_that_are_no_slopes_are_noted(step: Step, noted: list[str], dtype: torch.dtype) -> None:
    dag = dagrow.trace(perceptrons.mlp(3, 6, 2).to(dtype), torch.randn(2, 3, dtype=dtype))
    batches = perceptrons.data(dtype=dtype)
    growths = dagrow.propose(dag, batches, step=step, operators=[MoveWeights(folds=1)])
    found = sorted(g.where for g in growths if any("slope of the loss" in note for note in g.notes))
    assert set(noted) <= set(found)  # where any differs, other directions of the others may
    if dtype is torch.float64:
        apart = [g.where for g in growths if abs((g.loss(1e-5) - g.loss(-1e-5)) / 2e-5 + g.gain) > 1e-4 * g.gain]
        assert sorted(apart) == noted


class RunningScale(nn.Module):
    """A loss in units of its own running mean, which no gradient sees."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.ones((), dtype=torch.float64))

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        loss = mse_loss(output, target)
        self.mean.mul_(0.9).add_(0.1 * loss.detach())
        return loss / self.mean


@pytest.mark.parametrize("called", [True, False])
def test_a_loss_with_a_running_mean_is_measured_from_the_mean_that_it_has(called: bool) -> None:
    dag, scale = dagrow.trace(perceptrons.mlp(3, 4, 2), torch.randn(2, 3).double()), RunningScale()
    loss = scale if called else scale.forward
    batches, operators = perceptrons.data(), [MoveWeights(), AddNeurons(k=1)]
    growths = dagrow.propose(dag, batches, loss, operators, reduction="mean")
    assert float(scale.mean) == 1

    def stateless(output: Tensor, target: Tensor) -> Tensor:
        loss = mse_loss(output, target)
        return loss / (0.9 + 0.1 * loss.detach())

    for growth, other in zip(growths, dagrow.propose(dag, batches, stateless, operators), strict=True):
        assert growth.gain == pytest.approx(other.gain, rel=1e-9)
    for growth in growths:
        assert growth.loss(0.0) == growth.loss(0.0)
        assert any("slope of the loss" in note for note in growth.notes)


def saved_elsewhere(model: nn.Module, batch: Any) -> Tensor:
    with torch.autograd.graph.save_on_cpu():
        return plain(model, batch)


def derivative_without_use(model: nn.Module, batch: Any) -> Tensor:
    with torch.enable_grad():
        x = batch[0].clone().requires_grad_()
        y = model(x)
        torch.autograd.grad(y.sum(), x, create_graph=True)
    return mse_loss(y, batch[1])


def called_with_its_own_weights(model: nn.Module, batch: Any) -> Tensor:
    return mse_loss(functional_call(model, dict(model.named_parameters()), (batch[0],)), batch[1])


def frozen_part(model: nn.Module, batch: Any) -> Tensor:
    with torch.no_grad():
        h = model[:2](batch[0])
    return mse_loss(model[2:](h), batch[1])


def low_precision(model: nn.Module, batch: Any) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return plain(model, batch)


def worst_half(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch[0]) - batch[1]).square().sum(1).topk(len(batch[0]) // 2)[0].mean()


def difference_of_means(model: nn.Module, batch: Any) -> Tensor:
    first, second = model(batch[0]).mean(0)
    return first - second


def above_a_large_constant(model: nn.Module, batch: Any) -> Tensor:
    return plain(model, batch) + 1e6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("act", [nn.Tanh, nn.ReLU])
@pytest.mark.parametrize(
    "step",
    [
        plain,
        saved_elsewhere,
        derivative_without_use,
        called_with_its_own_weights,
        frozen_part,
        low_precision,
        worst_half,
        difference_of_means,
        above_a_large_constant,
    ],
    ids=lambda step: step.__name__,
)
def test_no_false_alarm(step: Step, act: type[nn.Module], dtype: torch.dtype) -> None:
    if step is low_precision and dtype is torch.float64:
        return
    model = perceptrons.mlp(3, 8, 6, 2, act=act).to(dtype)
    model[2].weight.register_hook(torch.zeros_like)  # what training makes of a gradient is no matter
    dag = dagrow.trace(model, torch.randn(2, 3, dtype=dtype))
    for growth in dagrow.propose(
        dag, perceptrons.data(dtype=dtype), step=step, operators=[MoveWeights(folds=1), AddNeurons(k=1, folds=1)]
    ):
        assert not any("slope" in note or "penalty" in note for note in growth.notes)
    assert len(model[2].weight._backward_hooks) == 1


def test_goals_that_are_alike_at_very_many_positions_are_no_alarm() -> None:
    """Autograd sums a bias' gradient in single precision, and where all goals are alike it rounds the same way."""
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    batches = [(torch.rand(8, 1, 128, 128), torch.randint(2, (8,)))]
    looked = dagrow.bottlenecks(dagrow.trace(model, batches[0][0]), batches, nn.CrossEntropyLoss())
    assert set(looked) == {"0", "3"}


def test_the_first_batch_is_compared_once() -> None:
    calls = [0]

    def counted(model: nn.Module, batch: Any) -> Tensor:
        calls[0] += 1
        return plain(model, batch)

    dag = dagrow.trace(perceptrons.mlp(3, 4, 2), torch.randn(2, 3).double())
    objective, reads, goal = Objective(dag.model, perceptrons.data(), step=counted), InputFeatures("2"), OutputGoal("2")
    runs = []
    for pair in ((goal, goal), (goal, goal), (reads, goal), (reads, goal)):
        calls[0] = 0
        measure(dag, objective, [pair])
        runs.append(calls[0])
    assert runs[2] == runs[1] + 1  # for a finite difference
    assert runs[3] == runs[1]
    assert objective.findings.compared == {"2"}


def test_one_evaluation_is_enough_where_the_loss_is_steep(monkeypatch: pytest.MonkeyPatch) -> None:
    """It bends within a step along the gradient that is small for other losses."""
    steps, moved = [], Trials._moved
    monkeypatch.setattr(Trials, "_moved", lambda self, ray, by: steps.append(by) or moved(self, ray, by))
    model = nn.Sequential(*[part for _ in range(40) for part in (nn.Linear(6, 6, bias=False), nn.ReLU())][:-1])
    with torch.no_grad():
        for layer in model[::2]:
            layer.weight.mul_(4)
    x = torch.randn(20, 6)
    dagrow.bottlenecks(dagrow.trace(model, x), [(x, torch.randn(20, 6))], mse_loss)
    assert len(steps) == 1
    assert 0 < steps[0] < 1e-3


def two_views(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return mse_loss(model(x), y) + (model(x + 0.1) - model(x - 0.1)).square().mean()


def a_target_network(model: nn.Module, batch: Any) -> Tensor:
    with torch.no_grad():
        target = model(batch[0] + 0.1)
    return mse_loss(model(batch[0]), 0.9 * target + batch[1])


def differences_for_derivatives(model: nn.Module, batch: Any) -> Tensor:
    x, h = batch[0], 1e-2
    u = model(x)
    return ((model(x + h) - 2 * u + model(x - h)) / h**2 + u - batch[1]).square().mean()


@pytest.mark.parametrize("operator", [MoveWeights(), AddNeurons(k=1), AddConnection()])
@pytest.mark.parametrize("step", [two_views, a_target_network, differences_for_derivatives], ids=lambda s: s.__name__)
def test_several_calls_are_compared_together(step: Step, operator: dagrow.operators.Operator) -> None:
    dag = dagrow.trace(perceptrons.mlp(3, 4, 4, 2), torch.randn(2, 3).double())
    growths = dagrow.propose(dag, perceptrons.data(), step=step, operators=[operator])
    assert growths
    for growth in growths:
        noted = any("slope of the loss" in note for note in growth.notes)
        assert noted == (step is a_target_network)
        if not noted:
            testing.check_slope(growth)


def test_random_numbers_in_train_mode_are_the_same_in_a_finite_difference() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Tanh(), nn.BatchNorm1d(8), nn.Linear(8, 2)).double()
    dag, mean = dagrow.trace(model, torch.randn(2, 3).double()), model[3].running_mean.clone()
    growths = dagrow.propose(dag, perceptrons.data(), mse_loss, [MoveWeights()], mode="train")
    assert not any("slope" in note for growth in growths for note in growth.notes)
    assert torch.equal(model[3].running_mean, mean)
