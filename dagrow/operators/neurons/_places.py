"""Where a new channel of an axis can be written, and how it arrives where it is read."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from einops import rearrange
from torch import Tensor

from dagrow.graph import Axis, Dag, Edge
from dagrow.solvers import Compensation, Moments, Regression
from dagrow.statistics import (
    Feature,
    InputFeatures,
    MovedFeatures,
    OutputGoal,
    PositionMap,
    PulledGoal,
    ResidualGoal,
    Stacked,
    per_channel,
    position_map,
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
        parts = [
            InputFeatures(edge.name, edge.bias and not any(e.bias for e in self.producers[:i]))
            for i, edge in enumerate(self.producers)
        ]
        return parts[0] if len(parts) == 1 else Stacked(tuple(parts))

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

    def reads(self, consumer: Edge) -> InputFeatures | None:
        """What the consumer's own weights can use: nothing if they are frozen."""
        return InputFeatures(consumer.name, consumer.bias) if consumer.trainable else None

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
        reads = self.reads(consumer)
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

    def scaled(self, alpha: Tensor, m: Moments) -> Tensor:
        """``alpha [p, k]`` with a mean square of 1, per position and channel, of what it makes of ``p``."""
        features = self.measured
        p, positions = m[features, features], m.positions[features]
        if isinstance(features, MovedFeatures):
            positions *= float(features.position_map.weights.mean())
        channels = alpha.to(p).view(-1, len(p), alpha.shape[1])
        square = (channels * (p @ channels)).sum(1).mean(0) / positions
        return alpha.to(p) * torch.where(square > 0, square, 1).rsqrt()

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


def places(dag: Dag, axis: Axis) -> list[Place]:
    """The choices of producers for a new channel of an axis.

    On a residual stream producers write at different depths: a new channel is written by one of them, and the
    others write zero. Producers whose output arrives everywhere in the same way write it together.

    Args:
        dag: the dag that the axis is of.
        axis: the axis that is to widen; of it, what the first example runs.

    Returns:
        Places, in the order of their first producers.
    """
    axis = axis.measured
    grouped: dict[tuple, list[tuple[Edge, dict[str, PositionMap | None]]]] = {}
    for producer in axis.producers:
        arrivals = {consumer.name: position_map(dag, axis, producer, consumer) for consumer in axis.consumers}
        aligned = all(a is None or a.is_identity for a in arrivals.values())
        key = tuple(None if a is None else a.positions for a in arrivals.values()) if aligned else (producer.name,)
        grouped.setdefault(key, []).append((producer, arrivals))
    return [Place(dag, axis, tuple(p for p, _ in group), group[0][1]) for group in grouped.values()]


def unmeasured(axis: Axis) -> tuple[str, ...]:
    """A note for growths of an axis of which other examples run more than the one that is measured, or none."""
    others = axis.elsewhere
    return (f"not measured, as only other examples run them: {', '.join(others)}",) if others else ()
