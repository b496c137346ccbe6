"""Several calls of a model in one step, and rows of a sample wherever they lie."""

import re

import pytest
import torch
from arranged import STEPS, agree, check_slope, found, plain
from tokens import DOUBLE, Tokens, data
from torch import Tensor, nn
from torch.nn import functional

import dagrow
from dagrow.statistics import InputFeatures, Objective, OutputGoal, measure

OPERATORS = {
    "optimal": dagrow.AddNeurons(k=2),
    "random features": dagrow.AddNeurons(k=4, init="random_features"),
    "move": dagrow.MoveWeights(),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
@pytest.mark.parametrize("step", STEPS)
def test_a_sample_has_all_of_its_rows(step, operator: dagrow.Operator) -> None:
    growth = found(step, operator=operator)
    agree(growth, found(plain, operator=operator))
    check_slope(growth)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("step", STEPS)
def test_a_part_of_a_large_batch_is_enough_to_look_at(step, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dagrow.statistics._sample_order.PART", 8)
    agree(found(step, [data(3)]), found(plain, [data(3)]))


class Pooled(nn.Module):
    """Tokens of any number, pooled."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 3), nn.Linear(3, 2)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x))).mean(1)


def test_views_of_several_sizes_add_up() -> None:
    """Sums over calls, for each sample; samples count once."""
    x, y = torch.randn(24, 5, 4, dtype=DOUBLE), torch.randn(24, 2, dtype=DOUBLE)
    model = Pooled()

    def step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return sum(functional.mse_loss(model(view), y, reduction="sum") for view in (x, x[:, :2], x[:, 1:3])) / len(x)

    reads, goal = InputFeatures("b"), OutputGoal("b")
    pairs = [(reads, reads), (reads, goal), (goal, goal)]
    m = measure(dagrow.trace(model, x[:2]), Objective(model, [(x[:10], y[:10]), (x[10:], y[10:])], step=step), pairs)
    b, v = [], []
    for view in (x, x[:, :2], x[:, 1:3]):
        h = torch.tanh(model.a(view)).detach()
        b.append(torch.cat([h, torch.ones_like(h[..., :1])], -1).flatten(0, 1))
        a = model.b(h).detach().requires_grad_()
        v.append(-torch.autograd.grad((a.mean(1) - y).square().sum(), a)[0].flatten(0, 1))
    b, v = torch.cat(b), torch.cat(v)
    assert m.samples == 24
    assert m.positions[reads] == 9
    for pair, expected in zip(pairs, (b.T @ b, b.T @ v, v.T @ v), strict=True):
        torch.testing.assert_close(m[pair], expected / 24, rtol=1e-10, atol=1e-12)


def test_a_target_network_counts_for_the_loss_alone() -> None:
    """As if its outputs were given: calls that no gradient reaches leave no rows."""
    x, _ = data()
    model = Tokens()
    fixed = model(-x).detach()

    def bootstrapped(model: nn.Module, x: Tensor) -> Tensor:
        return functional.mse_loss(model(x), model(-x).detach())

    def given(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return functional.mse_loss(model(batch[0]), batch[1])

    agree(found(bootstrapped, list(x.split(30))), found(given, list(zip(x.split(30), fixed.split(30), strict=True))))


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 2)
        self.double()

    def trunk(self, x: Tensor) -> Tensor:
        return torch.tanh(self.b(torch.tanh(self.a(x))))

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.trunk(x))


def test_layers_that_are_called_in_different_numbers_do_not_meet() -> None:
    """What a layer reads in its first call need not be what the other wrote in its first call."""
    x, y = data(2)

    def step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return functional.mse_loss(model.c(model.trunk(x[:, 0]) - model.trunk(x[:, 1])), y[:, 0])

    dag, operators = dagrow.trace(Parts(), x[:2, 0]), [dagrow.AddNeurons(k=1)]
    growths = dagrow.propose(dag, [(x, y)], step=step, operators=operators)
    (note,) = growths.left_out
    assert re.match(r"b: .*different numbers on a batch \(b 2, c 1\).*Call the whole model", note)
    (alone,) = dagrow.propose(dag, [(x, y)], step=step, operators=[dagrow.AddNeurons(k=1, axes=["a"])])
    check_slope(alone)
