"""Where what a producer writes arrives at a consumer: the same kind of run as on labels, with positions for labels."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves, tree_map

from dagrow.dag import Axis, Dag, Edge
from dagrow.labels import NEUTRAL, Runner
from dagrow.layers import EdgeRule, RiderRule

__all__ = ["Arrival", "arrival"]

MIXED = -2  #: more than one position of the producer, or an unknown function of them


@dataclass(frozen=True, eq=False)
class Arrival:
    """How the channels of one unit, written by a producer, lie in the rows that a consumer reads.

    Attributes:
        index: for each position of the consumer and each of the unit's channels there: the producer's position times
            its channels per unit, plus the channel; or NEUTRAL where nothing arrives ``[S', slots]``.
        positions: positions S of the producer.
        channels: the unit's channels R at the producer.
    """

    index: Tensor
    positions: int
    channels: int

    @property
    def aligned(self) -> bool:
        """Whether each row of the consumer reads the same row of the producer, once."""
        return self.channels == 1 and torch.equal(self.index, torch.arange(self.positions)[:, None])


def arrival(dag: Dag, axis: Axis, producer: Edge, consumer: Edge) -> Arrival | None:
    """Where a unit of the axis arrives. None if it does not, or not as a rearrangement of positions."""
    runner = _PositionRunner(dag, axis, producer)
    inputs = runner.run_reached(consumer)
    if inputs is None:
        return None
    module, n = consumer.module, runner.samples
    index = consumer.rule.features(module, inputs)[:, axis.layout.columns[consumer.name][0]]
    channels = axis.layout.rows[producer.name].shape[1]
    positions = runner.rows // n
    if bool((index == MIXED).any()) or bool((index == NEUTRAL).all()) or len(index) % n:
        return None
    index = index.view(n, -1, index.shape[1])
    shift = torch.arange(n).view(-1, 1, 1) * positions * channels
    local = torch.where(index == NEUTRAL, NEUTRAL, index - shift)
    return Arrival(local[0], positions, channels) if bool((local == local[:1]).all()) else None


class _PositionRunner(Runner):
    """Only one unit of one axis counts; everything else is neutral."""

    def __init__(self, dag: Dag, axis: Axis, producer: Edge) -> None:
        super().__init__(dag.model, dag.rules)
        self.dag, self.axis, self.producer = dag, axis, producer
        self.inputs: dict[str, Tensor] = {}
        self.samples, self.rows = 1, 0

    def run_reached(self, consumer: Edge) -> Tensor | None:
        values = {node: tree_map(_neutral, value) for node, value in self.dag.labels.values.items()}
        self.samples = next(
            leaf.shape[0] for node in self.dag.graph.nodes if node.op == "placeholder"
            for leaf in tree_leaves(values[node]) if isinstance(leaf, Tensor) and leaf.ndim
        )  # fmt: skip
        reached: set[fx.Node] = set()
        for node in self.dag.graph.nodes:
            start = node.op == "call_module" and node.target == self.producer.name
            if start or any(source in reached for source in node.all_input_nodes):
                values[node] = self.node(node, values)
                if start or node.op != "call_module" or node.target not in self.dag.labels.rows:
                    reached.add(node)
        return self.inputs.get(consumer.name)

    def merge(self, tensors: Sequence[Tensor]) -> Tensor:
        merged, *others = torch.broadcast_tensors(*tensors)
        for other in others:
            clash = (merged != NEUTRAL) & (other != NEUTRAL) & (merged != other)
            merged = torch.where(clash, MIXED, torch.where(merged == NEUTRAL, other, merged))
        return merged

    def freeze(self, tensors: Iterable[Tensor], cause: str) -> None:
        """Nothing to mark: what is opaque to positions is MIXED."""

    def unknown(self, node: fx.Node, touched: object, cause: str) -> Any:
        carries = any(isinstance(t, Tensor) and bool((t != NEUTRAL).any()) for t in tree_leaves(touched))
        return tree_map(
            lambda v: _neutral(v).where(torch.tensor(not carries), MIXED) if isinstance(v, Tensor) else v,
            node.meta["val"],
        )

    def opaque(self, node: fx.Node, cause: str) -> Any:
        return tree_map(_neutral, node.meta["val"])

    def source(self, node: fx.Node) -> Any:
        return self.opaque(node, "")

    def edge(self, node: fx.Node, rule: EdgeRule, inputs: Tensor) -> Any:
        self.inputs[str(node.target)] = inputs
        output = _neutral(node.meta["val"]).clone()
        if node.target == self.producer.name:
            channels = self.axis.layout.rows[self.producer.name][0]
            flat = output.movedim(rule.channel_dim(output.ndim), -1)
            self.rows = flat[..., 0].numel()
            count = torch.arange(self.rows).view(flat.shape[:-1])
            flat[..., channels] = count[..., None] * len(channels) + torch.arange(len(channels))
        return output

    def rider(self, node: fx.Node, rule: RiderRule, inputs: Tensor) -> Any:
        return inputs


def _neutral(value: Any) -> Any:
    return torch.full((), NEUTRAL).expand(value.shape) if isinstance(value, Tensor) else value
