"""Awkward models with linear edges: drawn ones, from a short plan that prints, and fixed ones."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from dagrow import testing
from dagrow.statistics import Loss, Step
from dagrow.testing import Case

SMOOTH = ("Identity", "Tanh", "GELU", "SiLU", "Sigmoid", "Softplus")
KINKED = ("ReLU", "LeakyReLU", "SELU", "Hardtanh")
KINDS = ("dense", "residual", "cat_input", "cat_self", "two_readers", "gate", "scale", "view_literal", "view_live")
NORMS = ("none", "before", "after")


@dataclass(frozen=True)
class Stage:
    """One stage of a model: what it does, its width, activation, bias, norm and dropout."""

    kind: str = "dense"
    width: int = 3
    activation: str = "Tanh"
    bias: bool = True
    norm: str = "none"
    dropout: float = 0.0
    frozen: bool = False


@dataclass(frozen=True)
class Plan:
    """A model, its data and its loss, from a seed.

    Attributes:
        tokens: positions of the input, 0 for none.
        pool: how tokens end: "mean" or "flatten".
        reduction: whether the loss is a mean or a sum over samples.
        sizes: samples of each batch.
    """

    stages: tuple[Stage, ...]
    inputs: int = 3
    outputs: int = 2
    tokens: int = 0
    pool: str = "mean"
    bias: bool = True
    reduction: str = "mean"
    sizes: tuple[int, ...] = (9, 14)
    seed: int = 0
    mode: str = "eval"


def act(name: str) -> nn.Module:
    return getattr(nn, name)()


class Norm(nn.Module):
    """A BatchNorm over the channels, which are the last dimension, of activations with or without tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) if x.dim() == 2 else self.norm(x.transpose(1, 2)).transpose(1, 2)


