"""Places where neurons can be added, and how many."""

from typing import Any

import pytest
import torch
from torch import nn
from zoo import Stream, Twice

import dagrow
from dagrow import AddNeurons, GrowthError


def places_of(operator: AddNeurons, model: nn.Module) -> list[tuple[str, int]]:
    dag = dagrow.trace(model, torch.randn(2, 3))
    return [(candidate.where, candidate.tests) for candidate in operator.candidates(dag)]


@pytest.mark.parametrize(
    ("operator", "tests"),
    [
        (AddNeurons(), 1),
        (AddNeurons(k=2), 0),
        (AddNeurons(init="random_features"), 1),
        (AddNeurons(k=1, init="random"), 0),
    ],
)
def test_chance_is_asked_about_where_the_number_is_open(operator: AddNeurons, tests: int) -> None:
    stream = "embed+downs.0+downs.1"
    expected = [stream] * 3 + ["ups.0", "ups.1"]  # on the stream a new channel is written at one of three depths
    assert sorted(places_of(operator, Stream())) == [(name, tests) for name in sorted(expected)]


@pytest.mark.parametrize("init", ["zero", "copy", "gradmax"])
def test_what_preserves_the_function_has_one_place_an_axis(init: Any) -> None:
    found = places_of(AddNeurons(k=1, init=init), Stream())
    assert sorted(found) == [("embed+downs.0+downs.1", 0), ("ups.0", 0), ("ups.1", 0)]


def test_only_the_axes_that_are_named_are_considered() -> None:
    assert places_of(AddNeurons(k=1, axes=("ups.1",)), Stream()) == [("ups.1", 0)]
    with pytest.raises(GrowthError, match=r"cannot grow head \(is an output of the model\)"):
        places_of(AddNeurons(k=1, axes=("head",)), Stream())


def test_an_init_that_fits_no_axis_is_refused_with_those_that_do() -> None:
    for axes in (None, ("first+again",)):
        with pytest.raises(GrowthError, match="Give init='zero' or 'copy'"):
            places_of(AddNeurons(k=1, axes=axes), Twice())
    assert places_of(AddNeurons(k=1, init="zero"), Twice()) == [("first+again", 0)]


@pytest.mark.parametrize(
    ("operator", "least"),
    [
        (AddNeurons(), 1),
        (AddNeurons(k=3), 3),
        (AddNeurons(k=3, paired=True), 6),
        (AddNeurons(k=3, paired=True, init="zero"), 3),
    ],
)
def test_pairs_count_twice(operator: AddNeurons, least: int) -> None:
    assert operator.least_neurons == least
