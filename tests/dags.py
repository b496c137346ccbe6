"""Random DAGs of linear layers, or of convolutions of different stride: drawn as a short plan that prints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce
from operator import add

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from zoo import KINKED, SMOOTH, mean_loss, sum_loss

from dagrow.testing import Case

SIZES = (17, 24)
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": mean_loss,
    "mse": functional.mse_loss,
    "sum": sum_loss,
    "cross entropy": partial(functional.cross_entropy, label_smoothing=0.1),  # never all the way down to zero
    "sum of cross entropies": partial(functional.cross_entropy, label_smoothing=0.1, reduction="sum"),
}


@dataclass(frozen=True)
class Node:
    """An activation: what it reads, as a sum of layers or as one layer of a concatenation, and what follows.

    Attributes:
        reads: earlier activations, 0 for the input.
        skips: whether the first of them is added to the result.
        norm: "none", "batch", "layer" or "dropout".
        level: how often the longest path to it has halved the image.
        pool: "none", "max" or "avg", which halve it once more.
    """

    reads: tuple[int, ...]
    width: int = 3
    activation: str = "Tanh"
    joined: str = "sum"
    skips: bool = False
    norm: str = "none"
    bias: bool = True
    frozen: bool = False
    kernel: int = 3
    level: int = 0
    pool: str = "none"

    @property
    def given(self) -> int:
        """How often the image has been halved where the activation is read."""
        return self.level + (self.pool != "none")


@dataclass(frozen=True)
class Plan:
    """A model, its data and its loss, from a seed. An empty image stands for features without positions."""

    nodes: tuple[Node, ...]
    inputs: int = 3
    outputs: int = 2
    image: tuple[int, ...] = ()
    flat: bool = False
    loss: str = "mean"
    seed: int = 0


class Net(nn.Module):
    """The model of a plan. All activations of a kind are one module; the head reads all that nothing else reads."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.nodes, self.flat = plan.nodes, plan.flat
        self.activations = nn.ModuleDict({node.activation: getattr(nn, node.activation)() for node in plan.nodes})
        self.layers, self.norms, self.pools = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        widths, levels = [plan.inputs], [0]
        for node in plan.nodes:
            read = [(widths[a], node.level - levels[a]) for a in node.reads]
            if node.joined == "cat":
                read = [(sum(width for width, _ in read), read[0][1])]
            layers = nn.ModuleList(self._layer(node, i, bool(plan.image), halved) for i, halved in read)
            self.layers.append(layers.requires_grad_(not node.frozen))
            self.norms.append(self._norm(node, bool(plan.image)))
            pools = {"max": nn.MaxPool2d, "avg": nn.AvgPool2d}
            self.pools.append(pools[node.pool](2, ceil_mode=True) if node.pool in pools else nn.Identity())
            widths.append(node.width)
            levels.append(node.given)
        heard = {a for node in plan.nodes for a in node.reads}
        self.ends = [a for a in range(1, len(widths)) if a not in heard]
        with torch.no_grad():
            read = self._ends(torch.zeros(2, plan.inputs, *plan.image))
        self.head = nn.Linear(read.shape[1], plan.outputs)

    @staticmethod
    def _layer(node: Node, inputs: int, image: bool, halved: int) -> nn.Module:
        if not image:
            return nn.Linear(inputs, node.width, bias=node.bias)
        return nn.Conv2d(inputs, node.width, node.kernel, 2**halved, node.kernel // 2, bias=node.bias)

    @staticmethod
    def _norm(node: Node, image: bool) -> nn.Module:
        return {
            "none": nn.Identity,
            "dropout": lambda: nn.Dropout(0.3),
            "layer": lambda: nn.GroupNorm(1, node.width) if image else nn.LayerNorm(node.width),
            "batch": lambda: (nn.BatchNorm2d if image else nn.BatchNorm1d)(node.width),
        }[node.norm]()

    def _ends(self, x: Tensor) -> Tensor:
        values = [x]
        for node, layers, norm, pool in zip(self.nodes, self.layers, self.norms, self.pools, strict=True):
            read = [values[a] for a in node.reads]
            if node.joined == "cat":
                read = [torch.cat(read, 1)]
            total = reduce(add, [layer(value) for layer, value in zip(layers, read, strict=True)])
            h = self.activations[node.activation](norm(total))
            values.append(pool(h + values[node.reads[0]] if node.skips else h))
        ends = [values[a] for a in self.ends]
        if x.ndim > 2:
            ends = [h.flatten(1) if self.flat else h.mean((2, 3)) for h in ends]
        return torch.cat(ends, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self._ends(x))


def stirred(model: nn.Module) -> nn.Module:
    """Norm layers with statistics and an affine part of their own."""
    for module in model.modules():
        if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def built(plan: Plan) -> Case:
    """The case of a plan."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        model = stirred(Net(plan)).double()
        x = torch.randn(sum(SIZES), plan.inputs, *plan.image, dtype=torch.float64)
        y = torch.randn(sum(SIZES), plan.outputs, dtype=torch.float64)
    target = y.argmax(1) if "cross" in plan.loss else y
    batches = list(zip(x.split(SIZES), target.split(SIZES), strict=True))
    return Case(model, batches, LOSSES[plan.loss], name=repr(plan))


@st.composite
def _nodes(draw: st.DrawFn, nodes: list[Node], inputs: int, image: bool) -> Node:
    """One more node: of each drawn read, all that fits is kept."""
    widths, given = [inputs, *(node.width for node in nodes)], [0, *(node.given for node in nodes)]
    before = len(widths)
    last = draw(st.sampled_from((before - 1, before - 1, *range(before))))
    reads = (last, *draw(st.sets(st.sampled_from(range(before)), max_size=2)) - {last})
    level = max(given[a] for a in reads)
    coarser = level + (image and level < 2 and draw(st.booleans()))
    alike = len({given[a] for a in reads}) == 1
    skips = coarser == given[last] and draw(st.sampled_from((False, False, True)))
    return Node(
        reads,
        widths[last] if skips else draw(st.integers(1, 4)),
        draw(st.sampled_from(SMOOTH + KINKED)),
        draw(st.sampled_from(("sum", "cat"))) if alike else "sum",
        skips,
        draw(st.sampled_from(("none", "none", "batch", "batch", "layer", "dropout"))),
        draw(st.sampled_from((True, True, False))),
        draw(st.sampled_from((False,) * 5 + (True,))),
        draw(st.sampled_from((1, 3))) if image else 3,
        coarser,
        draw(st.sampled_from(("none", "none", "max", "avg"))) if image and coarser < 2 else "none",
    )


@st.composite
def plans(draw: st.DrawFn, image: bool = False, most: int = 4) -> Plan:
    """Plans of up to ``most`` nodes."""
    inputs, nodes = draw(st.integers(1, 3 if image else 4)), list[Node]()
    for _ in range(draw(st.integers(1, most))):
        nodes.append(draw(_nodes(nodes, inputs, image)))
    return Plan(
        tuple(nodes),
        inputs,
        draw(st.integers(2, 3)),
        (draw(st.integers(3, 6)), draw(st.integers(3, 6))) if image else (),
        image and draw(st.booleans()),
        draw(st.sampled_from(tuple(LOSSES))),
        draw(st.integers(0, 999)),
    )
