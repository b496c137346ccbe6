"""Neurons along directions of one's own."""

from dataclasses import dataclass

import pytest
import torch
from perceptrons import data, mlp
from torch import Tensor
from torch.nn.functional import mse_loss

import dagrow
from dagrow import GrowthError
from dagrow.operators import Place, Proposal, Widen
from dagrow.solvers import Moments
from dagrow.testing._brute_force import regressed


@dataclass(frozen=True)
class Along(Widen):
    """The largest features, or none."""

    k: int = 2

    def propose(self, m: Moments, place: Place) -> Proposal | None:
        largest = m[place.features, place.features].diagonal()[:3].argsort(descending=True)[: self.k]
        return Proposal(torch.eye(place.width, dtype=torch.float64)[:, largest]) if self.k else None


def grown(operator: Widen) -> tuple[list[dagrow.Growth], dagrow.Dag, Tensor, Tensor]:
    torch.manual_seed(0)
    model, ((x, y),) = mlp(3, 2, 2), data(n=20)
    x = x * torch.tensor([1.0, 3.0, 2.0]).double()
    dag = dagrow.trace(model, x[:2])
    return dagrow.propose(dag, [(x, y)], mse_loss, [operator]), dag, x, y


def test_new_units_look_along_what_was_proposed() -> None:
    (growth,), dag, x, _ = grown(Along(folds=1))
    growth.apply(1.0)
    rows, bias = dag.model[0].weight.detach()[2:], dag.model[0].bias.detach()[2:]
    assert (rows != 0).tolist() == [[False, True, False], [False, False, True]]
    assert not bias.any()
    torch.testing.assert_close((x @ rows.T).square().mean(0), torch.ones(2).double())  # scaled to mean square 1


def test_the_fan_out_is_the_regression_of_what_is_left() -> None:
    (growth,), dag, x, y = grown(Along(folds=1))
    goal = (y - dag.model(x)).detach()  # minus the gradient of the squared error, but for its scale
    hidden = dag.model[1](dag.model[0](x)).detach()
    left = goal - regressed(torch.cat([hidden, torch.ones(20, 1).double()], 1), goal)
    growth.apply(1.0)
    new = dag.model[1](dag.model[0](x)).detach()[:, 2:]
    new = new - new.mean(0)  # which the bias takes out
    written = new @ dag.model[2].weight.detach()[:, 2:].T
    expected = regressed(new, left)
    scale = float((written * expected).sum() / expected.square().sum())
    torch.testing.assert_close(written, scale * expected, rtol=1e-6, atol=1e-9)
    assert scale > 0


def test_where_nothing_is_proposed_nothing_grows() -> None:
    growths, *_ = grown(Along(k=0, folds=1))
    assert not growths


def test_settings_are_checked() -> None:
    assert Along().least_neurons == 1
    with pytest.raises(GrowthError, match="ridge=-1"):
        Along(ridge=-1.0)
