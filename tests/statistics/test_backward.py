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


def test_a_layer_that_runs_twice_in_a_batch_is_noticed_beside_a_checkpoint() -> None:
    batches = perceptrons.data()
    dag = dagrow.trace(Blocks("other").double(), batches[0][0][:2])
    with pytest.raises(LossError, match="called several times"):
        dagrow.propose(dag, batches, step=lambda m, b: mse_loss(m(b[0]), b[1]) + mse_loss(m(-b[0]), b[1]))
