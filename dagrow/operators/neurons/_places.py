"""Where a new channel of an axis can be written, and how it arrives where it is read."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from einops import rearrange
from torch import Tensor

from dagrow.graph import Axis, Dag, Edge, PositionMap, per_channel
from dagrow.operators.neurons._axis_moments import reads_of
from dagrow.solvers import Compensation, Moments, Pair, Product, Regression
from dagrow.statistics import (
    Feature,
    InputFeatures,
    MovedFeatures,
    NewChannels,
    OutputGoal,
    PulledGoal,
    ResidualGoal,
    Stacked,
)


@dataclass(frozen=True, eq=False)
class Place:
    """An axis and the producers that write its new channels: all that arrive everywhere in the same way.

    Attributes:
        producers: each with the part of ``p`` that it reads.
        arrivals: consumer -> how the new channels arrive, or None where linear theory does not reach.
        per_channel: whether arrivals speak of one of a unit's channels, see :meth:`split_channels`.
    """

    dag: Dag
    axis: Axis
    producers: tuple[Edge, ...]
    arrivals: Mapping[str, PositionMap | None]
    per_channel: bool = False

    @cached_property
    def features(self) -> Feature:
        """``p``: what the producers read, one constant for all."""
        return self._parts[0] if len(self._parts) == 1 else Stacked(tuple(self._parts))

    @cached_property
    def _parts(self) -> list[InputFeatures]:
        return [
            InputFeatures(edge.name, edge.bias and not any(e.bias for e in self.producers[:i]))
            for i, edge in enumerate(self.producers)
        ]

    @property
    def writers(self) -> tuple[str, ...]:
        """The names of the producers."""
        return tuple(edge.name for edge in self.producers)

    def new_channels(self, consumer: str) -> NewChannels:
        """What a consumer reads of new channels that are written here."""
        return NewChannels(consumer, writers=self.writers)

    @property
    def channels(self) -> int:
        """Channels of a unit at the producer that writes most of them."""
        return max(self._channels(edge) for edge in self.producers)

    def _channels(self, producer: Edge) -> int:
        return self.axis.layout.rows[producer.name].shape[1]

    @cached_property
    def arriving(self) -> dict[str, Feature]:
        """``p`` as it arrives at each consumer that linear theory reaches."""
        return {
            name: self.features if arrival.is_identity else MovedFeatures(self.features, arrival)
            for name, arrival in self.arrivals.items()
            if arrival is not None
        }

    def linear(self) -> list[Edge]:
        """The consumers that linear theory reaches."""
        return [c for c in self.axis.consumers if self.arrivals[c.name] is not None]

    def apart(self) -> list[Edge]:
        """Those of them that read new channels at other positions, or at several at once."""
        return [c for c in self.linear() if isinstance(self.arriving[c.name], MovedFeatures)]

    def regression(
        self, consumer: Edge, compensation: Compensation, project: bool, goal: OutputGoal | ResidualGoal
    ) -> Regression:
        """First stage: what the producers read, at a consumer that linear theory reaches."""
        arriving = self.arriving[consumer.name]
        if isinstance(arriving, MovedFeatures):
            return Regression(arriving, None, PulledGoal(goal, arriving.position_map))
        reads = reads_of(consumer)
        return Regression(arriving, reads, goal, compensation, project, constant=reads is not None and reads.bias)

    @property
    def width(self) -> int:
        """The number of features ``p`` of one channel."""
        return sum(size for _, size in self._sizes())

    def _sizes(self) -> Iterator[tuple[Edge, int]]:
        """Producers and the features that are theirs; the constant belongs to the first that has one."""
        biased = False
        for edge in self.producers:
            own = edge.bias and not biased
            biased |= edge.bias
            yield edge, edge.rule.widths(edge.module)[0] * edge.rule.taps(edge.module) + own

    @cached_property
    def measured(self) -> Feature:
        """The features whose second moment tells how large new channels are at their producers."""
        whole = [p for p in self.arriving.values() if isinstance(p, MovedFeatures) and p.position_map.is_whole]
        return whole[0] if whole and len(whole) == len(self.linear()) else self.features

    @property
    def scales(self) -> list[Pair]:
        """The second moments that directions are scaled by: where linear theory reaches, of all that is read."""
        return [(feature, feature) for feature in ([self.measured] if self.linear() else self._parts)]

    def scaled(self, alpha: Tensor, m: Moments) -> Tensor:
        """``alpha [p, k]`` with a mean square of 1, per position and channel, of what it makes of ``p``."""
        if not self.linear():
            return self._scaled_apart(alpha, m)
        features = self.measured
        p, positions = m.product(features, features), m.positions[features]
        if isinstance(features, MovedFeatures):
            positions *= float(features.position_map.weights.mean())
        alpha = alpha.to(p.diagonal())
        return alpha * _inverse_scale(alpha.view(-1, len(p), alpha.shape[1]), p, positions)

    def _scaled_apart(self, alpha: Tensor, m: Moments) -> Tensor:
        """Each producer's part by itself, as they need not write the same positions; equal parts of the mean square."""
        channels, start, parts = alpha.view(self.channels, -1, alpha.shape[1]), 0, []
        for feature, (_, size) in zip(self._parts, self._sizes(), strict=True):
            p, part = m.product(feature, feature), channels[:, start : start + size]
            part = part.to(p.diagonal())
            parts.append(part * _inverse_scale(part, p, m.positions[feature] * len(self.producers)))
            start += size
        return torch.cat(parts, 1).view_as(alpha)

    def split_channels(self) -> "Place":
        """With a direction for each channel of a unit, if all arrive alike, each in slots of its own."""
        if self.channels == 1 or not self.linear():
            return self
        (producer,) = self.producers
        first = {c.name: per_channel(a, producer, c) for c in self.linear() if (a := self.arrivals[c.name]) is not None}
        if any(arrival is None for arrival in first.values()):
            return self
        return replace(self, arrivals={**self.arrivals, **first}, per_channel=True)

    @property
    def directions(self) -> int:
        """How many a unit has."""
        return self.channels if self.per_channel else 1

    def packed(self, alpha: Tensor) -> Tensor:
        """Directions ``[p, k directions]`` as the fan-in of k units, channel by channel ``[channels p, k]``."""
        return rearrange(alpha, "p (k r) -> (r p) k", r=self.channels)

    def split(self, alpha: Tensor) -> dict[str, Tensor]:
        """``alpha [p, k]`` as fan-in of each producer ``[k, channels, i]``, constants last."""
        fans, start = {}, 0
        alpha = alpha.view(self.channels, -1, alpha.shape[1])
        for edge, size in self._sizes():
            fans[edge.name] = alpha[: self._channels(edge), start : start + size].permute(2, 0, 1)
            start += size
        return fans


def _inverse_scale(channels: Tensor, p: Product, positions: float) -> Tensor:
    """One over that of what ``channels [channels, p, k]`` make of features ``[k]``; 1 where that is nothing."""
    square = (channels * (p @ channels)).sum(1).mean(0) / positions
    return torch.where(square > 0, square, 1).rsqrt()


def places(dag: Dag, axis: Axis) -> list[Place]:
    """The choices of producers for a new channel of an axis, see :attr:`dagrow.graph.Axis.writings`.

    Args:
        dag: the dag that the axis is of.
        axis: the axis that is to widen; of it, what the first example runs.

    Returns:
        Places, in the order of their first producers.
    """
    axis = axis.measured
    return [Place(dag, axis, writing.producers, writing.arrivals) for writing in axis.writings]


def unmeasured(axis: Axis) -> tuple[str, ...]:
    """A note for growths of an axis of which other examples run more than the one that is measured, or none."""
    others = axis.elsewhere
    return (f"not measured, as only other examples run them: {', '.join(others)}",) if others else ()
