"""Whether a loss is a mean or a sum is found out from what the model returned, or by running it on a repeated batch."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from dagrow import LossError
from dagrow.statistics import Objective

X = torch.randn(12, 4, generator=torch.Generator().manual_seed(0)).double()


SIZES: set[int] = set()  #: of batches on which a model ran; what hangs on the model is left as it was


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 3).double(), nn.Linear(3, 4).double()

    def forward(self, x: Tensor, target: Tensor | None = None, reduction: str = "mean") -> Any:
        SIZES.add(len(x))
        output = self.b(torch.tanh(self.a(x)))
        if target is None:
            return output
        return {"logits": output, "loss": functional.mse_loss(output, target, reduction=reduction)}


def plain(model: Any, x: Tensor, reduction: str) -> Tensor:
    return functional.mse_loss(model(x), x, reduction=reduction)


def twice(model: Any, x: Tensor, reduction: str) -> Tensor:
    return functional.mse_loss(model(x), model(x * 2), reduction=reduction)


def in_place(model: Any, x: Tensor, reduction: str) -> Tensor:
    error = model(x).sub_(x).square()
    return error.mean() if reduction == "mean" else error.sum()


def flattened(model: Any, x: Tensor, reduction: str) -> Tensor:
    return functional.mse_loss(model(x).flatten(), x.flatten(), reduction=reduction)


def inside(model: Any, x: Tensor, reduction: str) -> Tensor:
    return model(x, x, reduction)["loss"]


def by_parts(model: Any, x: Tensor, reduction: str) -> Tensor:
    SIZES.add(len(x))
    return functional.mse_loss(model.b(torch.tanh(model.a(x))), x, reduction=reduction)


def differentiating(model: Any, x: Tensor, reduction: str) -> Tensor:
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return functional.mse_loss(slope, x, reduction=reduction)


REPLAYED = [plain, twice, in_place, flattened]
RERUN = [inside, by_parts, differentiating]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("step", [*REPLAYED, *RERUN])
def test_the_model_runs_on_other_sizes_only_where_its_outputs_do_not_tell(step: Any, reduction: str) -> None:
    SIZES.clear()
    objective = Objective(Net(), [X[:6], X[6:]], step=lambda network, x: step(network, x, reduction))
    assert objective.reduction == reduction
    assert ({6} if step in REPLAYED else {6, 12}) == SIZES


def test_a_batch_without_a_slope_does_not_tell() -> None:
    model = Net()
    still = model(X[:4]).detach()
    batches = [(X[:4], still), (X[4:8], X[4:8])]

    def summed(output: Tensor, target: Tensor) -> Tensor:
        return functional.mse_loss(output, target, reduction="sum")

    assert Objective(model, batches, summed).reduction == "sum"
    assert Objective(model, batches[:1], summed).reduction == "mean"  # nothing to be said of it


def fixed(model: Any, x: Tensor) -> Tensor:
    return (model(x).view(6, 4) - x.view(6, 4)).square().sum()


def test_what_cannot_be_told_is_asked_for() -> None:
    model, batches = Net(), [X[:6], X[6:]]
    with pytest.raises(LossError, match=r"cannot be computed for a batch that is repeated.*reduction="):
        Objective(model, batches, step=fixed).probe()
    assert Objective(model, batches, step=fixed, reduction="sum").mean() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_rounding_makes_no_difference(dtype: torch.dtype, reduction: str) -> None:
    model, x = Net().to(dtype), X.to(dtype)
    objective = Objective(model, [x], step=lambda network, batch: plain(network, batch, reduction))
    assert objective.reduction == reduction
