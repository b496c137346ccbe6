"""What is picked by the numbers in tensors has the labels of what it is picked from."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dagrow.axes._label_lookups import gathered, indexed, indexed_dims, moves_by_numbers

NUMBERS = torch.arange(3 * 5 * 4).view(3, 5, 4)
LABELS = torch.arange(4).expand(3, 5, 4)


@pytest.mark.parametrize(
    ("index", "dims"),
    [
        ((slice(None), torch.tensor([2, 0])), [1]),
        ((torch.tensor([[2, 0]]), None, torch.tensor([1, 1])), [0, 1]),
        ((..., torch.tensor([0, 1]), slice(None)), [1]),
        ((slice(None), torch.tensor([True, False, True, True, False])), [1]),
        ((NUMBERS[:, :, 0] > 20,), [0, 1]),
        ((0, torch.tensor(3)), [1]),
    ],
)
def test_an_index_with_tensors(index: tuple[Any, ...], dims: list[int]) -> None:
    meta = tuple(part.to("meta") if isinstance(part, Tensor) else part for part in index)
    assert indexed_dims(index, meta, 3) == dims
    unknown = tuple(torch.full_like(part, -1, dtype=torch.long) if isinstance(part, Tensor) else part for part in index)
    labels = indexed(LABELS, unknown, meta, NUMBERS.to("meta"), NUMBERS[index])
    assert torch.equal(labels, LABELS[index])


def test_entries_gathered_along_a_dimension() -> None:
    index = torch.tensor([4, 0])
    assert torch.equal(gathered(LABELS, 1, index), LABELS.index_select(1, index))
    index = index[None, :, None].expand(2, 2, 3)
    assert torch.equal(gathered(LABELS, 1, index), LABELS.gather(1, index))


def test_which_moves_depend_on_numbers_in_tensors() -> None:
    assert moves_by_numbers("getitem", (LABELS, (0, NUMBERS)), {})
    assert moves_by_numbers("repeat_interleave", (LABELS, NUMBERS), {"dim": 1})
    assert not moves_by_numbers("expand_as", (LABELS, NUMBERS), {})
    assert not moves_by_numbers("cat", ([LABELS, LABELS], 1), {})
