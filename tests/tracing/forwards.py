"""Models that tests of tracing are made of."""

import collections
import dataclasses
import functools

import torch
from torch import nn
from torch.nn import functional

Pair = collections.namedtuple("Pair", ["first", "second"])


@dataclasses.dataclass
class Answer:
    logits: torch.Tensor
    extra: dict


def made(function, **parts):
    """A module class with `function` as its forward, so that the signature is the function's own."""
    model = type("Made", (nn.Module,), {"forward": function})()
    for name, part in parts.items():
        if isinstance(part, torch.Tensor) and not isinstance(part, nn.Parameter) and name.startswith("buffer"):
            model.register_buffer(name, part)
        else:
            setattr(model, name, part)
    return model


def mlp():
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


def targets(program, op):
    return [node.target for node in program.graph.nodes if node.op == op]


def same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


A = functools.partial(nn.Linear, 4, 6)


def live_sizes(self, x):
    n, w = x.shape
    h = self.a(x).view(n * 2, -1).reshape(x.size(0), 6)
    return h[: n - 1 + 1] * (x.numel() // w // n) + torch.arange(n % (n + 1)).unsqueeze(1)


def nested(self, x):
    h = self.a(x)
    return {"pair": Pair(h, [h + 1, 2]), "answer": Answer(h * 2, {"k": (h, None)}), "n": x.shape[0]}


def in_place(self, x):
    h = self.a(x)
    functional.relu(h, inplace=True)
    h[:, 0] = h[:, 1] * 2
    h += 1
    return h


def directly(self, x):
    return x @ self.weight.t() + self.buffer + self.constant + self.a.weight.sum()


def residual(self, x):
    return torch.cat([x + self.d(self.b(self.a(x).relu())), x], dim=-1)


def whole_numbers(self, x):
    for _ in range(self.depth):
        x = self.a(x) if x.dim() == 2 and self.depth else x
    return 1 - x / 2


ZOO = {
    "mlp": (mlp, (4,)),
    "root leaf": (A, (4,)),
    "residual": (lambda: made(residual, a=A(), b=nn.Linear(6, 4), d=nn.Dropout()), (4,)),
    "literals": (lambda: made(lambda self, x: self.a(x).view(-1, 2, 3).flatten(1), a=A()), (4,)),
    "live sizes": (lambda: made(live_sizes, a=A()), (4,)),
    "nested": (lambda: made(nested, a=A()), (4,)),
    "in place": (lambda: made(in_place, a=A()), (4,)),
    "dropout": (lambda: made(lambda self, x: functional.dropout(x, 0.5, self.training) + x), (4,)),
    "directly": (
        lambda: made(
            directly,
            a=A(),
            weight=nn.Parameter(torch.randn(6, 4)),
            buffer=torch.ones(6),
            constant=torch.ones(6),
        ),
        (4,),
    ),
    "control flow": (lambda: made(whole_numbers, a=nn.Linear(4, 4), depth=3), (4,)),
    "conv": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(True), nn.Flatten()),
        (3, 5, 5),
    ),
    "encoder": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (5, 8)),
    "lstm": (lambda: nn.LSTM(4, 3, batch_first=True), (5, 4)),
}
