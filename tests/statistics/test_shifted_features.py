"""Features moved to where they arrive, and goals pulled back there, against loops over positions and slots."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dagrow.axes import NO_CHANNEL
from dagrow.graph import PositionMap
from dagrow.statistics import MovedFeatures, PulledGoal, TapFeatures
from dagrow.statistics._captures import Batch
from dagrow.statistics._features import Feature

SAMPLES = 3


@dataclass(frozen=True, eq=False)
class Given(Feature):
    """Rows that are known."""

    tensor: Tensor = field(repr=False)

    @property
    def edges(self) -> tuple[str, ...]:
        return ()

    def count(self, batch: Batch) -> int:
        return len(self.tensor)

    def rows(self, batch: Batch) -> Tensor:
        return self.tensor


def pooled() -> PositionMap:
    """Five positions of one channel; pairs of them are averaged and read by windows of two."""
    cells = torch.tensor([[0, 1], [1, 2], [4, NO_CHANNEL]])
    index = torch.tensor([[0, 1], [1, 2], [2, NO_CHANNEL], [2, 0]])
    return PositionMap(cells, index, positions=5, channels=1, grids={})


def by_loop(position_map: PositionMap, rows: Tensor) -> Tensor:
    """What is read at each position in each slot ``[n, positions', slots, p]``."""
    features = rows.view(SAMPLES, position_map.positions, -1)
    read = torch.zeros(SAMPLES, *position_map.index.shape, features.shape[2], dtype=rows.dtype)
    for t, slots in enumerate(position_map.index.tolist()):
        for slot, cell in enumerate(slots):
            if cell >= 0:
                entries = [entry for entry in position_map.cells[cell].tolist() if entry >= 0]
                read[:, t, slot] = features[:, entries].mean(1)
    return read


def setting() -> tuple[PositionMap, Tensor, Tensor, Batch]:
    torch.manual_seed(0)
    position_map = pooled()
    p = torch.randn(SAMPLES * position_map.positions, 2, dtype=torch.float64)
    v = torch.randn(SAMPLES * len(position_map.index), 3, dtype=torch.float64)
    return position_map, p, v, Batch({}, SAMPLES)


def test_products_with_pulled_goals_are_those_where_features_are_read() -> None:
    position_map, p, v, batch = setting()
    moved = MovedFeatures(Given(p), position_map).rows(batch)
    goal: Any = Given(v)
    pulled = PulledGoal(goal, position_map).rows(batch).unflatten(1, (position_map.slots, -1))
    read = by_loop(position_map, p).flatten(0, 1)
    torch.testing.assert_close(
        torch.einsum("cp,cso->spo", moved, pulled), torch.einsum("tsp,to->spo", read, v), rtol=1e-12, atol=1e-12
    )


def test_the_gram_of_moved_features_is_the_mean_over_slots() -> None:
    position_map, p, _, batch = setting()
    moved, read = MovedFeatures(Given(p), position_map).rows(batch), by_loop(position_map, p).flatten(0, 2)
    torch.testing.assert_close(moved.T @ moved, read.T @ read / position_map.slots, rtol=1e-12, atol=1e-12)


def test_taps_stand_side_by_side() -> None:
    position_map, p, _, batch = setting()
    basis = torch.randn(2, 4, dtype=torch.float64)
    taps = TapFeatures(Given(p), position_map, basis, "reader").rows(batch)
    expected = (by_loop(position_map, p) @ basis).flatten(0, 1).transpose(1, 2).flatten(1)
    torch.testing.assert_close(taps, expected, rtol=1e-12, atol=1e-12)
