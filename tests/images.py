"""Awkward models with convolutions: drawn ones, from a short plan that prints, and fixed ones."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from zoo import KINKED, SMOOTH, mean_loss, sum_loss

from dagrow.testing import Case

CONVS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED: dict[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
BETWEEN = ("none", "batch", "instance", "group", "prelu", "depthwise", "grouped", "dropout")
RESIZED = ("none", "none", "max", "avg", "adaptive", "up", "bilinear", "pad", "shuffle")
WAYS = ("plain", "plain", "residual", "cat", "gate", "two_readers")


@dataclass(frozen=True)
class Kernel:
    """Hyper-parameters of one convolution, by dimension of space."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    mode: str = "zeros"
    bias: bool = True
    transposed: bool = False

    def layer(self, i: int, o: int) -> nn.Module:
        space = len(self.size)
        if self.transposed:
            return TRANSPOSED[space](i, o, self.size, self.stride, self.padding, dilation=self.dilation, bias=self.bias)
        return CONVS[space](i, o, self.size, self.stride, self.padding, self.dilation, 1, self.bias, self.mode)


@dataclass(frozen=True)
class Stage:
    """One convolution and what follows it."""

    kernel: Kernel
    width: int = 2
    activation: str = "Tanh"
    between: str = "none"
    resized: str = "none"
    way: str = "plain"


@dataclass(frozen=True)
class Plan:
    """A model, its data and its loss, from a seed."""

    stages: tuple[Stage, ...]
    space: int = 2
    image: tuple[int, ...] = (5, 4)
    channels: int = 2
    end: str = "mean"
    reduction: str = "mean"
    mode: str = "eval"
    seed: int = 0


