"""Tensors of labels stay repeated where they were."""

import pytest
import torch

from dagrow.axes._label_tensors import concatenated, distinguishing_dims, reshaped, unexpanded


@pytest.mark.parametrize("shape", [(5, 2, 3, 4), (5, 6, 2, 2), (5, 24), (30, 4)])
def test_a_reshape_moves_as_torch_does(shape: tuple[int, ...]) -> None:
    labels = torch.arange(6)[:, None].expand(5, 6, 4)
    moved = reshaped(labels, shape)
    assert torch.equal(moved, labels.reshape(shape))
    assert (moved.stride(0) == 0) == (shape[0] == 5)


def test_a_concatenation_stays_repeated() -> None:
    parts = [torch.arange(n)[:, None].expand(5, n, 4) for n in (2, 3)]
    joined = concatenated(parts, dim=1)
    assert torch.equal(joined, torch.cat(parts, 1))
    assert unexpanded(joined).shape == (1, 5, 1)
    with pytest.raises(RuntimeError, match="sizes of tensors must match"):
        concatenated([parts[0], parts[1][:4]], dim=1)


def test_members_of_an_axis_differ_along_its_dimensions() -> None:
    labels = torch.tensor([[0, 1], [2, 3]])
    assert distinguishing_dims(labels, torch.ones(2, 2, dtype=torch.bool)) == [0, 1]
    assert distinguishing_dims(labels[:, :1].expand(2, 2), torch.ones(2, 2, dtype=torch.bool)) == [0]
    assert distinguishing_dims(labels, torch.zeros(2, 2, dtype=torch.bool)) == []
