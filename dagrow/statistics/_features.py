"""Features: what one row per sample and position can hold, computed from what layers read and write."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dagrow.errors import BatchError
from dagrow.layers import Geometry, with_constant
from dagrow.statistics._captures import Batch
from dagrow.statistics._position_map import PositionMap


class Feature(ABC):
    """Something with one row per sample and position, computed from what layers read in the forward pass.

    Features are keys: equal features are measured once.
    """

    @property
    @abstractmethod
    def edges(self) -> tuple[str, ...]:
        """Names of the layers that are captured for it."""

    @abstractmethod
    def rows(self, batch: Batch) -> Tensor:
        """The rows ``[n s, d]`` of a batch of n samples."""

    def count(self, batch: Batch) -> int:
        """How many rows."""
        return batch[self.edges[0]].positions

    @property
    def arrivals(self) -> Sequence[PositionMap]:
        """How the new channels arrive that it speaks of."""
        return ()

    def check(self, batch: Batch) -> None:
        """Raises BatchError if images have other sizes than in the example, and if that makes a difference."""
        for arrival in self.arrivals:
            for edge, sizes in () if arrival.aligned else arrival.grids.items():
                found = batch.captures[edge].grid if edge in batch.captures else sizes
                if found != sizes:
                    raise BatchError(
                        f"layer {edge} writes {_product(found)} positions for a batch, but {_product(sizes)} for the "
                        "example that was traced; trace with such a batch."
                    )

    def projected(self, batch: Batch, basis: Tensor) -> Tensor:
        """The rows times ``basis [d, k]``."""
        rows = self.rows(batch)
        return rows @ basis.to(rows)

    @property
    def goals(self) -> tuple[str, ...]:
        """Names of the layers whose goals it needs."""
        return ()

    @property
    def wishes(self) -> tuple[str, ...]:
        """Names of the layers for whose inputs it needs goals."""
        return ()

    def picture(self, batch: Batch) -> Tensor | None:
        """Rows without a constant as an image ``[n, d, *space]``, where they lie in memory as one; else None."""
        return None


def _product(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes)) or "1"


@dataclass(frozen=True)
class InputFeatures(Feature):
    """The features ``b`` that an edge reads, with the constant 1 of its bias."""

    edge: str
    bias: bool = True

    @property
    def edges(self) -> tuple[str, ...]:
        return (self.edge,)

    def image(self, batch: Batch) -> Tensor:
        """The input that a convolution slides over."""
        return batch[self.edge].read()

    def slides(self, batch: Batch) -> Geometry | None:
        """How a convolution slides over it; None for other layers."""
        return batch[self.edge].geometry

    def rows(self, batch: Batch) -> Tensor:
        capture = batch[self.edge]
        return with_constant(capture.rule.features(capture.module, self.image(batch)), self.bias)

    def projected(self, batch: Batch, basis: Tensor) -> Tensor:
        geometry = self.slides(batch)
        if geometry is None:
            return super().projected(batch, basis)
        image = self.image(batch)
        weight = basis.T.to(image)
        found = (
            geometry.convolved(image, weight[:, : weight.shape[1] - self.bias]).flatten(2).movedim(1, 2).flatten(0, 1)
        )
        return found + weight[:, -1] if self.bias else found

    def picture(self, batch: Batch) -> Tensor | None:
        geometry = self.slides(batch)
        return self.image(batch) if geometry is not None and geometry.trivial else None


@dataclass(frozen=True)
class NewChannels(InputFeatures):
    """What an edge reads from the new channels of a preview."""

    bias: bool = False

    def image(self, batch: Batch) -> Tensor:
        return batch[self.edge].read(new=True)


@dataclass(frozen=True)
class NormInputs(Feature):
    """What a rider carries in the new channels of a preview, with the constant 1."""

    rider: str

    @property
    def edges(self) -> tuple[str, ...]:
        return (self.rider,)

    def rows(self, batch: Batch) -> Tensor:
        capture = batch[self.rider]
        inputs = capture.read(new=True)
        return with_constant(inputs.movedim(capture.rule.channel_dim(inputs.ndim), -1).flatten(0, -2), True)


@dataclass(frozen=True)
class OutputGoal(Feature):
    """The goal ``v``: minus the gradient of each sample's loss at the edge's pre-activation."""

    edge: str

    @property
    def edges(self) -> tuple[str, ...]:
        return (self.edge,)

    @property
    def goals(self) -> tuple[str, ...]:
        return (self.edge,)

    def rows(self, batch: Batch) -> Tensor:
        capture = batch[self.edge]
        return capture.rule.rows(capture.module, capture.wanted())

    def picture(self, batch: Batch) -> Tensor | None:
        capture = batch[self.edge]
        return capture.wanted() if capture.geometry is not None else None


@dataclass(frozen=True, eq=False)
class ResidualGoal(Feature):
    """What moves of an edge's weights leave of its goal: ``v - dW b``, with the move of each sample's fold.

    Attributes:
        moves: for each fold ``[o, i]``.
    """

    goal: OutputGoal
    reads: "InputFeatures | Stacked"
    moves: Sequence[Tensor] = field(repr=False)

    @property
    def edges(self) -> tuple[str, ...]:
        return (*self.goal.edges, *self.reads.edges)

    @property
    def goals(self) -> tuple[str, ...]:
        return self.goal.edges

    def rows(self, batch: Batch) -> Tensor:
        return batch.by_fold(lambda part, fold: self.goal.rows(part) - self.reads.projected(part, self.moves[fold].T))

    def picture(self, batch: Batch) -> Tensor | None:
        wanted, geometry = self.goal.picture(batch), batch[self.goal.edge].geometry
        if wanted is None or geometry is None or isinstance(self.reads, Stacked):
            return None
        image = batch.grouped(self.reads.image(batch))
        moves = torch.cat([self.moves[fold] for fold in batch.groups]).to(wanted)
        moved = geometry.convolved(image, moves[:, : moves.shape[1] - self.reads.bias], len(batch.groups))
        if self.reads.bias:
            moved += moves[:, -1].view(-1, *[1] * geometry.space)
        return wanted - batch.ungrouped(moved)


@dataclass(frozen=True)
class Stacked(Feature):
    """Several features on top of each other."""

    parts: tuple[Feature, ...]

    @property
    def bias(self) -> bool:
        """Whether the constant 1 comes last."""
        return getattr(self.parts[-1], "bias", False)

    @property
    def goals(self) -> tuple[str, ...]:
        return tuple(goal for part in self.parts for goal in part.goals)

    def count(self, batch: Batch) -> int:
        return self.parts[0].count(batch)

    @property
    def edges(self) -> tuple[str, ...]:
        return tuple(edge for part in self.parts for edge in part.edges)

    def rows(self, batch: Batch) -> Tensor:
        return torch.cat([part.rows(batch) for part in self.parts], dim=1)
