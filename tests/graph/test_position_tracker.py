"""Numbers of entries and of their means."""

import torch

from dagrow.axes import NO_CHANNEL
from dagrow.graph._position_tracker import MIXED, EntryMeans


def of_six_entries() -> EntryMeans:
    means = EntryMeans()
    means.next = 6
    return means


def test_a_window_of_one_is_the_entry_itself() -> None:
    means = of_six_entries()
    assert means.of(torch.tensor([[4], [NO_CHANNEL], [MIXED]])).tolist() == [4, NO_CHANNEL, MIXED]
    assert means.next == 6


def test_means_get_new_numbers_that_stand_for_their_entries() -> None:
    means = of_six_entries()
    numbers = means.of(torch.tensor([[0, 1, NO_CHANNEL], [2, 3, 4], [NO_CHANNEL] * 3]))
    assert numbers.tolist() == [6, 7, NO_CHANNEL]
    entries = [sorted(entry for entry in row if entry >= 0) for row in means.entries(numbers).tolist()]
    assert entries == [[0, 1], [2, 3, 4], []]


def test_means_of_means_are_those_of_all_their_entries() -> None:
    means = of_six_entries()
    pairs = means.of(torch.tensor([[0, 1], [2, 3]]))
    both = means.of(pairs[None])
    assert sorted(means.entries(both)[0].tolist()) == [0, 1, 2, 3]
    assert means.entries(torch.tensor([5])).flatten().tolist() == [5]


def test_what_is_unknown_makes_a_mean_unknown() -> None:
    assert of_six_entries().of(torch.tensor([[0, MIXED], [1, 2]])).tolist()[0] == MIXED