class Part(nn.Module):
    """A stage: ``i`` channels in, ``o`` channels out."""

    def __init__(self, stage: Stage, i: int, space: int) -> None:
        super().__init__()
        w = 4 * stage.width if stage.resized == "shuffle" and space == 2 else 2 * stage.width
        self.up, self.way, self.o = stage.kernel.layer(i, w), stage.way, w
        self.between = self._between(stage.between, w, space)
        self.activation = getattr(nn, stage.activation)()
        self.resize = self._resize(stage.resized, space)
        if stage.resized == "shuffle" and space == 2:
            self.o = w // 4
        conv = CONVS[space]
        if self.way == "residual":
            self.inner, self.outer = conv(self.o, 2, 3, padding=1), conv(2, self.o, 3, padding=1, bias=False)
        if self.way == "gate":
            self.squeeze, self.excite = conv(self.o, 2, 1), conv(2, self.o, 1)
        if self.way == "two_readers":
            self.first, self.second = conv(self.o, 2, 1), conv(self.o, 2, 3, padding=1)
            self.o = 2
        self.o = 2 * self.o if self.way == "cat" else self.o

    @staticmethod
    def _between(kind: str, w: int, space: int) -> nn.Module:
        if kind in ("batch", "instance", "dropout"):
            name = {"batch": "BatchNorm", "instance": "InstanceNorm", "dropout": "Dropout"}[kind]
            layer = getattr(nn, f"{name}{space}d")
            return layer(0.5) if kind == "dropout" else layer(w, affine=True)
        if kind in ("depthwise", "grouped"):
            return CONVS[space](w, w, 3, padding=1, groups=w if kind == "depthwise" else w // 2)
        return {"group": lambda: nn.GroupNorm(w // 2, w), "prelu": lambda: nn.PReLU(w), "none": nn.Identity}[kind]()

    @staticmethod
    def _resize(kind: str, space: int) -> nn.Module:
        if kind == "shuffle":
            return nn.PixelShuffle(2) if space == 2 else nn.Identity()
        if kind == "bilinear":
            mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[space]
            return nn.Upsample(scale_factor=2, mode=mode, align_corners=False)
        return {
            "none": lambda: nn.Identity(),
            "max": lambda: getattr(nn, f"MaxPool{space}d")(2, ceil_mode=True),
            "avg": lambda: getattr(nn, f"AvgPool{space}d")(2, padding=1),
            "adaptive": lambda: getattr(nn, f"AdaptiveAvgPool{space}d")(2),
            "up": lambda: nn.Upsample(scale_factor=2),
            "pad": lambda: getattr(nn, f"ConstantPad{space}d")(1, 0.0),
        }[kind]()

    def forward(self, x: Tensor) -> Tensor:
        h = self.resize(self.activation(self.between(self.up(x))))
        if self.way == "residual":
            return h + self.outer(torch.tanh(self.inner(h)))
        if self.way == "gate":
            pooled = h.flatten(2).mean(2).view(*h.shape[:2], *[1] * (h.ndim - 2))
            return h * torch.sigmoid(self.excite(torch.tanh(self.squeeze(pooled))))
        if self.way == "two_readers":
            return torch.tanh(self.first(h)) + self.second(h)
        return torch.cat([h, h], 1) if self.way == "cat" else h


class Images(nn.Module):
    """Parts one after another, then a head on what is pooled or flattened."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        parts, i, x = [], plan.channels, torch.zeros(1, plan.channels, *plan.image)
        for stage in plan.stages:
            parts.append(Part(stage, i, plan.space).eval())
            x = parts[-1](x)
            i = parts[-1].o
        self.parts = nn.Sequential(*parts)
        self.flat = plan.end == "flatten" and x[0].numel() <= 20  # more would let the head follow any goal
        self.head = nn.Linear(x[0].numel() if self.flat else i, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.parts(x).flatten(2)
        return self.head(h.flatten(1) if self.flat else h.mean(2))


def stirred(model: nn.Module) -> nn.Module:
    """Norm layers with statistics and an affine part of their own."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            with torch.no_grad():
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_()
                if module.running_mean is not None:
                    module.running_mean.normal_(0, 0.3)
                    module.running_var.uniform_(0.5, 1.5)
    return model


def _tied(model: nn.Module, x: Tensor, training: bool) -> bool:
    """Whether some maximum is reached twice, as in windows that see the margins only: the loss has a kink there."""
    ties: list[bool] = []

    def compare(pool: Any, args: tuple[Tensor], output: Tensor) -> None:
        find = getattr(nn.functional, f"max_pool{args[0].ndim - 2}d")
        at = [
            find(h, 2, ceil_mode=True, return_indices=True)[1]
            for h in (args[0], args[0] + 1e-9 * torch.rand_like(args[0]))
        ]
        ties.append(not torch.equal(*at))

    pools = [m for m in model.modules() if isinstance(m, nn.modules.pooling._MaxPoolNd)]
    handles = [pool.register_forward_hook(compare) for pool in pools]
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model.train(training)(x)
    model.eval().load_state_dict(before)
    for handle in handles:
        handle.remove()
    return any(ties)


def built(plan: Plan) -> Case | None:
    """The case of a plan; None if its sizes do not fit, or if its loss has a kink where it is."""
    sizes = (9, 22)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        try:
            model = stirred(Images(plan)).double()
            model(torch.zeros(2, plan.channels, *plan.image).double())
        except (RuntimeError, ValueError):
            return None
        x = torch.randn(sum(sizes), plan.channels, *plan.image, dtype=torch.float64)
        y = torch.randn(sum(sizes), 2, dtype=torch.float64)
        if any(_tied(model, x, training) for training in (False, True)):
            return None
    loss = mean_loss if plan.reduction == "mean" else sum_loss
    return Case(model, list(zip(x.split(sizes), y.split(sizes), strict=True)), loss, plan.mode, repr(plan))


def kernels(space: int) -> st.SearchStrategy[Kernel]:
    def each(options: st.SearchStrategy[int]) -> st.SearchStrategy[tuple[int, ...]]:
        return st.tuples(*[options] * space)

    sizes, ones = each(st.integers(1, 3)), st.just((1,) * space)
    plain = st.builds(
        Kernel,
        sizes,
        each(st.sampled_from((1, 1, 2))),
        each(st.integers(0, 2)),
        each(st.sampled_from((1, 1, 2))),
        bias=st.booleans(),
    )
    moded = st.builds(
        Kernel,
        sizes,
        each(st.sampled_from((1, 1, 2))),
        each(st.integers(0, 1)),
        each(st.sampled_from((1, 2))),
        st.sampled_from(("reflect", "replicate", "circular")),
        st.booleans(),
    )
    named = st.builds(Kernel, sizes, ones, st.sampled_from(("same", "valid")), ones, bias=st.booleans())
    turned = st.builds(
        Kernel,
        sizes,
        each(st.integers(1, 2)),
        each(st.integers(0, 1)),
        each(st.integers(1, 2)),
        bias=st.booleans(),
        transposed=st.just(True),
    )
    return st.one_of(plain, plain, moded, named, turned)


@st.composite
def plans(draw: st.DrawFn, between: tuple[str, ...] = BETWEEN) -> Plan:
    """Plans of one or two stages."""
    space = draw(st.sampled_from((1, 2, 2, 3)))
    drawn = [
        Stage(
            draw(kernels(space)),
            draw(st.integers(1, 2)),
            draw(st.sampled_from(SMOOTH + KINKED)),
            draw(st.sampled_from(between)),
            draw(st.sampled_from(RESIZED)),
            draw(st.sampled_from(WAYS)),
        )
        for _ in range(draw(st.integers(1, 2)))
    ]
    image = tuple(draw(st.integers(2, 5 if space < 3 else 3)) for _ in range(space))
    return Plan(
        tuple(drawn),
        space,
        image,
        draw(st.integers(1, 2)),
        draw(st.sampled_from(("mean", "flatten"))),
        draw(st.sampled_from(("mean", "sum"))),
        seed=draw(st.integers(0, 999)),
    )
