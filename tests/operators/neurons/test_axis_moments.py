"""What the places of an axis share: the same for the same moments, of one axis at a time."""

import torch
from torch import nn

import dagrow
from dagrow.operators.neurons import by_axis
from dagrow.statistics import InputFeatures, Objective, OutputGoal, ResidualGoal, measure


def test_fits_are_shared_by_the_places_of_one_axis() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(30, 3).double(), torch.randn(30, 2).double()
    dag = dagrow.trace(model, x[:2])
    objective = Objective(model, [(x, y)], nn.functional.mse_loss)
    objective.probe()
    first, second = dag.axis("0"), dag.axis("2")
    (consumer,), goal = second.consumers, OutputGoal("4")
    reads = InputFeatures("4")
    m = measure(dag, objective, [(reads, reads), (reads, goal), (goal, goal)])
    shared = by_axis(project=True)
    own = shared(second, m, None)
    assert shared(second, m, None) is own
    residual = own.residual(consumer, 0.1)
    assert own.residual(consumer, 0.1) is residual
    assert isinstance(residual, ResidualGoal)
    for (train, _), move in zip(m.split(), residual.moves, strict=True):
        S, M = train[reads, reads], train[reads, goal]
        damped = S + 0.1 * torch.diag(S.diagonal())
        torch.testing.assert_close(move, torch.linalg.solve(damped, M).T)
    assert {*own.known.sums, *own.known.rows} == {(reads, reads), (reads, goal)}
    assert own.view(0.1, cancels=False) is m.rounded
    assert own.view(0.0, cancels=False) is own.view(0.1, cancels=True) is m
    shared(first, m, None)
    assert shared(second, m, None) is not own
    assert by_axis(project=False)(second, m, None).residual(consumer, 0.1) == goal
