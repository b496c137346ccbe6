"""Features: what one row per sample and position can hold, computed from what layers read and write."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from dagrow.errors import BatchError
from dagrow.graph import PositionMap
from dagrow.layers import Geometry, with_constant
from dagrow.statistics._captures import Batch, Writers


class Feature(ABC):
    """Something with one row per sample and position, computed from what layers read in the forward pass.

    Features are keys: equal features are measured once.
    """

    @property
    @abstractmethod
    def edges(self) -> tuple[str, ...]:
        """Names of the layers that are captured for it."""

    @property
    def goals(self) -> tuple[str, ...]:
        """Names of the layers for whose outputs it needs goals."""
        return ()

    @property
    def input_goals(self) -> tuple[str, ...]:
        """Names of the layers for whose inputs it needs goals."""
        return ()

    @property
    def position_maps(self) -> tuple[PositionMap, ...]:
        """How the new channels arrive that it speaks of."""
        return ()

    @abstractmethod
    def count(self, batch: Batch) -> int:
        """How many rows."""

    @abstractmethod
    def rows(self, batch: Batch) -> Tensor:
        """The rows ``[n s, d]`` of a batch of n samples with s positions."""

    def entries(self, batch: Batch) -> int:
        """How many entries a row has; where rows are large, without making any."""
        return self.rows(batch).shape[1]

    def image(self, batch: Batch) -> Tensor | None:
        """Rows without a constant as an image ``[n, d, *space]``, where they lie in memory as one; else None."""
        return None

    def projected(self, batch: Batch, basis: Tensor) -> Tensor:
        """The rows times a basis.

        Args:
            batch: n samples.
            basis: ``[d, k]``.

        Returns:
            The products ``[n s, k]``.
        """
        rows = self.rows(batch)
        return rows @ basis.to(rows)

    def check_sizes(self, batch: Batch) -> None:
        """Compares images with those of the example, where that makes a difference.

        Raises:
            BatchError: they have other sizes.
        """
        for position_map in self.position_maps:
            for edge, expected in () if position_map.is_identity else position_map.grids.items():
                capture = batch.captures.get(edge)
                if capture is None:
                    continue
                if capture.grid[max(0, len(capture.grid) - len(expected)) :] != expected:
                    raise BatchError(
                        f"layer {edge} writes {_by(capture.grid)} positions for a batch, but {_by(expected)} for the "
                        "example that was traced, and new channels are measured position by position. Trace with a "
                        "batch as they are; where they differ among themselves, pad or crop them to one size, or "
                        "leave the axis out with axes=."
                    )
                if position_map.dims.get(edge, 0) not in (None, capture.sample_dim):
                    raise BatchError(
                        f"samples lie along dimension {capture.sample_dim} of what layer {edge} writes, where channels "
                        f"of the example that was traced arrive alike along dimension {position_map.dims[edge]}; trace "
                        "with several samples, and as many positions as there are in the batches."
                    )


def _by(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes)) or "1"


@dataclass(frozen=True, eq=False)
class OneLayer(Feature):
    """A feature of one layer, with a row for each position of its output."""

    edge: str

    @property
    def edges(self) -> tuple[str, ...]:
        return (self.edge,)

    def count(self, batch: Batch) -> int:
        return batch[self.edge].positions


class Derived(Feature):
    """A feature computed from others, row by row."""

    @property
    @abstractmethod
    def sources(self) -> Sequence[Feature]:
        """The features that it is computed from."""

    @property
    def edges(self) -> tuple[str, ...]:
        return tuple(edge for source in self.sources for edge in source.edges)

    @property
    def goals(self) -> tuple[str, ...]:
        return tuple(edge for source in self.sources for edge in source.goals)

    @property
    def input_goals(self) -> tuple[str, ...]:
        return tuple(edge for source in self.sources for edge in source.input_goals)

    @property
    def position_maps(self) -> tuple[PositionMap, ...]:
        return tuple(position_map for source in self.sources for position_map in source.position_maps)

    def count(self, batch: Batch) -> int:
        return self.sources[0].count(batch)


@dataclass(frozen=True, eq=False)
class Wrapped(Derived):
    """A feature computed from one other."""

    source: Feature

    @property
    def sources(self) -> Sequence[Feature]:
        return (self.source,)


class LayerInputs(OneLayer):
    """What a weighted layer reads, or could: of a convolution the patches of an image.

    Attributes:
        bias: whether the constant 1 comes last.
    """

    bias: bool

    @abstractmethod
    def inputs(self, batch: Batch) -> Tensor:
        """The input; of a convolution the image that it slides over."""

    def geometry_in(self, batch: Batch) -> Geometry | None:
        """How a convolution slides over it; None for other layers."""
        return batch[self.edge].geometry

    def rows(self, batch: Batch) -> Tensor:
        capture = batch[self.edge]
        return with_constant(capture.edge_rule.features(capture.module, self.inputs(batch)), self.bias)

    def entries(self, batch: Batch) -> int:
        geometry = self.geometry_in(batch)
        if geometry is None:
            return super().entries(batch)
        inputs = self.inputs(batch)
        channels = inputs.shape[batch[self.edge].rule.channel_dim(inputs.ndim)]
        return channels * prod(geometry.kernel) + self.bias

    def projected(self, batch: Batch, basis: Tensor) -> Tensor:
        geometry = self.geometry_in(batch)
        if geometry is None:
            return super().projected(batch, basis)
        inputs = self.inputs(batch)
        weight = basis.T.to(inputs)
        image = geometry.convolved(inputs, weight[:, : weight.shape[1] - self.bias])
        rows = image.flatten(2).movedim(1, 2).flatten(0, 1)
        return rows + weight[:, -1] if self.bias else rows

    def image(self, batch: Batch) -> Tensor | None:
        geometry = self.geometry_in(batch)
        return self.inputs(batch) if geometry is not None and geometry.trivial else None


@dataclass(frozen=True)
class InputFeatures(LayerInputs):
    """The features ``b`` that an edge reads, with the constant 1 of its bias.

    Attributes:
        edge: the edge's name.
        bias: whether the constant 1 comes last.
    """

    bias: bool = True

    def inputs(self, batch: Batch) -> Tensor:
        return batch[self.edge].old_inputs()


@dataclass(frozen=True)
class NewChannels(LayerInputs):
    """What an edge reads from the new channels of a preview.

    Attributes:
        edge: the edge's name.
        bias: whether the constant 1 comes last.
        writers: what writes the channels, see ``Preview.shared``; by default all that are new.
    """

    bias: bool = False
    writers: Writers = ()

    def inputs(self, batch: Batch) -> Tensor:
        return batch[self.edge].new_inputs(self.writers)


@dataclass(frozen=True)
class NormInputs(OneLayer):
    """What a rider carries in the new channels of a preview, with the constant 1.

    Attributes:
        edge: the rider's name.
        writers: as for :class:`NewChannels`.
    """

    writers: Writers = ()

    def rows(self, batch: Batch) -> Tensor:
        capture = batch[self.edge]
        return with_constant(capture.channels_last(capture.new_inputs(self.writers)), True)


@dataclass(frozen=True)
class OutputGoal(OneLayer):
    """The goal ``v``: minus the gradient of each sample's loss at the edge's pre-activation.

    Attributes:
        edge: the edge's name.
    """

    @property
    def goals(self) -> tuple[str, ...]:
        return (self.edge,)

    def rows(self, batch: Batch) -> Tensor:
        capture = batch[self.edge]
        return capture.edge_rule.rows(capture.module, capture.goal_at_outputs())

    def image(self, batch: Batch) -> Tensor | None:
        capture = batch[self.edge]
        return capture.goal_at_outputs() if capture.geometry is not None else None


@dataclass(frozen=True)
class Stacked(Derived):
    """Several features side by side, in one row.

    Attributes:
        parts: the features, in the order of their columns.
    """

    parts: tuple[Feature, ...]

    @property
    def sources(self) -> Sequence[Feature]:
        return self.parts

    @property
    def bias(self) -> bool:
        """Whether the constant 1 comes last."""
        return getattr(self.parts[-1], "bias", False)

    def rows(self, batch: Batch) -> Tensor:
        return torch.cat([part.rows(batch) for part in self.parts], dim=1)


@dataclass(frozen=True, eq=False)
class ResidualGoal(Derived):
    """What moves of an edge's weights leave of its goal: ``v - dW b``, with the move of each sample's fold.

    Attributes:
        goal: ``v``.
        reads: ``b``.
        moves: for each fold ``dW [o, i]``.
    """

    goal: OutputGoal
    reads: InputFeatures | Stacked
    moves: Sequence[Tensor] = field(repr=False)

    @property
    def sources(self) -> Sequence[Feature]:
        return (self.goal, self.reads)

    def rows(self, batch: Batch) -> Tensor:
        return batch.by_fold(lambda part, fold: self.goal.rows(part) - self.reads.projected(part, self.moves[fold].T))

    def projected(self, batch: Batch, basis: Tensor) -> Tensor:
        def along(part: Batch, fold: int) -> Tensor:
            return self.goal.projected(part, basis) - self.reads.projected(part, self._moved(basis, fold))

        return batch.by_fold(along)

    @cached_property
    def _last_moved(self) -> dict[int, tuple[Tensor, Tensor]]:
        return {}

    def _moved(self, basis: Tensor, fold: int) -> Tensor:
        """``dW^T B [i, k]``, which serves for one batch after the other."""
        known, moved = self._last_moved.get(fold, (None, basis))
        if known is not basis:
            moved = self.moves[fold].T @ basis.to(self.moves[fold])
            self._last_moved[fold] = basis, moved
        return moved

    def image(self, batch: Batch) -> Tensor | None:
        goal, geometry = self.goal.image(batch), batch[self.goal.edge].geometry
        if goal is None or geometry is None or isinstance(self.reads, Stacked):
            return None
        inputs = batch.grouped(self.reads.inputs(batch))
        moves = torch.cat([self.moves[fold] for fold in batch.groups]).to(goal)
        moved = geometry.convolved(inputs, moves[:, : moves.shape[1] - self.reads.bias], len(batch.groups))
        if self.reads.bias:
            moved += moves[:, -1].view(-1, *[1] * geometry.space)
        return goal - batch.ungrouped(moved)


@dataclass(frozen=True)
class Squares(Wrapped):
    """The squares of other features.

    Attributes:
        source: these features.
    """

    def rows(self, batch: Batch) -> Tensor:
        return self.source.rows(batch).square()


@dataclass(frozen=True)
class Norms(Wrapped):
    """The norms of the rows of other features: ``E|x|^2`` without their Gram.

    Attributes:
        source: these features.
    """

    def rows(self, batch: Batch) -> Tensor:
        image = self.source.image(batch)
        if image is None:
            return torch.linalg.vector_norm(self.source.rows(batch), dim=1, keepdim=True)
        return torch.linalg.vector_norm(image, dim=1).view(-1, 1)


@dataclass(frozen=True)
class Ones(Wrapped):
    """The constant 1 alone, as often as there are rows of other features.

    Attributes:
        source: these features.
    """

    def rows(self, batch: Batch) -> Tensor:
        return torch.ones_like(self.source.rows(batch)[:, :1])
