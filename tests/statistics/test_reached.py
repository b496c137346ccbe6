"""Modules that a step does not call as such are left as they were found, too."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import dagrow
from dagrow.statistics._reached import modules_reached

X = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))


class Metric(nn.Module):
    """Is updated, never called."""

    def __init__(self) -> None:
        super().__init__()
        self.sum, self.count = torch.zeros(()), 0

    def update(self, output: Tensor) -> None:
        self.sum = self.sum + output.detach().sum()
        self.count += 1


METRIC = Metric()
REGISTRY = {"metrics": [METRIC]}


def in_closure(metric: Metric) -> Callable[..., Any]:
    def step(model: nn.Module, batch: Any) -> Tensor:
        def updated(output: Tensor) -> Tensor:
            metric.update(output)
            return output

        return mse_loss(updated(model(batch[0])), batch[1])

    return step


def with_metric(model: nn.Module, batch: Any, *, metric: Metric) -> Tensor:
    output = model(batch[0])
    metric.update(output)
    return mse_loss(output, batch[1])


def by_a_global(model: nn.Module, batch: Any) -> Tensor:
    return with_metric(model, batch, metric=REGISTRY["metrics"][0])


class Trainer:
    """Not a module, and holds one."""

    def __init__(self, metric: Metric) -> None:
        self.parts = SimpleNamespace(metric=metric)

    def step(self, model: nn.Module, batch: Any) -> Tensor:
        return with_metric(model, batch, metric=self.parts.metric)

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        return self.step(model, batch)


STEPS: dict[str, Callable[[Metric], Any]] = {
    "closure": in_closure,
    "partial": lambda metric: partial(with_metric, metric=metric),
    "global": lambda metric: by_a_global,
    "method": lambda metric: Trainer(metric).step,
    "object": Trainer,
    "default": lambda metric: lambda model, batch, it=metric: with_metric(model, batch, metric=it),
}


@pytest.mark.parametrize("how", STEPS)
def test_what_is_reached_is_left_as_it_was_found(how: str) -> None:
    torch.manual_seed(0)
    model, step = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), STEPS[how](METRIC)
    assert METRIC in modules_reached(step)
    before = METRIC.sum
    dagrow.propose(dagrow.trace(model, X), [(X, X[:, :2])], step=step)
    assert METRIC.count == 0
    assert METRIC.sum is before


def test_an_endless_step_is_not_walked_to_its_end() -> None:
    chain: Any = nn.Linear(1, 1)
    for _ in range(3000):
        chain = [chain]
    assert modules_reached(partial(print, chain)) == []
    assert modules_reached(len) == []
