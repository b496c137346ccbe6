"""Features: what one row per sample and position can hold, computed from what layers read and write."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dagrow.axes import Landing
from dagrow.errors import BatchError, GrowthError
from dagrow.layers import with_constant

__all__ = ["Capture", "Carried", "Feature", "Gathered", "Goal", "New", "Reads", "Stacked"]


@dataclass
class Capture:
    """What one forward and backward pass of a batch left at one layer."""

    module: torch.nn.Module
    rule: Any
    new_read: Landing | None
    new_written: Landing | None
    inputs: Tensor
    version: int
    output: Tensor | None = None
    goal: Tensor | None = None

    def read(self, new: bool = False) -> Tensor:
        """The layer's input, restricted to its old or new channels."""
        if self.inputs._version != self.version:
            raise GrowthError(
                "the input of a layer was changed in place after the layer read it; measure a model that does not."
            )
        if self.new_read is None:
            return self.inputs
        return self._select(self.inputs, self.new_read.new.flatten() if new else self.new_read.old)

    def wanted(self) -> Tensor:
        """The goal at the layer's old output channels."""
        assert self.goal is not None
        return self.goal if self.new_written is None else self._select(self.goal, self.new_written.old)

    def _select(self, tensor: Tensor, channels: Tensor) -> Tensor:
        return tensor.index_select(self.rule.channel_dim(tensor.ndim), channels.to(tensor.device))


class Feature(ABC):
    """Something with one row per sample and position, computed from what layers read in the forward pass.

    Features are keys: equal features are measured once.
    """

    @property
    @abstractmethod
    def edges(self) -> tuple[str, ...]:
        """Names of the layers that are captured for it."""

    @abstractmethod
    def rows(self, captures: Mapping[str, Capture], samples: int) -> Tensor:
        """The rows ``[n s, d]`` of a batch of n samples."""


@dataclass(frozen=True)
class Reads(Feature):
    """The features ``b`` that an edge reads, with the constant 1 of its bias."""

    edge: str
    bias: bool = True

    @property
    def edges(self) -> tuple[str, ...]:
        return (self.edge,)

    def rows(self, captures: Mapping[str, Capture], samples: int) -> Tensor:
        capture = captures[self.edge]
        return with_constant(capture.rule.features(capture.module, capture.read()), self.bias)


@dataclass(frozen=True)
class New(Reads):
    """What an edge reads from the new channels of a preview."""

    bias: bool = False

    def rows(self, captures: Mapping[str, Capture], samples: int) -> Tensor:
        capture = captures[self.edge]
        return with_constant(capture.rule.features(capture.module, capture.read(new=True)), self.bias)


@dataclass(frozen=True)
class Carried(Reads):
    """What a rider carries in the new channels of a preview, with the constant 1."""

    def rows(self, captures: Mapping[str, Capture], samples: int) -> Tensor:
        capture = captures[self.edge]
        inputs = capture.read(new=True)
        return with_constant(inputs.movedim(capture.rule.channel_dim(inputs.ndim), -1).flatten(0, -2), True)


@dataclass(frozen=True)
class Goal(Feature):
    """The goal ``v``: minus the gradient of each sample's loss at the edge's pre-activation."""

    edge: str

    @property
    def edges(self) -> tuple[str, ...]:
        return (self.edge,)

    def rows(self, captures: Mapping[str, Capture], samples: int) -> Tensor:
        capture = captures[self.edge]
        return capture.rule.rows(capture.module, capture.wanted())


@dataclass(frozen=True)
class Stacked(Feature):
    """Several features on top of each other."""

    parts: tuple[Feature, ...]

    @property
    def edges(self) -> tuple[str, ...]:
        return tuple(edge for part in self.parts for edge in part.edges)

    def rows(self, captures: Mapping[str, Capture], samples: int) -> Tensor:
        return torch.cat([part.rows(captures, samples) for part in self.parts], dim=1)


@dataclass(frozen=True, eq=False)
class Gathered(Feature):
    """A producer's features as they arrive at a consumer that reads them at other positions.

    Attributes:
        source: the features at the producer ``[n S, p]``.
        index: for each position of the consumer and each of the unit's channels there, the source position times
            the number of producing channels plus the producing channel, or -1 ``[S', slots]``.
        channels: producing channels R of a unit; the result has ``slots R p`` columns.
        length: positions S of the producer.
    """

    source: Feature
    index: Tensor
    channels: int
    length: int

    @property
    def edges(self) -> tuple[str, ...]:
        return self.source.edges

    def rows(self, captures: Mapping[str, Capture], samples: int) -> Tensor:
        source = self.source.rows(captures, samples)
        source = source.view(samples, -1, source.shape[1])
        if source.shape[1] != self.length:
            raise BatchError(
                f"a batch has {source.shape[1]} positions where the traced example has {self.length}; "
                "trace with such a batch."
            )
        positions, slots = self.index.shape
        out = source.new_zeros(samples, positions, slots, self.channels, source.shape[2])
        t, e = torch.nonzero(self.index >= 0, as_tuple=True)
        at = self.index[t, e]
        out[:, t, e, at % self.channels] = source[:, at // self.channels]
        return out.view(samples * positions, -1)
