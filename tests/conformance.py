"""Small modules, one for each special case: what writes the width in question is called ``a``."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils.checkpoint
from einops import rearrange, reduce, repeat
from einops.layers.torch import Rearrange
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["CASES", "Case"]


@dataclass
class Case:
    """A module and what is to become of the axes that its layers write.

    Attributes:
        grows: layers whose width grows.
        refuses: layer -> what the reason says that it does not.
        shape: of one sample.
    """

    forward: Callable[..., Any]
    modules: Callable[[], dict[str, Any]]
    grows: tuple[str, ...] = ("a",)
    refuses: dict[str, str] = field(default_factory=dict)
    shape: tuple[int, ...] = (6,)
    integers: bool = False

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return Made(self.forward, self.modules()).double().eval()

    def inputs(self, batch: int) -> Tensor:
        torch.manual_seed(batch)
        if self.integers:
            return torch.randint(5, (batch, *self.shape))
        return torch.randn(batch, *self.shape, dtype=torch.float64)


class Made(nn.Module):
    def __init__(self, forward: Callable[..., Any], parts: dict[str, Any]) -> None:
        super().__init__()
        self._made_forward = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Any:
        return self._made_forward(self, x)


def linear(*, width: int = 8, last: int = 8, **more: Any) -> Callable[[], dict[str, Any]]:
    """``a`` from 6 to ``width``, ``b`` from ``last`` to 3, and what else is given, made anew each time."""
    return lambda: {"a": nn.Linear(6, width), "b": nn.Linear(last, 3), **{name: part() for name, part in more.items()}}


def conv(*, width: int = 8, last: int = 8, **more: Any) -> Callable[[], dict[str, Any]]:
    """The same for images with 3 channels; ``b`` is a convolution too."""
    return lambda: {
        "a": nn.Conv2d(3, width, 3, padding=1),
        "b": nn.Conv2d(last, 2, 1),
        **{n: part() for n, part in more.items()},
    }


def pointwise(function: Callable[[Tensor], Tensor], **more: Any) -> Case:
    return Case(lambda m, x: m.b(function(m.a(x))), linear(), **more)


def between(function: Callable[[Any, Tensor], Tensor], modules: Callable[[], dict[str, Any]], **more: Any) -> Case:
    return Case(lambda m, x: m.b(function(m, m.a(x))), modules, **more)


IMAGE: dict[str, Any] = {"shape": (3, 6, 6)}
TOKENS: dict[str, Any] = {"shape": (5, 6)}


class Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient * 2


def heads(x: Tensor, h: int) -> Tensor:
    return x.view(*x.shape[:2], h, -1).transpose(1, 2)


def merged(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def attention(*, keys: int = 8) -> Callable[[], dict[str, Any]]:
    return lambda: {"q": nn.Linear(6, 8), "k": nn.Linear(6, keys), "v": nn.Linear(6, keys), "o": nn.Linear(8, 3)}


def stated_heads(m: Any, x: Tensor) -> Tensor:
    b, t, _ = x.shape
    q, k, v = (part(x).view(b, t, m.heads, 4).transpose(1, 2) for part in (m.q, m.k, m.v))
    h = m.o(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, -1))
    return m.b(m.a(h).view(b, t, 2, 4).relu().flatten(2))


def softmaxed(m: Any, x: Tensor) -> Tensor:
    q, k, v = (heads(part(x), 2) for part in (m.q, m.k, m.v))
    return m.o(merged((q @ k.transpose(-1, -2) / 2).softmax(-1) @ v))


def fused(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.a(x).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
    return m.b(merged(functional.scaled_dot_product_attention(q, k, v)))


def rotary(m: Any, x: Tensor) -> Tensor:
    q, k, v = (heads(part(x), 2) for part in (m.q, m.k, m.v))
    angle = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * m.frequency
    cos, sin = (torch.cat([f, f], -1) for f in (angle.cos(), angle.sin()))
    q, k = (t * cos + torch.cat([-t[..., 2:], t[..., :2]], -1) * sin for t in (q, k))
    return m.o(merged(functional.scaled_dot_product_attention(q, k, v)))


def windowed(m: Any, x: Tensor) -> Tensor:
    def cut(h: Tensor) -> Tensor:
        h = torch.roll(h, (1, 1), (2, 3)).permute(0, 2, 3, 1)
        b, height, width, c = h.shape
        return h.view(b, height // 3, 3, width // 3, 3, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 9, c)

    b, _, height, width = x.shape
    h = (cut(m.q(x)) @ cut(m.k(x)).transpose(1, 2)).softmax(-1) @ cut(m.a(x))
    h = h.view(b, height // 3, width // 3, 3, 3, -1).permute(0, 1, 3, 2, 4, 5).reshape(b, height, width, -1)
    return m.b(h.permute(0, 3, 1, 2))


def experts(m: Any, x: Tensor) -> Tensor:
    gates = m.gate(x).softmax(-1)
    return sum(gates[:, i : i + 1] * m.second[i](m.first[i](x).relu()) for i in range(2))  # type: ignore[return-value]


def gated(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    return m.b(h * torch.sigmoid(m.up(functional.relu(m.down(h.mean((2, 3), keepdim=True))))))


def set_item(m: Any, h: Tensor) -> Tensor:
    h = h.clone()
    h[:, 0] = 0
    return h


def in_place(m: Any, h: Tensor) -> Tensor:
    h = h.relu_() * 2
    h += 1
    return h.mul_(2)


CASES: dict[str, Case] = {
    # ---- pointwise, in place, scalars
    "relu": pointwise(torch.relu),
    "gelu of a doubled width": pointwise(lambda h: functional.gelu(h) * 2 + 1),
    "in place": between(in_place, linear()),
    "clamp and where": pointwise(lambda h: torch.where(h > 0, h, h.clamp(-1, 0))),
    "dropout": pointwise(lambda h: functional.dropout(h, 0.5, False)),
    "checkpoint": between(lambda m, h: torch.utils.checkpoint.checkpoint(torch.tanh, h, use_reentrant=False), linear()),
    "custom function": between(lambda m, h: Scale.apply(h), linear()),
    "named outputs": Case(lambda m, x: {"out": m.b(m.a(x)), "more": (x, 1)}, linear()),
    # ---- direct parameters and functions called with them
    "functional linear": Case(
        lambda m, x: functional.linear(functional.linear(x, m.a, m.bias).relu(), m.b),
        lambda: {
            "a": nn.Parameter(torch.randn(8, 6)),
            "bias": nn.Parameter(torch.randn(8)),
            "b": nn.Parameter(torch.randn(3, 8)),
        },
    ),
    "matmul with a parameter": Case(
        lambda m, x: (x @ m.a).relu() @ m.b,
        lambda: {"a": nn.Parameter(torch.randn(6, 8)), "b": nn.Parameter(torch.randn(8, 3))},
    ),
    "parameters on the left": Case(
        lambda m, x: (m.b @ (m.a @ x.transpose(1, 2)).relu()).mean(2),
        lambda: {"a": nn.Parameter(torch.randn(8, 6)), "b": nn.Parameter(torch.randn(3, 8))},
        **TOKENS,
    ),
    "transposed parameters on the left": Case(
        lambda m, x: torch.matmul(m.b.t(), (m.a.T @ x.mT).relu()).flatten(1),
        lambda: {"a": nn.Parameter(torch.randn(6, 8)), "b": nn.Parameter(torch.randn(8, 3))},
        **TOKENS,
    ),
    "parameters on both sides": Case(
        lambda m, x: m.b @ ((m.a @ x.mT).relu() @ m.mixed),
        lambda: {
            "a": nn.Parameter(torch.randn(8, 6)),
            "b": nn.Parameter(torch.randn(3, 8)),
            "mixed": nn.Parameter(torch.randn(5, 4)),
        },
        grows=(),
        refuses={"a": "beside the features"},
        **TOKENS,
    ),
    "depthwise convolution over all channels that there are": Case(
        lambda m, x: m.b(
            functional.conv2d(h := m.a(x), m.d.weight, m.d.bias, padding=m.d.weight.shape[-1] // 2, groups=h.shape[1])
        ),
        conv(d=lambda: nn.Conv2d(8, 8, 3, groups=8)),
        **IMAGE,
    ),
    "width of a weight as a number": Case(
        lambda m, x: m.b(functional.conv2d(h := m.a(x), m.d.weight, groups=h.shape[1]) * m.d.weight.shape[0]),
        conv(d=lambda: nn.Conv2d(8, 8, 3, groups=8, bias=False)),
        grows=(),
        refuses={"a": "also used elsewhere"},
        **IMAGE,
    ),
    "weights without their thin dimension": Case(
        lambda m, x: m.b(functional.conv2d(h := m.a(x), m.d.weight.squeeze(1).unsqueeze(1), groups=h.size(1))),
        conv(d=lambda: nn.Conv2d(8, 8, 3, groups=8, bias=False)),
        **IMAGE,
    ),
    "addmm": Case(
        lambda m, x: torch.addmm(m.bias, torch.addmm(m.start, x, m.a).relu(), m.b),
        lambda: {
            "a": nn.Parameter(torch.randn(6, 8)),
            "start": nn.Parameter(torch.randn(8)),
            "b": nn.Parameter(torch.randn(8, 3)),
            "bias": nn.Parameter(torch.randn(3)),
        },
    ),
    "functional convolution with groups": Case(
        lambda m, x: functional.conv2d(functional.conv2d(functional.conv2d(x, m.a), m.depth, groups=8), m.b),
        lambda: {
            "a": nn.Parameter(torch.randn(8, 3, 3, 3)),
            "depth": nn.Parameter(torch.randn(8, 1, 3, 3)),
            "b": nn.Parameter(torch.randn(2, 8, 1, 1)),
        },
        **IMAGE,
    ),
    "a channel in each group": Case(
        lambda m, x: m.b(m.n((m.c(m.a(x)).relu() + 1).mean((2, 3)))),
        lambda: {
            "a": nn.Conv2d(6, 8, 1, groups=2),
            "c": nn.Conv2d(8, 4, 3, groups=2, padding=1),
            "n": nn.LayerNorm(4),
            "b": nn.Linear(4, 3),
        },
        shape=(6, 5, 5),
    ),
    "groups of different sizes": Case(
        lambda m, x: m.b(m.n(m.c(m.d(m.a(x)).relu()).mean((2, 3)))),
        lambda: {
            "a": nn.Conv2d(6, 8, 1, groups=2),
            "d": nn.Conv2d(8, 8, 3, groups=4),
            "c": nn.Conv2d(8, 4, 1),
            "n": nn.LayerNorm(4),
            "b": nn.Linear(4, 3),
        },
        grows=("a", "d"),
        shape=(6, 5, 5),
    ),
    "functional group norm": between(
        lambda m, h: functional.group_norm(h, m.n.num_groups, m.n.weight, m.n.bias),
        conv(n=lambda: nn.GroupNorm(4, 8)),
        **IMAGE,
    ),
    "data of an activation": between(lambda m, h: h.data * h, linear()),
    "functional batch norm": between(
        lambda m, h: functional.batch_norm(h, m.n.running_mean, m.n.running_var, m.n.weight, m.n.bias),
        conv(n=lambda: nn.BatchNorm2d(8)),
        **IMAGE,
    ),
    "a scale and a shift": between(
        lambda m, h: h * m.scale + m.shift,
        linear(scale=lambda: nn.Parameter(torch.rand(8)), shift=lambda: nn.Parameter(torch.rand(8))),
    ),
    "layer scale behind a permute": between(
        lambda m, h: (h.permute(0, 2, 3, 1) * m.scale).permute(0, 3, 1, 2),
        conv(scale=lambda: nn.Parameter(torch.rand(8))),
        **IMAGE,
    ),
    "a width computed with": between(lambda m, h: h * h.shape[-1] ** -0.5, linear()),
    "a stated width computed with": between(lambda m, h: h / m.a.out_features, linear()),
    "a stated width viewed": between(
        lambda m, h: h.view(-1, m.width).relu(),
        lambda: {**linear()(), "width": 8},
    ),
    # ---- cat, chunk, slices, shuffles
    "cat with itself": between(lambda m, h: torch.cat([h, h.relu()], 1), linear(last=16)),
    "cat with the input": Case(lambda m, x: m.b(torch.cat([m.a(x), x], 1)), linear(last=14)),
    "dense block": Case(
        lambda m, x: m.b(torch.cat([x, m.a(x), m.c(torch.cat([x, m.a(x)], 1))], 1)),
        linear(last=18, c=lambda: nn.Linear(14, 4)),
        grows=("a", "c"),
    ),
    "every transpose": Case(
        lambda m, x: m.b((m.a(x) @ m.w.T).mm(m.w.t()) @ m.v.transpose(-2, -1)),
        linear(w=lambda: nn.Parameter(torch.randn(8, 8)), v=lambda: nn.Parameter(torch.randn(8, 8))),
        grows=("a", "w", "v"),
    ),
    "a weight and its transpose": Case(
        lambda m, x: m.b((m.a(x) @ m.w).relu() @ m.w.T),
        linear(w=lambda: nn.Parameter(torch.randn(8, 8))),
        grows=(),
        refuses={"a": "w is also used elsewhere"},
    ),
    "one weight with two biases": Case(
        lambda m, x: m.b(functional.linear(h := m.a(x), m.w, m.p).relu() + functional.linear(h, m.w, m.q)),
        linear(**{n: lambda n=n: nn.Parameter(torch.randn(*([8, 8] if n == "w" else [8]))) for n in "wpq"}),
        grows=(),
        refuses={"a": "w is also used elsewhere"},
    ),
    "roots of scales": between(
        lambda m, h: h / m.s.abs().sqrt() * torch.rsqrt(m.t),
        linear(s=lambda: nn.Parameter(torch.rand(8) + 1), t=lambda: nn.Parameter(torch.rand(8) + 1)),
    ),
    "a sum over constants as wide": between(
        lambda m, h: h / torch.ones_like(h).sum(-1, keepdim=True),
        linear(),
        grows=(),
        refuses={"a": "takes all channels together"},
    ),
    "a constant of the width": between(
        lambda m, h: h / torch.full((1,), h.shape[-1]),
        linear(),
        grows=(),
        refuses={"a": "used as a number"},
    ),
    "a stated number of two meanings": between(
        lambda m, h: (h.view(-1, m.n, 4) * m.n).flatten(1),
        lambda: {**linear()(), "n": 2},
    ),
    "types of other tensors": Case(lambda m, x: m.b(m.a(x).type_as(x).to(x)), linear()),
    "mean along an axis": Case(lambda m, x: m.b(m.a(x).mean(axis=1)), linear(), **TOKENS),
    "cut by a list of widths": Case(
        lambda m, x: (lambda p, q: m.b(torch.cat([m.c(p), m.d(q)], 1)))(*m.a(x).split(m.widths, -1)),
        lambda: {**linear(c=lambda: nn.Linear(5, 4), d=lambda: nn.Linear(3, 4))(), "widths": [5, 3]},
        grows=("a", "c", "d"),
    ),
    "cut off at a stated width": Case(
        lambda m, x: m.b(torch.cat([h := m.a(x), m.c(h)], 1)[:, : m.width]),
        lambda: {**linear(last=16, c=lambda: nn.Linear(8, 8))(), "width": 16},
        grows=("a", "c"),
    ),
    "largest over positions": Case(lambda m, x: m.b(m.a(x).max(1)[0]), linear(), **TOKENS),
    "largest over positions, by name": Case(lambda m, x: m.b(torch.max(m.a(x), dim=1).values), linear(), **TOKENS),
    "largest over channels": Case(
        lambda m, x: m.b((h := m.a(x)) * h.max(-1, keepdim=True)[0]),
        linear(),
        grows=(),
        refuses={"a": "max mixes channels"},
        **TOKENS,
    ),
    "larger of two": between(lambda m, h: torch.max(h, h.tanh()), linear()),
    "sums so far": Case(lambda m, x: m.b(m.a(x).cumsum(1)), linear(), **TOKENS),
    "norm over positions": Case(lambda m, x: m.b(torch.linalg.vector_norm(m.a(x), dim=1)), linear(), **TOKENS),
    "unit length": between(
        lambda m, h: functional.normalize(h, dim=-1), linear(), grows=(), refuses={"a": "normalize mixes all channels"}
    ),
    "unit length over positions": Case(lambda m, x: m.b(functional.normalize(m.a(x), dim=1)), linear(), **TOKENS),
    "glu": between(lambda m, h: functional.glu(h, -1), linear(width=16)),
    "glu over channels of images": between(lambda m, h: m.g(h), conv(width=16, g=lambda: nn.GLU(1)), **IMAGE),
    "spread over positions": Case(lambda m, x: m.b(m.a(x).std(1)), linear(), **TOKENS),
    "gated by halves": between(lambda m, h: torch.mul(*h.chunk(2, -1)), linear(width=16)),
    "cut into parts that are not even": Case(
        lambda m, x: sum(layer(part) for layer, part in zip((m.b, m.c, m.d), m.a(x).chunk(3, -1), strict=True)),
        linear(last=3, c=lambda: nn.Linear(3, 3), d=lambda: nn.Linear(2, 3)),
        grows=(),
        refuses={"a": "uneven parts"},
    ),
    "one of two halves": Case(
        lambda m, x: m.b(h := m.a(x)) + m.c(h.chunk(2, 1)[0]),
        linear(c=lambda: nn.Linear(4, 3)),
    ),
    "parts by keyword": Case(
        lambda m, x: m.b(torch.chunk(m.a(x), chunks=3, dim=-1)[2]),
        linear(last=2),
        grows=(),
        refuses={"a": "uneven parts"},
    ),
    "halves that are counted": Case(
        lambda m, x: m.b((h := m.a(x))[:, : h.shape[1] // 2]) + m.c(h[:, h.shape[1] // 2 :]),
        linear(last=4, c=lambda: nn.Linear(4, 3)),
        grows=(),
        refuses={"a": "rounded"},
    ),
    "a buffer as a weight": Case(
        lambda m, x: m.b((m.a(x) @ m.s.running_mean.view(4, 4)).relu()),
        linear(width=4, last=4, s=lambda: nn.BatchNorm1d(16)),
        grows=(),
        refuses={"a": "summed over|no rule"},
    ),
    "a matrix that is not transposed": Case(
        lambda m, x: m.b(m.a(x) @ m.w.permute(0, 1)),
        linear(last=5, w=lambda: nn.Parameter(torch.randn(8, 5))),
        grows=(),
        refuses={"a": "summed over|no rule"},
    ),
    "a row that came and went": Case(
        lambda m, x: m.b(functional.linear(x, m.a.squeeze(0).unsqueeze(0))),
        lambda: {"a": nn.Parameter(torch.randn(1, 6)), "b": nn.Linear(1, 3)},
        grows=(),
    ),
    "as many groups as channels, of one": Case(
        lambda m, x: m.b(functional.conv2d(h := m.a(x), m.w, groups=h.shape[1])),
        conv(width=1, last=1, w=lambda: nn.Parameter(torch.randn(1, 1, 3, 3))),
        grows=(),
        refuses={"a": "no rule"},
        **IMAGE,
    ),
    "one bias for all": Case(
        lambda m, x: m.b(torch.addmm(m.one, x, m.a)),
        lambda: {"a": nn.Parameter(torch.randn(6, 8)), "one": nn.Parameter(torch.randn(1)), "b": nn.Linear(8, 3)},
        grows=(),
    ),
    "filled with the width": Case(
        lambda m, x: m.b((h := m.a(x)) / h.new_full((1,), h.shape[1])),
        linear(),
        grows=(),
        refuses={"a": "number"},
    ),
    "a product of constants": Case(
        lambda m, x: m.b((h := m.a(x)) / (torch.ones(1, h.shape[1]).to(h) @ torch.ones(h.shape[1], 1).to(h))),
        linear(),
        grows=(),
        refuses={"a": "takes all channels together"},
    ),
    "the width is an output": Case(
        lambda m, x: (m.b(h := m.a(x)), h.shape[1]),
        linear(),
        grows=(),
        refuses={"a": "given out"},
    ),
    "positions counted by the input": Case(
        lambda m, x: m.b(m.a(x) + m.c(torch.arange(x.shape[1]).to(x)[:, None])),
        linear(c=lambda: nn.Linear(1, 8)),
        grows=("a", "c"),
        **TOKENS,
    ),
    "silu of one half": between(lambda m, h: functional.silu(h[..., :8]) * h[..., 8:], linear(width=16)),
    "every other channel": between(lambda m, h: h[..., ::2] * h[..., 1::2], linear(width=16)),
    "two projections": Case(
        lambda m, x: m.b(functional.silu(m.a(x)) * m.up(x)),
        linear(up=lambda: nn.Linear(6, 8)),
        grows=("a", "up"),
    ),
    "split of one": between(lambda m, h: h.split([3, 5], -1)[0].repeat(1, 2), linear(last=6), grows=("a",)),
    "unbind": between(lambda m, h: sum(h.view(-1, 2, 8).unbind(1)), linear(width=16)),
    "channel shuffle": between(
        lambda m, h: h.view(h.shape[0], 2, -1, 6, 6).transpose(1, 2).flatten(1, 2),
        conv(),
        **IMAGE,
    ),
    "torch's channel shuffle": between(
        lambda m, h: functional.channel_shuffle(h, 2), conv(), grows=(), refuses={"a": "does not follow"}, **IMAGE
    ),
    "pixel shuffle": between(lambda m, h: functional.pixel_shuffle(h, 2), conv(last=2), **IMAGE),
    "flip": between(lambda m, h: h.flip(1), linear()),
    "roll": between(lambda m, h: h.roll(1, 1), linear(), grows=(), refuses={"a": "order|other channels|apart"}),
    "repeat": between(lambda m, h: h.repeat(1, 3), linear(last=24)),
    "repeat interleave": between(lambda m, h: h.repeat_interleave(3, 1), linear(last=24)),
    "index": between(lambda m, h: h[:, torch.arange(7, -1, -1)], linear(), grows=(), refuses={"a": "no rule"}),
    "set item": between(set_item, linear(), grows=(), refuses={"a": "setitem"}),
    # ---- layouts
    "flatten of an image": Case(
        lambda m, x: m.b(m.a(x).relu().flatten(1)),
        lambda: {"a": nn.Conv2d(3, 4, 3, padding=1), "b": nn.Linear(144, 3)},
        **IMAGE,
    ),
    "flatten of channels last": Case(
        lambda m, x: m.b(m.a(x).permute(0, 2, 3, 1).flatten(1)),
        lambda: {"a": nn.Conv2d(3, 4, 3, padding=1), "b": nn.Linear(144, 3)},
        **IMAGE,
    ),
    "channels last and a linear layer": Case(
        lambda m, x: m.b(m.a(x).permute(0, 2, 3, 1)),
        lambda: {"a": nn.Conv2d(3, 4, 3, padding=1), "b": nn.Linear(4, 3)},
        **IMAGE,
    ),
    "einops": between(
        lambda m, h: reduce(rearrange(h, "b c h w -> b h w c"), "b h w c -> b c", "mean"),
        lambda: {"a": nn.Conv2d(3, 8, 3), "b": nn.Linear(8, 2)},
        **IMAGE,
    ),
    "einops repeats": between(lambda m, h: repeat(h, "b c -> b (c r)", r=2), linear(last=16)),
    "einops layer": between(
        lambda m, h: m.tokens(h),
        lambda: {"a": nn.Conv2d(3, 8, 3), "tokens": Rearrange("b c h w -> b (h w) c"), "b": nn.Linear(8, 2)},
        **IMAGE,
    ),
    "unflatten and flatten": between(lambda m, h: h.unflatten(1, (2, 4)).relu().flatten(1), linear()),
    # ---- reductions and norms
    "mean over positions": Case(lambda m, x: m.b(m.a(x).mean(1)), linear(), **TOKENS),
    "mean over channels": between(
        lambda m, h: h - h.mean(-1, keepdim=True), linear(), grows=(), refuses={"a": "mean mixes channels"}
    ),
    "layer norm": between(
        lambda m, h: m.n(h),
        linear(n=lambda: nn.LayerNorm(8)),
        grows=(),
        refuses={"a": "LayerNorm .*mixes all channels"},
    ),
    "rms norm": between(lambda m, h: functional.rms_norm(h, (8,)), linear(), grows=(), refuses={"a": "rms_norm mixes"}),
    "softmax over channels": between(lambda m, h: h.softmax(-1), linear(), grows=(), refuses={"a": "softmax mixes"}),
    "group norm": between(lambda m, h: m.n(h), conv(n=lambda: nn.GroupNorm(2, 8)), **IMAGE),
    "batch norm": between(lambda m, h: m.n(h).relu(), conv(n=lambda: nn.BatchNorm2d(8)), **IMAGE),
    "sorted channels": between(lambda m, h: h.sort(-1).values, linear(), grows=(), refuses={"a": "sort has no rule"}),
    "cumulated channels": between(
        lambda m, h: h.cumsum(-1), linear(), grows=(), refuses={"a": "cumsum mixes all channels"}
    ),
    # ---- several places
    "residual of the input": Case(
        lambda m, x: m.b(x + m.a(x)), linear(width=6, last=6), grows=(), refuses={"a": "input of the model"}
    ),
    "residual": Case(
        lambda m, x: m.b((h := m.a(x)) + m.up(m.down(h).relu())),
        linear(down=lambda: nn.Linear(8, 4), up=lambda: nn.Linear(4, 8)),
        grows=("a", "down"),
    ),
    "called twice": Case(
        lambda m, x: m.b(m.c(m.c(m.a(x)).relu())),
        linear(c=lambda: nn.Linear(8, 8)),
        grows=("a", "c"),
    ),
    "block called twice": Case(
        lambda m, x: m.b((h := m.tanh(m.a(x)) + m.down(m.up(m.a(x)).relu())) + m.down(m.up(h).relu())),
        linear(up=lambda: nn.Linear(8, 5), down=lambda: nn.Linear(5, 8), tanh=nn.Tanh),
        grows=("a", "down", "up"),
    ),
    "called on an activation and a constant": Case(
        lambda m, x: m.b(m.c(m.a(x)) + m.c(x.new_ones(1, 8))),
        linear(c=lambda: nn.Linear(8, 8)),
        grows=("c",),
        refuses={"a": "do not arrive at c"},
    ),
    "a constant as wide": between(lambda m, h: h * torch.ones(h.shape[-1]) + torch.zeros_like(h), linear()),
    "a constant that a layer reads": between(
        lambda m, h: h + m.c(torch.ones(1, h.shape[-1], dtype=h.dtype)),
        linear(c=lambda: nn.Linear(8, 8)),
        grows=(),
        refuses={"a": "beside the features"},
    ),
    "channels of zeros": Case(
        lambda m, x: m.b(torch.cat([h := m.a(x), h.new_zeros(h.shape[0], 4)], 1) + m.c(x)),
        linear(last=12, c=lambda: nn.Linear(6, 12)),
        grows=("a",),
    ),
    "shared weight": Case(
        lambda m, x: m.b(m.a(x).relu() + m.twin(x)),
        lambda: (lambda a, b, twin: (setattr(twin, "weight", a.weight), {"a": a, "b": b, "twin": twin})[1])(
            nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(6, 8)
        ),
        grows=(),
        refuses={"a": "shared with"},
    ),
    "tied embedding": Case(
        lambda m, x: functional.linear(m.up(m.a(m.table(x)).relu()), m.table.weight),
        lambda: {"table": nn.Embedding(5, 6), "a": nn.Linear(6, 8), "up": nn.Linear(8, 6)},
        refuses={"up": "also used elsewhere"},
        shape=(4,),
        integers=True,
    ),
    "recurrent": between(
        lambda m, h: m.r(h)[0],
        lambda: {**linear(last=4)(), "r": nn.LSTM(8, 4, batch_first=True)},
        grows=(),
        refuses={"a": "LSTM .*is recurrent"},
        **TOKENS,
    ),
    "output": Case(lambda m, x: m.a(x), linear(), grows=(), refuses={"a": "output of the model"}),
    # ---- images
    "squeeze and excite": Case(
        gated,
        conv(down=lambda: nn.Conv2d(8, 4, 1), up=lambda: nn.Conv2d(4, 8, 1)),
        grows=("a", "down"),
        **IMAGE,
    ),
    "depthwise": between(lambda m, h: m.d(h), conv(d=lambda: nn.Conv2d(8, 8, 3, groups=8)), **IMAGE),
    "transposed and resized": Case(
        lambda m, x: m.b(functional.interpolate(m.t(m.a(x)), scale_factor=2)),
        conv(t=lambda: nn.ConvTranspose2d(8, 8, 2, 2)),
        grows=("a", "t"),
        **IMAGE,
    ),
    "spatial gate": Case(
        lambda m, x: m.b((h := m.a(x)) * torch.sigmoid(m.gate(h))),
        conv(gate=lambda: nn.Conv2d(8, 1, 1)),
        refuses={"gate": "broadcast"},
        **IMAGE,
    ),
    # ---- attention
    "attention": Case(softmaxed, attention(), grows=("q", "k", "v"), **TOKENS),
    "fused attention": Case(fused, linear(width=24), **TOKENS),
    "attention by einsum": Case(
        lambda m, x: m.b(
            torch.einsum("bts,bsd->btd", torch.einsum("btd,bsd->bts", m.a(x), m.k(x)).softmax(-1), m.v(x))
        ),
        linear(k=lambda: nn.Linear(6, 8), v=lambda: nn.Linear(6, 8)),
        grows=("a", "k", "v"),
        **TOKENS,
    ),
    "grouped queries": Case(
        lambda m, x: m.o(
            merged(
                functional.scaled_dot_product_attention(
                    heads(m.q(x), 4), heads(m.k(x), 2), heads(m.v(x), 2), enable_gqa=True
                )
            )
        ),
        attention(keys=4),
        grows=("q", "k", "v"),
        **TOKENS,
    ),
    "rotary": Case(rotary, lambda: {**attention()(), "frequency": torch.rand(2)}, grows=("v",), **TOKENS),
    "torch's attention": Case(
        lambda m, x: m.b(m.t(h := m.a(x), h, h)[0]),
        linear(t=lambda: nn.MultiheadAttention(8, 2, batch_first=True)),
        grows=("t.out_proj",),
        refuses={"t.in_proj_weight": "unflatten"},
        **TOKENS,
    ),
    "windows": Case(
        windowed, conv(q=lambda: nn.Conv2d(3, 8, 1), k=lambda: nn.Conv2d(3, 8, 1)), grows=("a", "q", "k"), **IMAGE
    ),
    "stated heads beside a written size": Case(
        stated_heads,
        lambda: {**attention()(), "heads": 2, "a": nn.Linear(3, 8), "b": nn.Linear(8, 3)},
        grows=("a", "q", "k", "v"),
        **TOKENS,
    ),
    "similarity to itself": Case(
        lambda m, x: m.b(functional.softmax((h := m.a(x)) @ h.transpose(1, 2), -1)),
        linear(last=5),
        grows=(),
        refuses={"a": "start at zero"},
        **TOKENS,
    ),
    "relative positions": Case(
        lambda m, x: m.b((m.a(x) @ m.k(x).transpose(1, 2) + m.bias).softmax(-1) @ m.v(x)),
        linear(k=lambda: nn.Linear(6, 8), v=lambda: nn.Linear(6, 8), bias=lambda: nn.Parameter(torch.randn(5, 5))),
        grows=("a", "k", "v"),
        **TOKENS,
    ),
    "mixture of experts": Case(
        experts,
        lambda: {
            "gate": nn.Linear(6, 2),
            "first": nn.ModuleList(nn.Linear(6, 8) for _ in range(2)),
            "second": nn.ModuleList(nn.Linear(8, 3) for _ in range(2)),
        },
        grows=("first.0", "first.1"),
    ),
}
