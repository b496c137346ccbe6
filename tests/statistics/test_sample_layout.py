"""Which rows belong to which sample."""

import pytest
import torch
from torch import Tensor

from dagrow.statistics._sample_layout import Replacement, SampleLayout, layout_of, rows_changed

N = 4
LAYOUTS = {
    "samples": ((N,), SampleLayout()),
    "samples first": ((N, 5), SampleLayout()),
    "samples first, square": ((N, N), SampleLayout()),
    "time first": ((5, N), SampleLayout(1)),
    "time first, square": ((N, N), SampleLayout(1)),
    "samples in the middle": ((3, N, 2), SampleLayout(1)),
    "rows of a sample together": ((N * 6,), SampleLayout(0, 1, 6)),
    "views one after another": ((2 * N,), SampleLayout(0, 2, 1)),
    "views of several rows": ((2 * N * 3,), SampleLayout(0, 2, 3)),
    "heads beside samples, time first": ((5, N * 2), SampleLayout(1, 1, 2)),
    "samples beside heads": ((2 * N, 5), SampleLayout(0, 2, 1)),
}


def owners(dims: tuple[int, ...], layout: SampleLayout) -> Tensor:
    """The sample that each entry belongs to."""
    index = torch.arange(dims[layout.dim]) // layout.inner % N
    return index.view(-1, *[1] * (len(dims) - layout.dim - 1)).expand(dims)


@pytest.mark.parametrize(("dims", "layout"), LAYOUTS.values(), ids=LAYOUTS)
def test_what_changes_with_a_sample_tells_where_samples_lie(dims: tuple[int, ...], layout: SampleLayout) -> None:
    mine = owners(dims, layout)
    only = torch.arange(N) == 1
    assert layout_of(mine == 1, N, only, 0) == layout
    everywhere = torch.ones(dims, dtype=torch.bool)
    assert layout_of(everywhere, N, only, 0) is None
    assert layout_of(mine <= 1, N, only, 0) is None
    assert layout_of(mine <= 1, N, torch.arange(N) <= 1, layout.dim) == layout


@pytest.mark.parametrize(("dims", "layout"), LAYOUTS.values(), ids=LAYOUTS)
def test_samples_come_first_with_all_of_their_rows(dims: tuple[int, ...], layout: SampleLayout) -> None:
    mine = owners(dims, layout)
    place = torch.arange(mine.numel()).view(dims)
    rows = layout.samples_first(torch.stack([mine, place], -1), N).reshape(N, -1, 2)
    assert torch.equal(rows[..., 0], torch.arange(N)[:, None].expand(rows.shape[:2]))
    assert bool((rows[:, 1:, 1] > rows[:, :-1, 1]).all())  # in the order in which they lay


@pytest.mark.parametrize(
    ("layout", "size", "n", "expected"),
    [
        (SampleLayout(1), 7, 7, SampleLayout(1)),
        (SampleLayout(0, 1, 6), 28, 7, SampleLayout(0, 1, 4)),
        (SampleLayout(0, 6, 1), 28, 7, SampleLayout(0, 4, 1)),
        (SampleLayout(0, 2, 3), 42, 7, SampleLayout(0, 2, 3)),
        (SampleLayout(0, 2, 3), 28, 7, None),  # of both numbers either may be another one
        (SampleLayout(), 14, 7, None),
        (SampleLayout(0, 1, 6), 29, 7, None),
    ],
)
def test_batches_of_other_sizes(layout: SampleLayout, size: int, n: int, expected: SampleLayout | None) -> None:
    assert layout.resized(size, n) == expected


def test_rounding_is_no_change() -> None:
    before = torch.randn(6, 3)
    after = before.clone()
    after[2] *= 1 + 1e-6
    after[4, 1] += 0.1
    assert rows_changed(before, after, 1).tolist() == [False] * 4 + [True, False]
    assert rows_changed(torch.arange(4).view(2, 2), torch.tensor([[0, 1], [2, 4]]), 1).tolist() == [False, True]


@pytest.mark.parametrize("batch_dim", [0, 1])
def test_a_replaced_sample_is_like_others_of_the_batch(batch_dim: int) -> None:
    """Ids stay ids, masks stay masks; what has no samples stays, and so does the user's batch."""
    ids = torch.tensor([[1, 2, 3], [1, 2, 3], [1, 2, 4], [7, 8, 9]]).movedim(0, batch_dim)
    mask, scale = torch.tensor([True, True, True, False]), torch.tensor(2.0)
    batch = {"ids": ids, "rest": (mask, scale, "name")}
    before = ids.clone()
    replacement = Replacement.of(batch, 4, batch_dim)
    assert replacement is not None
    changed = replacement.batch
    assert isinstance(changed, dict)
    assert changed["ids"].movedim(batch_dim, 0).tolist() == [[1, 2, 3], [7, 8, 9], [1, 2, 4], [7, 8, 9]]
    assert changed["rest"][0].tolist() == [True, False, True, False]
    assert changed["rest"][1:] == (scale, "name")
    assert torch.equal(ids, before)
    assert Replacement.of(torch.ones(4, 2), 4, 0) is None