class Part(nn.Module):
    """A stage: ``i`` channels in, ``o`` channels out."""

    def __init__(self, stage: Stage, i: int, given: int) -> None:
        super().__init__()
        w, self.kind = stage.width, stage.kind
        self.o = {"residual": i, "cat_input": w + given, "cat_self": 2 * w}.get(self.kind, w)
        up = {"gate": 2 * w, "view_literal": 4 * w, "view_live": 4 * w}.get(self.kind, w)
        self.up = nn.Linear(i, up, bias=stage.bias)
        self.between = nn.Sequential(
            Norm(up) if stage.norm == "before" else nn.Identity(),
            act(stage.activation),
            Norm(up) if stage.norm == "after" else nn.Identity(),
            nn.Dropout(stage.dropout),
        )
        if self.kind == "residual":
            self.down = nn.Linear(w, i, bias=stage.bias)
        if self.kind == "two_readers":
            self.first, self.second = nn.Linear(w, w, bias=stage.bias), nn.Linear(w, w)
        if self.kind in ("view_literal", "view_live"):
            self.token = nn.Linear(w, w, bias=stage.bias)
        if self.kind == "scale":
            self.scale, self.shift = nn.Parameter(torch.rand(w) + 0.5), nn.Parameter(torch.randn(w))
        self.width = w
        if stage.frozen:
            self.requires_grad_(False)

    def forward(self, x: Tensor, given: Tensor) -> Tensor:
        h = self.between(self.up(x))
        if self.kind == "residual":
            return x + self.down(h)
        if self.kind == "cat_input":
            return torch.cat([h, given], -1)
        if self.kind == "cat_self":
            return torch.cat([h, h], dim=-1)
        if self.kind == "two_readers":
            return functional.silu(self.first(h)) + self.second(h)
        if self.kind == "gate":
            value, gate = h.chunk(2, -1)
            return value * torch.sigmoid(gate)
        if self.kind == "scale":
            return h * self.scale + self.shift
        if self.kind == "view_literal":
            return torch.tanh(self.token(h.view(*h.shape[:-1], 4, self.width))).mean(-2)
        if self.kind == "view_live":
            return torch.tanh(self.token(h.reshape(*h.shape[:-1], -1, h.shape[-1] // 4))).mean(-2)
        return h


class Stack(nn.Module):
    """Parts one after another, then a head on pooled or flattened tokens."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.parts, i, self.pool = nn.ModuleList(), plan.inputs, plan.pool
        for stage in plan.stages:
            self.parts.append(Part(stage, i, plan.inputs))
            i = self.parts[-1].o
        flat = i * plan.tokens if plan.tokens and plan.pool == "flatten" else i
        self.head = nn.Linear(flat, plan.outputs, bias=plan.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for part in self.parts:
            h = part(h, x)
        if h.dim() == 3:
            h = h.mean(1) if self.pool == "mean" else h.flatten(1)
        return self.head(h)


def mean_loss(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().flatten(1).sum(1).mean() / 2


def sum_loss(output: Tensor, target: Tensor) -> Tensor:
    return functional.softplus(output - target).square().sum()


def through_a_step(loss: Loss) -> Step:
    return lambda model, batch: loss(model(batch[0]), batch[1])


def with_a_penalty(loss: Loss) -> Step:
    def step(model: nn.Module, batch: Any) -> Tensor:
        return loss(model(batch[0]), batch[1]) + 0.03 * sum(p.square().sum() for p in model.parameters())

    return step


def weighted(loss: Loss) -> Step:
    """Samples have weights of their own, as those of classes are."""

    def step(model: nn.Module, batch: Any) -> Tensor:
        weights = 0.5 + (batch[1].flatten(1)[:, 0] > 0).double()
        losses = (model(batch[0]) - batch[1]).square().flatten(1).sum(1)
        return (weights * losses).sum() / weights.sum()

    return step


STEPS = (None, through_a_step, with_a_penalty, weighted)


def stepping(law: testing.Law, case: Case, seed: int) -> Case:
    """For laws of slopes the case with another step, by its seed, or with none."""
    step = STEPS[seed % len(STEPS)] if law in (testing.slope, testing.descent) else None
    return case if step is None else dataclasses.replace(case, step=step(case.loss))


def stirred(model: nn.Module) -> nn.Module:
    """Norm layers with statistics and an affine part of their own."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            with torch.no_grad():
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_()
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 1.5)
    return model


def built(plan: Plan) -> Case:
    """The case of a plan."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        model = stirred(Stack(plan)).double()
        shape = (plan.tokens, plan.inputs) if plan.tokens else (plan.inputs,)
        x = torch.randn(sum(plan.sizes), *shape, dtype=torch.float64)
        y = torch.randn(sum(plan.sizes), plan.outputs, dtype=torch.float64)
    loss = mean_loss if plan.reduction == "mean" else sum_loss
    return Case(model, list(zip(x.split(plan.sizes), y.split(plan.sizes), strict=True)), loss, plan.mode, repr(plan))


def case_of(model: nn.Module, *shape: int, sizes: tuple[int, ...] = (9, 14), seed: int = 0) -> Case:
    """A case of any model on random numbers of a shape."""
    model = model.double()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        x = torch.randn(sum(sizes), *shape, dtype=torch.float64)
        y = torch.randn_like(model.eval()(x))
    return Case(model, list(zip(x.split(sizes), y.split(sizes), strict=True)), mean_loss)


@st.composite
def stages(draw: st.DrawFn, activations: tuple[str, ...], kinds: tuple[str, ...], norms: tuple[str, ...]) -> Stage:
    return Stage(
        draw(st.sampled_from(kinds)),
        draw(st.integers(1, 5)),
        draw(st.sampled_from(activations)),
        draw(st.booleans()),
        draw(st.sampled_from(norms)),
        draw(st.sampled_from((0.0, 0.5))),
        draw(st.sampled_from((False, False, True))),
    )


@st.composite
def plans(
    draw: st.DrawFn,
    activations: tuple[str, ...] = SMOOTH + KINKED,
    kinds: tuple[str, ...] = KINDS,
    norms: tuple[str, ...] = NORMS,
    depth: int = 3,
) -> Plan:
    """Plans of one to ``depth`` stages; at least one axis of each can grow."""
    drawn = draw(st.lists(stages(activations, kinds, norms), min_size=1, max_size=depth))
    return Plan(
        tuple(drawn),
        draw(st.integers(1, 4)),
        draw(st.integers(1, 3)),
        draw(st.sampled_from((0, 0, 1, 3))),
        draw(st.sampled_from(("mean", "flatten"))),
        draw(st.booleans()),
        draw(st.sampled_from(("mean", "sum"))),
        draw(st.sampled_from(((9, 14), (23,), (4, 4, 4, 11), (30, 10)))),
        draw(st.integers(0, 999)),
    )


# ---------------------------------------------------------------- fixed ones


class Twice(nn.Module):
    """A layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.last = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.last(torch.tanh(self.again(torch.tanh(self.again(h)))))


class Tied(nn.Module):
    """Two layers that share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.twin = nn.Linear(3, 3), nn.Linear(3, 3)
        self.twin.weight = self.inner.weight
        self.last = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.twin(torch.tanh(self.inner(x)))))


class Normed(nn.Module):
    """A LayerNorm, which mixes channels, between the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(self.up(x)))


class Stream(nn.Module):
    """A residual stream with several producers and several consumers at different depths."""

    def __init__(self, width: int = 4, hidden: int = 3, depth: int = 2) -> None:
        super().__init__()
        self.embed = nn.Linear(3, width)
        self.ups = nn.ModuleList(nn.Linear(width, hidden) for _ in range(depth))
        self.downs = nn.ModuleList(nn.Linear(hidden, width) for _ in range(depth))
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for up, down in zip(self.ups, self.downs, strict=True):
            h = h + down(functional.gelu(up(h)))
        return self.head(torch.tanh(h))


class Split(nn.Module):
    """``view`` with sizes written into it: features are split into tokens, and put together again."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.token, self.head = nn.Linear(3, 32), nn.Linear(8, 2), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.up(x)).view(-1, 4, 8)
        return self.head(torch.tanh(self.token(h)).flatten(1))


class TwoProducers(nn.Module):
    """The sum of two layers, read by three."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 4), nn.Linear(3, 4, bias=False)
        self.readers = nn.ModuleList(nn.Linear(4, 2, bias=bias) for bias in (True, False, True))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.sigmoid(self.left(x) + self.right(x.flip(-1)))
        return sum(reader(h) for reader in self.readers)
