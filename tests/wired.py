"""Networks whose layers are joined as drawn, and what new paths in them should explain, by brute force."""

import itertools

import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor, nn

DOUBLE = torch.float64


class Wired(nn.Module):
    """Layers joined as drawn: each reads the tanh of the sum of what is wired to it."""

    def __init__(self, widths: list[int], wires: list[tuple[int, int]], bias: list[bool]) -> None:
        super().__init__()
        self.wires, self.last = wires, len(widths) - 1
        ends = enumerate(zip(wires, bias, strict=True))
        self.layers = nn.ModuleList(nn.Linear(widths[a], widths[b], bias=bias) for _, ((a, b), bias) in ends)

    def forward(self, x: Tensor) -> Tensor:
        values = {0: x}
        for node in range(1, self.last + 1):
            terms = [layer(values[a]) for (a, b), layer in zip(self.wires, self.layers, strict=True) if b == node]
            total = terms[0]
            for term in terms[1:]:
                total = total + term
            values[node] = total if node == self.last else torch.tanh(total)
        return values[self.last]


@st.composite
def wired(draw: st.DrawFn) -> Wired:
    """A random DAG of three to six activations; each is written and, but for the last, read."""
    count = draw(st.integers(3, 6))
    widths = [draw(st.integers(1, 4)) for _ in range(count)]
    chain = [(i, i + 1) for i in range(count - 1)]
    further = [pair for pair in itertools.combinations(range(count), 2) if pair[1] > pair[0] + 1]
    wires = chain + [pair for pair in further if draw(st.booleans())]
    torch.manual_seed(draw(st.integers(0, 999)))
    model = Wired(widths, wires, [draw(st.booleans()) for _ in wires]).double()
    with torch.no_grad():
        for layer in model.layers:
            layer.weight.mul_(3)  # where tanh bends, activations are no combinations of each other
    return model


def data(model: Wired, n: int = 150) -> tuple[Tensor, Tensor]:
    inputs = model.layers[model.wires.index((0, 1))].in_features
    outputs = model.layers[model.wires.index((model.last - 1, model.last))].out_features
    x = torch.randn(n, inputs, dtype=DOUBLE)
    return x, torch.randn(n, outputs, dtype=DOUBLE)


def loss(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().sum() / len(output) / 2


def seen(model: Wired, x: Tensor, y: Tensor) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Each activation, and minus the gradient of each sample's loss at each pre-activation."""
    values, sums = {0: x}, {}
    for node in range(1, model.last + 1):
        sums[node] = sum(
            layer(values[a]) for (a, b), layer in zip(model.wires, model.layers, strict=True) if b == node
        ).detach()
        values[node] = torch.tanh(sums[node])
    goals = {}
    for node, found in sums.items():
        probe = torch.zeros_like(found, requires_grad=True)
        again = dict(values)
        again[node] = torch.tanh(found + probe) if node < model.last else found + probe
        for later in range(node + 1, model.last + 1):
            total = sum(layer(again[a]) for (a, b), layer in zip(model.wires, model.layers, strict=True) if b == later)
            again[later] = torch.tanh(total) if later < model.last else total
        goals[node] = -torch.autograd.grad((again[model.last] - y).square().sum() / 2, probe)[0]
    return values, goals


def left(features: list[Tensor], goal: Tensor) -> float:
    """Mean squared norm of what a least squares fit on the features leaves of the goal.

    Not for features that nearly follow from each other: second moments in double precision hold squares of such gaps.
    """
    x = torch.cat(features, 1)
    values = torch.linalg.svdvals(x / x.norm(dim=0).clamp_min(1e-300))
    assume(float(values.min()) > 1e-3)
    fitted = x @ torch.linalg.lstsq(x, goal, driver="gelsd").solution
    return float((goal - fitted).square().sum()) / len(goal)


def energy(goal: Tensor) -> float:
    """``E|v|^2``."""
    return float(goal.square().sum()) / len(goal)


def truths(model: Wired, x: Tensor, y: Tensor) -> dict[tuple[int, int], float]:
    """For every pair that is not joined and would close no cycle: by how much a new connection lets the fit improve."""
    values, goals = seen(model, x, y)
    found = {}
    for node in range(1, model.last + 1):
        into = [
            (a, layer.bias is not None) for (a, b), layer in zip(model.wires, model.layers, strict=True) if b == node
        ]
        known = [values[a] for a, _ in into]
        if any(bias for _, bias in into):
            known.append(torch.ones(len(x), 1, dtype=DOUBLE))
        for source in range(node):
            if source not in {a for a, _ in into}:
                extra = [values[source]] + ([] if any(bias for _, bias in into) else [torch.ones(len(x), 1).double()])
                found[source, node] = left(known, goals[node]) - left([*known, *extra], goals[node])
    return found


def named(model: Wired, where: str) -> tuple[int, int]:
    """The activations that a growth's place speaks of."""
    source, target = where.split(" -> ")
    ends = {f"layers.{i}": wire for i, wire in enumerate(model.wires)}
    return (0 if source == "x" else ends[source][1]), ends[target][1]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(5, 3), nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.three(torch.tanh(self.two(torch.tanh(self.one(x)))))

    def twice(self, x: Tensor) -> Tensor:
        return 2 * self(x)


class Images(nn.Module):
    """Convolutions whose grids differ, and a layer on the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.second, self.third = nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Conv2d(4, 3, 3)
        self.last = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.third(torch.tanh(self.second(torch.tanh(self.norm(self.first(x)))))))
        return self.last(h.mean((2, 3)))


def images(n: int = 60) -> tuple[Images, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    x, y = torch.randn(n, 2, 9, 8, dtype=DOUBLE), torch.randn(n, 2, dtype=DOUBLE)
    return Images().double().eval(), list(zip(x.split(25), y.split(25), strict=True))
