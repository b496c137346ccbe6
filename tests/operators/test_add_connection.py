"""New connections, against least squares by brute force."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from wired import DOUBLE, Wired, data, energy, images, left, loss, named, seen, truths, wired

import dagrow
from dagrow import AddConnection, GrowthError

SOME = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])


@given(wired())
@SOME
def test_gains_are_those_of_least_squares_and_no_candidate_is_missed(model: Wired) -> None:
    x, y = data(model)
    dag, expected = dagrow.trace(model, x[:2]), truths(model, x, y)
    batches = list(zip(x.split(60), y.split(60), strict=True))
    growths = dagrow.propose(dag, batches, loss, [AddConnection(folds=1)])
    found = {named(model, growth.where): growth for growth in growths}
    assert found.keys() == expected.keys()
    scale = {node: 1e-8 * energy(goal) for node, goal in seen(model, x, y)[1].items()}
    for place, growth in found.items():
        assert growth.gain == pytest.approx(expected[place], rel=0, abs=scale[place[1]])
        assert growth.drop == pytest.approx(expected[place], rel=0, abs=scale[place[1]])
    if growths:
        best = max(expected.values())
        assert expected[named(model, growths[0].where)] == pytest.approx(best, rel=0, abs=2 * max(scale.values()))


@given(wired(), st.integers(1, 3))
@SOME
def test_the_rank_is_the_best_of_its_rank(model: Wired, rank: int) -> None:
    """Reduced-rank regression by brute force: the leading singular values of what the fit adds."""
    x, y = data(model)
    values, goals = seen(model, x, y)
    dag = dagrow.trace(model, x[:2])
    for growth in dagrow.propose(dag, [(x, y)], loss, [AddConnection(rank=rank, folds=1)]):
        source, node = named(model, growth.where)
        into = [(a, layer.bias) for (a, b), layer in zip(model.wires, model.layers, strict=True) if b == node]
        known = torch.cat([*(values[a] for a, _ in into), torch.ones(len(x), 1).double()], 1)
        if all(bias is None for _, bias in into):
            continue  # the constant is new then, too
        left([known, values[source]], goals[node])
        project = known @ torch.linalg.pinv(known)
        new, goal = values[source] - project @ values[source], goals[node] - project @ goals[node]
        u, s, _ = torch.linalg.svd(new, full_matrices=False)
        explained = torch.linalg.svdvals(u[:, s > 1e-9 * s.max()].T @ goal).square()[:rank].sum() / len(x)
        assert growth.drop == pytest.approx(float(explained), rel=0, abs=1e-8 * energy(goals[node]))


@pytest.mark.parametrize("kernel", [1, 3])
def test_gains_between_images_are_those_of_unfolded_least_squares(kernel: int) -> None:
    model, batches = images()
    x, y = (torch.cat(part) for part in zip(*batches, strict=True))
    dag = dagrow.trace(model, x[:2])
    growths = {g.where: g for g in dagrow.propose(dag, batches, loss, [AddConnection(kernel=kernel, folds=1)])}
    assert growths.keys() == {
        "x -> second",
        "x -> third",
        "x -> last",
        "norm -> third",
        "norm -> last",
        "second -> last",
    }
    one = torch.tanh(model.norm(model.first(x)))
    a = model.second(one).detach().requires_grad_()
    wanted = (
        -torch.autograd.grad(
            (model.last(torch.tanh(model.third(torch.tanh(a))).mean((2, 3))) - y).square().sum() / 2, a
        )[0]
        .flatten(2)
        .transpose(1, 2)
        .flatten(0, 1)
    )
    rows = functional.unfold(one, 3, padding=1, stride=2).transpose(1, 2).flatten(0, 1).detach()
    new = functional.unfold(x, kernel, padding=kernel // 2, stride=2).transpose(1, 2).flatten(0, 1)
    ones = torch.ones(len(rows), 1, dtype=DOUBLE)
    fall = (left([rows, ones], wanted) - left([rows, ones, new], wanted)) * len(rows) / len(x)
    assert growths["x -> second"].gain == pytest.approx(fall, rel=1e-8)
    out = -(model(x) - y).detach()
    pooled = torch.tanh(model.third(torch.tanh(model.second(one)))).mean((2, 3)).detach()
    ones = torch.ones(len(x), 1, dtype=DOUBLE)
    fall = left([pooled, ones], out) - left([pooled, ones, one.mean((2, 3)).detach()], out)
    assert growths["norm -> last"].gain == pytest.approx(fall, rel=1e-8)


def test_where_everything_is_joined_nothing_is_proposed() -> None:
    x, y = torch.randn(40, 3), torch.randn(40, 2)
    dag = dagrow.trace(nn.Sequential(nn.Linear(3, 2)), x[:2])
    assert dagrow.propose(dag, [(x, y)], loss, [AddConnection()]) == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AddConnection(rank=0), "rank=0"),
        (lambda: AddConnection(kernel=1.5), "kernel=1.5"),
        (lambda: AddConnection(targets="two"), "give a tuple of names"),
    ],
)
def test_settings_of_connections_that_make_no_sense(make, message: str) -> None:
    with pytest.raises(GrowthError, match=message):
        make()
