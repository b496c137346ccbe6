"""Features that arrive elsewhere than where they are written: moved, pulled back, or read under a kernel's taps."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dagrow.statistics._captures import Batch
from dagrow.statistics._features import Feature, OutputGoal, ResidualGoal
from dagrow.statistics._position_map import PositionMap


@dataclass(frozen=True, eq=False)
class MovedFeatures(Feature):
    """What a producer reads, ``p``, as it arrives where a consumer reads: ``sqrt(w) A p`` at each cell.

    A consumer that reads a cell in several slots (the taps of its kernel) has a fan-out for each of them. Weighted by
    the part w of the slots that read a cell, ``E p p^T`` is the mean over slots of their Grams.

    Attributes:
        source: the features at the producer ``[n S, p]``; the result has ``channels p`` columns.
    """

    source: Feature
    arrival: PositionMap

    @property
    def arrivals(self) -> Sequence[PositionMap]:
        return (self.arrival,)

    @property
    def edges(self) -> tuple[str, ...]:
        return self.source.edges

    def count(self, batch: Batch) -> int:
        return batch.samples * len(self.arrival.cells)

    def rows(self, batch: Batch) -> Tensor:
        source, arrival = self.source.rows(batch), self.arrival
        source = source.view(batch.samples, -1, source.shape[1])
        found = source
        if not arrival.whole:
            spread = source.movedim(0, 1).flatten(1)
            found = arrival.matrix.to(spread) @ spread
            found = found.view(-1, arrival.channels, *source[:, 0].shape).permute(2, 0, 1, 3).flatten(2)
        return (found * arrival.weights.sqrt().to(found)[:, None]).flatten(0, 1)


@dataclass(frozen=True, eq=False)
class PulledGoal(Feature):
    """A goal (or what remains of it), pulled back to the cells that the consumer reads: ``sum over t of v(t)`` by
    slot, over the positions t that read the cell in that slot, divided by ``sqrt(w)``; ``slots o`` columns."""

    goal: OutputGoal | ResidualGoal
    arrival: PositionMap

    @property
    def arrivals(self) -> Sequence[PositionMap]:
        return (self.arrival,)

    @property
    def edges(self) -> tuple[str, ...]:
        return self.goal.edges

    @property
    def goals(self) -> tuple[str, ...]:
        return self.goal.edges

    def count(self, batch: Batch) -> int:
        return batch.samples * len(self.arrival.cells)

    def rows(self, batch: Batch) -> Tensor:
        goals, index = self.goal.rows(batch), self.arrival.index
        goals = goals.view(batch.samples, -1, goals.shape[1])
        found = goals.new_zeros(len(goals), len(self.arrival.cells), index.shape[1], goals.shape[2])
        for slot in range(index.shape[1]):
            read = torch.nonzero(index[:, slot] >= 0).flatten()
            found[:, :, slot].index_add_(1, index[read, slot], goals[:, read])
        return (found / self.arrival.weights.sqrt().to(found)[:, None, None]).flatten(0, 1).flatten(1)


@dataclass(frozen=True, eq=False)
class TapFeatures(Feature):
    """Combinations ``z = basis^T p`` of what a producer reads, as a consumer reads them: in all slots side by side.

    Attributes:
        basis: ``[channels p, q]``; the result has ``q slots`` columns, the slots of each combination together.
    """

    source: Feature
    arrival: PositionMap
    basis: Tensor = field(repr=False)
    consumer: str

    @property
    def arrivals(self) -> Sequence[PositionMap]:
        return (self.arrival,)

    @property
    def edges(self) -> tuple[str, ...]:
        return (self.consumer, *self.source.edges)

    def cells(self, batch: Batch) -> Tensor:
        """What the combinations are at each cell ``[n, cells, q]``."""
        q, channels = self.basis.shape[1], self.arrival.channels
        basis = self.basis.view(channels, -1, q).movedim(0, 1).flatten(1)
        return self.arrival.mean_of(self.source.projected(batch, basis).view(batch.samples, -1, channels * q))

    def rows(self, batch: Batch) -> Tensor:
        cells = self.cells(batch)
        padded = torch.cat([cells, cells.new_zeros(len(cells), 1, cells.shape[2])], 1)  # NEUTRAL is the last
        return padded[:, self.arrival.index].transpose(2, 3).flatten(2).flatten(0, 1)

    def image(self, batch: Batch) -> Tensor | None:
        """The image that the consumer slides over, if it does."""
        sizes = self.arrival.image
        return None if sizes is None else self.cells(batch).transpose(1, 2).unflatten(2, sizes)
