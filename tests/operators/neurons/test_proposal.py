"""Directions at random, and the size that they are brought to."""

import torch
from perceptrons import mlp
from torch import Tensor
from torch.nn.functional import mse_loss

import dagrow
from dagrow.operators import Place, Proposal
from dagrow.operators.neurons import places
from dagrow.operators.neurons._proposal import drawn, normal, propose_along
from dagrow.statistics import Objective, measure


def place_of(width: int = 4) -> tuple[Place, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(30, 3).double() * torch.tensor([1.0, 20.0, 0.1]).double()
    dag = dagrow.trace(mlp(3, width, 2), x[:2])
    (place,) = places(dag, dag.axis("0"))
    return place, x


def proposed(place: Place, x: Tensor, proposal: Proposal | None) -> Proposal | None:
    """What comes of directions once they are scaled."""
    steps = propose_along(place, lambda m, place: proposal)
    objective = Objective(place.dag.model, [(x, torch.zeros(30, 2).double())], mse_loss)
    try:
        steps.send(measure(place.dag, objective, next(steps).pairs, folds=1))
    except StopIteration as end:
        return end.value
    raise AssertionError("one pass is enough")


def test_what_new_units_compute_has_a_mean_square_of_one() -> None:
    place, x = place_of()
    alpha = torch.randn(place.width, 5).double()
    found = proposed(place, x, Proposal(alpha))
    assert found is not None
    rows = torch.cat([x, torch.ones(30, 1).double()], 1)
    torch.testing.assert_close((rows @ found.alpha).square().mean(0), torch.ones(5).double())
    torch.testing.assert_close(torch.cosine_similarity(found.alpha, alpha, 0), torch.ones(5).double())


def test_other_directions_come_beside_the_first() -> None:
    place, x = place_of()
    found = proposed(place, x, Proposal(torch.eye(4).double()[:, :2], other=torch.eye(4).double()[:, 2:]))
    assert found is not None
    assert (found.alpha != 0).tolist() == torch.eye(4).bool().tolist()


def test_no_directions_are_none() -> None:
    place, x = place_of()
    assert proposed(place, x, None) is None
    assert proposed(place, x, Proposal(torch.empty(4, 0).double())) is None


def test_draws_repeat_until_the_axis_has_another_width() -> None:
    (place, _), (wider, _) = place_of(), place_of(5)
    first = drawn(place, 3, seed=1)
    assert first.alpha.shape == (4, 3)
    assert not first.invariant
    assert torch.equal(drawn(place, 3, seed=1).alpha, first.alpha)
    assert not torch.equal(drawn(place, 3, seed=2).alpha, first.alpha)
    assert not torch.equal(drawn(wider, 3, seed=1).alpha, first.alpha)
    assert torch.equal(normal(place, 4, 3, 1), first.alpha)
