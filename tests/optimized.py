"""A small network in training, with every optimizer of torch that keeps state."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

import dagrow
from dagrow import AddNeurons

X = torch.randn(24, 5, generator=torch.Generator().manual_seed(0))
Y = torch.stack([X[:, 0] * X[:, 1], X[:, 2].abs()], 1)
BATCHES = [(X, Y)]
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9),
    "sgd-foreach": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, nesterov=True, foreach=True),
    "adam": lambda p: torch.optim.Adam(p, 0.01),
    "adam-amsgrad": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True),
    "adam-foreach": lambda p: torch.optim.Adam(p, 0.01, foreach=True),
    "adam-fused": lambda p: torch.optim.Adam(p, 0.01, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01),
    "adamax": lambda p: torch.optim.Adamax(p, 0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.01),
    "adadelta": lambda p: torch.optim.Adadelta(p, 0.1),
    "nadam": lambda p: torch.optim.NAdam(p, 0.01),
    "radam": lambda p: torch.optim.RAdam(p, 0.01),
    "rprop": lambda p: torch.optim.Rprop(p, 0.01),
    "asgd": lambda p: torch.optim.ASGD(p, 0.01),
}


def net(hidden: int = 3) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, hidden), nn.Tanh(), nn.Linear(hidden, 2))


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    functional.mse_loss(model(X), Y).backward()
    optimizer.step()


def grow(dag: Any, k: int = 2, **kwargs: Any) -> dagrow.Receipt:
    growth = dagrow.propose(dag, BATCHES, functional.mse_loss, [AddNeurons(k=k, init="zero")])[0]
    return growth.apply(1.0, **kwargs)


def trained(make: Callable[[Any], torch.optim.Optimizer], hidden: int = 3) -> Any:
    model = net(hidden)
    optimizer = make(model.parameters())
    step(model, optimizer)
    step(model, optimizer)
    return model, optimizer, dagrow.trace(model, X)
