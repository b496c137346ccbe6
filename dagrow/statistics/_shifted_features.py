"""Features that arrive elsewhere than where they are written: moved, pulled back, or read under a kernel's taps."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor
from torch.nn import functional

from dagrow.graph import PositionMap
from dagrow.statistics._captures import Batch
from dagrow.statistics._features import Derived, Feature, OutputGoal, ResidualGoal, Wrapped


class _AtCells(Derived):
    """A feature with a row for each cell of a position map, for each of the items that a sample consists of.

    The model takes one item a sample when it is traced; a step may send it several, such as the parts of a triplet.
    """

    position_map: PositionMap

    @property
    def position_maps(self) -> tuple[PositionMap, ...]:
        return (self.position_map,)

    def count(self, batch: Batch) -> int:
        return self.sources[0].count(batch) // self._positions * len(self.position_map.cells)

    @property
    @abstractmethod
    def _positions(self) -> int:
        """Rows of its source for each item."""


@dataclass(frozen=True, eq=False)
class MovedFeatures(_AtCells, Wrapped):
    """What a producer reads, ``p``, as it arrives where a consumer reads: ``sqrt(w) A p`` at each cell.

    A consumer that reads a cell in several slots (the taps of its kernel) has a fan-out for each of them. Weighted by
    the part w of the slots that read a cell, ``E p p^T`` is the mean over slots of their Grams.

    Attributes:
        source: the features at the producer ``[n S, p]``; the result has ``channels p`` columns.
        position_map: how they arrive.
    """

    position_map: PositionMap

    @property
    def _positions(self) -> int:
        return self.position_map.positions

    def entries(self, batch: Batch) -> int:
        return self.position_map.channels * self.source.entries(batch)

    def rows(self, batch: Batch) -> Tensor:
        source, position_map = self.source.rows(batch), self.position_map
        source = source.view(-1, position_map.positions, source.shape[1])
        cells = source
        if not position_map.is_whole:
            by_position = source.movedim(0, 1).flatten(1)
            cells = position_map.matrix.to(by_position) @ by_position
            cells = cells.view(-1, position_map.channels, *source[:, 0].shape).permute(2, 0, 1, 3).flatten(2)
        return (cells * position_map.weights.sqrt().to(cells)[:, None]).flatten(0, 1)


@dataclass(frozen=True, eq=False)
class PulledGoal(_AtCells):
    """A goal (or what remains of it), pulled back to the cells that the consumer reads.

    That is ``sum over t of v(t)`` by slot, over the positions t that read the cell in that slot, divided by
    ``sqrt(w)``; ``slots o`` columns.

    Attributes:
        goal: ``v`` at the consumer.
        position_map: how new channels arrive there.
    """

    goal: OutputGoal | ResidualGoal
    position_map: PositionMap

    @property
    def sources(self) -> Sequence[Feature]:
        return (self.goal,)

    @property
    def _positions(self) -> int:
        return len(self.position_map.index)

    def rows(self, batch: Batch) -> Tensor:
        goals, position_map = self.goal.rows(batch), self.position_map
        goals = goals.view(-1, len(position_map.index), goals.shape[1])
        cells = goals.new_zeros(len(goals), len(position_map.cells), position_map.slots, goals.shape[2])
        for slot, cell in enumerate(position_map.index.T):
            is_read = cell >= 0
            cells[:, :, slot].index_add_(1, cell[is_read], goals[:, is_read])
        return (cells / position_map.weights.sqrt().to(cells)[:, None, None]).flatten(0, 1).flatten(1)


@dataclass(frozen=True, eq=False)
class TapFeatures(Wrapped):
    """Combinations ``z = basis^T p`` of what a producer reads, as a consumer reads them: in all slots side by side.

    Attributes:
        source: ``p`` at the producer.
        position_map: how it arrives at the consumer.
        basis: ``[channels p, q]``; the result has ``q slots`` columns, the slots of each combination together.
        consumer: the consumer's name.
    """

    position_map: PositionMap
    basis: Tensor = field(repr=False)
    consumer: str

    @property
    def position_maps(self) -> tuple[PositionMap, ...]:
        return (self.position_map,)

    @property
    def edges(self) -> tuple[str, ...]:
        return (self.consumer, *self.source.edges)

    def count(self, batch: Batch) -> int:
        return batch[self.consumer].positions

    def cells(self, batch: Batch) -> Tensor:
        """What the combinations are at each cell of each item ``[items, cells, q]``."""
        q, channels = self.basis.shape[1], self.position_map.channels
        basis = self.basis.view(channels, -1, q).movedim(0, 1).flatten(1)
        return self.position_map.mean_of(
            self.source.projected(batch, basis).view(-1, self.position_map.positions, channels * q)
        )

    def rows(self, batch: Batch) -> Tensor:
        if self.position_map.is_identity:  # however many rows there are
            return self.source.projected(batch, self.basis)
        padded = functional.pad(self.cells(batch), (0, 0, 0, 1))  # NO_CHANNEL reads the last, which is zero
        return padded[:, self.position_map.index].transpose(2, 3).flatten(2).flatten(0, 1)

    def inputs(self, batch: Batch) -> Tensor | None:
        """The image that the consumer slides over, if it does."""
        sizes = self.position_map.image
        return None if sizes is None else self.cells(batch).transpose(1, 2).unflatten(2, sizes)
