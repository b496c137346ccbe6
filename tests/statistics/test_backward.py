"""Goals of layers that run once more in the backward pass, and of nothing that happens there otherwise."""

from typing import Any

import perceptrons
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import dagrow
from dagrow import AddNeurons, LossError, MoveWeights, testing


class Recomputed(torch.autograd.Function):
    """A block that keeps nothing but its input, as reversible ones do."""

    @staticmethod
    def forward(ctx: Any, block: nn.Module, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.block, ctx.x, ctx.weights = block, x.detach(), weights
        with torch.no_grad():
            return block(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        with torch.enable_grad():
            x = ctx.x.requires_grad_()
            weights = [weight for weight in ctx.weights if weight.requires_grad]
            found = list(torch.autograd.grad(ctx.block(x), (x, *weights), gradient))
        return None, found.pop(0), *(found.pop(0) if weight.requires_grad else None for weight in ctx.weights)


class Blocks(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.a, self.b = kind, nn.Linear(3, 5), nn.Linear(5, 2)
        self.m = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 5))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        if self.kind == "reentrant":
            h = checkpoint(self.m, h, use_reentrant=True)
        elif self.kind == "nested":
            h = checkpoint(lambda h: checkpoint(self.m, h, use_reentrant=True), h, use_reentrant=True)
        elif self.kind == "sequential":
            h = checkpoint_sequential(self.m, 2, h, use_reentrant=True)
        elif self.kind == "other":
            h = checkpoint(self.m, h, use_reentrant=False)
        elif self.kind == "recomputed":
            h = Recomputed.apply(self.m, h, *self.m.parameters())
        else:
            h = self.m(h)
        return self.b(h)


KINDS = ["reentrant", "nested", "sequential", "other", "recomputed"]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_what_runs_again_is_measured_like_what_runs_once(kind: str, frozen: bool) -> None:
    batches = perceptrons.data()
    found = []
    for model in (Blocks("plain").double(), Blocks(kind).double()):
        model.m.requires_grad_(not frozen)
        dag = dagrow.trace(model, batches[0][0][:2])
        growths = dagrow.propose(dag, batches, mse_loss, [AddNeurons(k=2), MoveWeights()])
        found.append({(type(g.operator).__name__, g.where): g.gain for g in growths})
        assert all(p.grad is None for p in model.parameters())
        assert len(growths) == 3 + (2 if frozen else 4)
    assert found[1] == pytest.approx(found[0], rel=1e-9)


def test_the_gain_behind_a_checkpoint_is_the_slope() -> None:
    batches = perceptrons.data()
    dag = dagrow.trace(Blocks("reentrant").double(), batches[0][0][:2])
    for growth in dagrow.propose(dag, batches, mse_loss, [AddNeurons(k=2)]):
        testing.check_slope(growth)


def test_hooks_that_a_backward_pass_would_run() -> None:
    batches, stepped = perceptrons.data(), [0]
    model = Blocks("reentrant").double()
    dag = dagrow.trace(model, batches[0][0][:2])

    def step_in_backward(_: Tensor) -> None:
        stepped[0] += 1

    model.b.bias.register_post_accumulate_grad_hook(step_in_backward)
    with pytest.raises(LossError, match=r"b.bias carries hooks.*use_reentrant=False"):
        dagrow.propose(dag, batches, mse_loss)
    assert stepped == [0]


def test_a_loss_cut_from_the_model_is_not_blamed_on_a_checkpoint() -> None:
    batches = perceptrons.data()
    dag = dagrow.trace(Blocks("reentrant").double(), batches[0][0][:2])
    with pytest.raises(LossError, match=r"does not depend on the model.*without detach"):
        dagrow.propose(dag, batches, step=lambda model, batch: mse_loss(model(batch[0]).detach(), batch[1]))


def two_views(model: nn.Module, batch: Any) -> Tensor:
    return mse_loss(model(batch[0]), batch[1]) + mse_loss(model(-batch[0]), batch[1])


def test_several_calls_of_what_runs_again() -> None:
    batches, found = perceptrons.data(), []
    for kind in ("plain", "other"):
        dag = dagrow.trace(Blocks(kind).double(), batches[0][0][:2])
        growths = dagrow.propose(dag, batches, step=two_views, operators=[AddNeurons(k=2)])
        found.append({growth.where: growth.gain for growth in growths})
    assert found[1] == pytest.approx(found[0], rel=1e-9)
    dag = dagrow.trace(Blocks("reentrant").double(), batches[0][0][:2])
    with pytest.raises(LossError, match=r"called several times in a step.*use_reentrant=False"):
        dagrow.propose(dag, batches, step=two_views)


class Rounded(torch.autograd.Function):
    """Straight through: the gradient passes as if nothing had been rounded."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (8 * x).round() / 8

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def test_a_function_of_the_users_beside_a_target_without_a_graph_runs_nothing_again() -> None:
    """The model is called twice, once under no_grad(), which a checkpoint would do as well."""

    def step(model: nn.Module, batch: Any) -> Tensor:
        with torch.no_grad():
            target = model(-batch[0])
        return mse_loss(Rounded.apply(model(batch[0])), batch[1]) + mse_loss(model(batch[0]), target)

    batches = perceptrons.data()
    dag = dagrow.trace(Blocks("plain").double(), batches[0][0][:2])
    growths = dagrow.propose(dag, batches, step=step, operators=[AddNeurons(k=1)])
    assert len(growths) == 3
    assert all("detached or straight-through" in " ".join(growth.notes) for growth in growths)
