"""Of many places only the best are solved exactly; how many were looked at is known."""

import pytest
from torch import nn

import dagrow
from dagrow import AddConnection, AddLayer
from dagrow.operators import Operator


@pytest.mark.parametrize(
    ("few", "every"),
    [
        (AddConnection(exact=2), AddConnection(exact=100)),
        (AddLayer(2, nn.Tanh(), exact=2), AddLayer(2, nn.Tanh(), exact=100)),
        (AddConnection(rank=1, exact=2), AddConnection(rank=1, exact=100)),
    ],
)
def test_the_best_places_are_solved_as_if_there_were_no_others(net, few: Operator, every: Operator) -> None:
    model, batches = net
    dag = dagrow.trace(model, batches[0][0][:2])
    places = every.candidates(dag)
    (screening,) = few.candidates(dag)
    assert screening.tests == sum(place.tests for place in places) == len(places)
    found, expected = (
        {g.where: g for g in dagrow.propose(dag, batches, nn.functional.mse_loss, [operator])}
        for operator in (few, every)
    )
    assert len(expected) == len(places)
    assert len(found) == 2
    for where, growth in found.items():
        assert growth.gain == pytest.approx(expected[where].gain, rel=1e-12)
        assert growth.heldout_gain == pytest.approx(expected[where].heldout_gain, rel=1e-12)
