"""Samples that belong together are one unit: in one fold, and of what is significant."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from arranged import ROWS, agree, batches, check_slope, found, plain
from tokens import N, Tokens, data
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import dagrow
from dagrow import BatchError
from dagrow.statistics import InputFeatures, Objective, OutputGoal, measure

KEYS = [f"subject {i}" for i in range(N) for _ in range(ROWS)]
OPERATORS = {"neurons": dagrow.AddNeurons(k=2), "move": dagrow.MoveWeights(), "connection": dagrow.AddConnection()}


def rows(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Each row a sample."""
    return batch[0].flatten(0, 1), batch[1].flatten(0, 1)


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
def test_rows_of_one_group_are_worth_one_sample(operator: dagrow.Operator) -> None:
    """In the same folds, with the same error, whether a subject is a sample of several rows or a group of samples."""
    x, y = rows(data(ROWS))
    sizes = [30, 7, 101, N * ROWS - 138]  # groups go on from batch to batch
    given = list(zip(x.split(sizes), y.split(sizes), strict=True))

    def at(groups: Any) -> dagrow.Growth:
        dag = dagrow.trace(Tokens(), x[:2])
        growths = dagrow.propose(dag, given, step=plain, operators=[operator], groups=groups)
        return next(growth for growth in growths if growth.where in ("one", "two", "x -> two"))

    model = Tokens()
    expected = dagrow.propose(dagrow.trace(model, data(ROWS)[0][:2]), batches(), step=plain, operators=[operator])
    growth = at(KEYS)
    agree(growth, next(each for each in expected if each.where == growth.where), ROWS)
    check_slope(growth)
    names = {row: key for row, key in zip(map(tuple, x.tolist()), KEYS, strict=True)}
    agree(at(lambda batch: [names[tuple(row)] for row in batch[0].tolist()]), growth)
    agree(at(torch.arange(N).repeat_interleave(ROWS)), growth)


def test_folds_are_those_of_groups() -> None:
    """Sums of each fold, by brute force; groups come and go."""
    x, y = rows(data(1))
    keys = [(7 * i) % 11 for i in range(N)]
    model, given = Tokens(), list(zip(x.split(25), y.split(25), strict=True))
    reads, goal = InputFeatures("two"), OutputGoal("two")
    objective = Objective(model, given, step=plain, groups=keys)
    m = measure(dagrow.trace(model, x[:2]), objective, [(reads, goal), (goal, goal)], folds=3)
    order = list(dict.fromkeys(keys))
    fold = torch.tensor([order.index(key) % 3 for key in keys])
    h = torch.tanh(model.one(x)).detach()
    b = torch.cat([h, torch.ones_like(h[:, :1])], 1)
    a = model.two(h).detach().requires_grad_()
    v = -torch.autograd.grad((model.three(torch.tanh(a)) - y).square().sum() / 2, a)[0]
    assert m.counts.tolist() == torch.bincount(fold).tolist()
    for f in range(3):
        torch.testing.assert_close(m.sums[reads, goal][f], b[fold == f].T @ v[fold == f], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(m.sums[goal, goal][f], v[fold == f].T @ v[fold == f], rtol=1e-10, atol=1e-12)


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 4, 3, stride=2), nn.Linear(4, 2)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))).mean((2, 3)))


@pytest.mark.parametrize("operator", [dagrow.AddNeurons(k=1), dagrow.MoveWeights()], ids=["neurons", "move"])
def test_groups_of_images(operator: dagrow.Operator) -> None:
    """Every image its own group is the same as none."""
    x, y = torch.randn(24, 2, 6, 6).double(), torch.randn(24, 2).double()
    dag, given = dagrow.trace(Images(), x[:2]), [(x[:14], y[:14]), (x[14:], y[14:])]

    def growths(groups: Any) -> dict[str, dagrow.Growth]:
        found = dagrow.propose(dag, given, functional.mse_loss, [operator], groups=groups)
        return {growth.where: growth for growth in found}

    plain = growths(None)
    for where, growth in growths(range(24)).items():
        agree(growth, plain[where])
    for growth in growths([i // 3 for i in range(24)]).values():
        assert growth.samples == 8
        check_slope(growth)


def test_groups_of_samples_with_several_calls() -> None:
    """The scores of a sample's calls and those of a group's samples are one sum."""

    def step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return (model(x[:, :1]) - y[:, :1]).square().sum() / len(x) + (model(x[:, 1:]) - y[:, 1:]).square().sum() / len(
            x
        )

    single = found(step, groups=list(range(N)))
    agree(single, found(step))
    assert found(step, groups=[i // 2 for i in range(N)]).samples == N // 2


X, Y = data(1)
GIVEN = [(X[:50], Y[:50]), (X[50:], Y[50:])]
LOADER = TensorDataset(X, Y)
SHUFFLING = DataLoader(LOADER, 30, shuffle=True)
WRONG: dict[str, tuple[Any, Any, str]] = {
    "too few": (GIVEN, [0] * 80, "holds 80 keys, 30 of them for the 40 samples after the first 50"),
    "too many": (GIVEN, list(range(100)), "holds 100 keys for 90 samples"),
    "fewer than folds": (GIVEN, [i % 3 for i in range(N)], "3 groups of samples for 4 folds"),
    "a loader that shuffles": (SHUFFLING, list(range(N)), "order of a RandomSampler.*function"),
    "a function of too few": (GIVEN, lambda batch: [0], r"groups\(batch\) returned 1 keys for a batch of 50 samples"),
    "keys that are none": (GIVEN, [[i] for i in range(N)], "cannot be told from others"),
}


@pytest.mark.parametrize(("given", "groups", "message"), WRONG.values(), ids=WRONG)
def test_keys_that_do_not_fit(given: Any, groups: Any, message: str) -> None:
    model = Tokens()
    with pytest.raises(BatchError, match=message):
        dagrow.propose(dagrow.trace(model, X[:2]), given, step=plain, operators=[dagrow.AddNeurons(k=1)], groups=groups)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("groups", [list(range(N)), lambda batch: batch[0][:, 0, 0].tolist()], ids=["list", "function"])
def test_loaders_that_go(groups: list[int] | Callable[[Any], Any]) -> None:
    loader = DataLoader(LOADER, 30, shuffle=callable(groups))
    dag, operators = dagrow.trace(Tokens(), X[:2]), [dagrow.AddNeurons(k=1)]
    assert dagrow.propose(dag, loader, step=plain, operators=operators, groups=groups)[0].samples == N
