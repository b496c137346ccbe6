"""A narrowing is a widening read backwards."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dagrow
from dagrow.axes._index_map import DROPPED, CannotWidenError, drop_units
from dagrow.axes._narrowing import _Mirror


def test_entries_of_units_go_and_all_others_move_together() -> None:
    at = drop_units(torch.tensor([0, 1, 2, -1, 0, 1, 2]), torch.tensor([1, 0]), 3)
    assert (at.dim, at.size) == (3, 3)
    assert at.old.tolist() == [DROPPED, DROPPED, 0, 1, DROPPED, DROPPED, 2]
    assert (at.kept.tolist(), at.landed.tolist(), at.new.shape) == ([2, 3, 6], [0, 1, 2], (0, 2))


@pytest.mark.parametrize(
    ("old", "new", "wanted"),
    [
        (6, 8, 4),
        ((-1, 6, 3), (-1, 8, 3), (-1, 4, 3)),
        ([6, 2], [8, 2], [4, 2]),
        (slice(6, 12), slice(8, 16), slice(4, 8)),
        ((..., slice(None, 6)), (slice(None), slice(None), slice(None, 8)), (slice(None), slice(None), slice(None, 4))),
        ({"dim": 1, "size": 6}, {"dim": 1, "size": 8}, {"dim": 1, "size": 4}),
        (0.5, 0.5, 0.5),
        (True, True, True),
    ],
)
def test_sizes_lose_what_they_would_win(old: Any, new: Any, wanted: Any) -> None:
    assert _Mirror().of(old, new) == wanted


@pytest.mark.parametrize(("old", "new"), [(6, [4, 4]), (0.5, 0.25), ((6,), (8, 1)), (None, 3), ({"a": 1}, {"b": 1})])
def test_what_is_no_matter_of_sizes_is_refused(old: Any, new: Any) -> None:
    with pytest.raises(CannotWidenError, match="called in another way"):
        _Mirror().of(old, new)


class Literal(nn.Module):
    """Sizes of an axis, and of an axis in the middle of a concatenation, are written into the forward."""

    def __init__(self, h: int = 6) -> None:
        super().__init__()
        self.up, self.side, self.down = nn.Linear(3, h), nn.Linear(3, 2), nn.Linear(h + 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat([self.up(x).view(-1, 6), self.side(x)], 1)
        first, second = h.split([6, 2], 1)
        return self.down(torch.cat([first[..., :6].relu(), second], 1))


@pytest.mark.parametrize("units", [[0], [5], [1, 3], [0, 2, 4, 5]])
def test_literals_follow(units: list[int]) -> None:
    torch.manual_seed(0)
    model, x = Literal().double(), torch.randn(5, 3).double()
    dag = dagrow.trace(model, x)
    with torch.no_grad():
        model.down.weight[:, units] = 0
    expected = model(x)
    axis = dag.axis("up")
    dagrow.surgery._apply.apply(dag, dagrow.surgery.removal(dag, axis, torch.tensor(units), {}), 1.0)
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    assert model.down.weight.shape == (2, 8 - len(units))


def test_units_of_several_channels_and_groups_of_one_keep_two() -> None:
    image = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3, groups=4), nn.ReLU(), nn.Conv2d(4, 2, 3))
    dag = dagrow.trace(image, torch.randn(1, 2, 9, 9))
    assert dag.axis("0").layout.least == 2
    with pytest.raises(dagrow.GrowthError, match="4 wide, and 2 have to stay"):
        dag.narrowing(dag.axis("0"), torch.arange(3))
    plain = dagrow.trace(nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1)), torch.randn(1, 2))
    assert plain.axis("0").layout.least == 1
    assert plain.narrowing(plain.axis("0"), torch.arange(3)).rows["0"].size == 1
