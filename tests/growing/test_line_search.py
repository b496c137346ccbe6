"""Amplitudes: the lowest loss, whatever the units and the scale."""

from math import inf
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dagrow
from dagrow import (
    AddNeurons,
    Budget,
    ByLineSearch,
)
from dagrow.growing._line_search import line_search


def test_a_line_search_finds_the_same_falls_whatever_the_units_of_activations() -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 5, dtype=torch.float64)
    y = torch.tanh(x @ torch.randn(5, 6).double()) @ torch.randn(6, 3).double()
    operators = [AddNeurons(k=1, ridge=0.0, folds=1), dagrow.AddConnection(ridge=0.0, folds=1)]
    found = []
    for scale in (1.0, 8.0):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)).double()
        with torch.no_grad():
            model[2].weight.mul_(scale)
            model[2].bias.mul_(scale)
            model[4].weight.div_(scale)
        growths = dagrow.propose(dagrow.trace(model, x), [(x, y)], nn.functional.mse_loss, operators)
        values = ByLineSearch().values(growths, growths[0].objective, ())
        assert all(0 < value < growths[0].loss(0.0) for value in values)
        found.append({(g.where, g.neurons): (value, g.gain) for g, value in zip(growths, values, strict=True)})
    assert found[0].keys() == found[1].keys()
    assert len(found[0]) > 3
    ratios = [[b / a for a, b in zip(found[0][at], found[1][at], strict=True)] for at in found[0]]
    assert all(fall == pytest.approx(1, rel=0.01) for fall, _ in ratios)
    assert max(gain for _, gain in ratios) / min(gain for _, gain in ratios) == pytest.approx(64)


def test_a_line_search_never_takes_what_lowers_the_loss_nowhere() -> None:
    torch.manual_seed(0)
    x = torch.randn(60, 3)
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1))
    operators = [AddNeurons(k=1, folds=1), AddNeurons(k=1, init="zero")]
    learned = (x[:, :1] * x[:, 1:2]).sign()
    fitted, kept = dagrow.propose(dagrow.trace(model, x), [(x, learned)], nn.functional.mse_loss, operators)
    best = model(x).detach()  # no growth can do better than that
    judge = fitted.objective.with_batches([(x, best)], "validation")
    assert ByLineSearch().values([fitted, kept], judge, ()) == [-inf, 0.0]
    assert dagrow.plan([fitted, kept], policy=ByLineSearch()) == [fitted, kept]


def scaled(scale: float) -> tuple[dagrow.Dag, list[Any], Any]:
    """A small network, its data, and a loss times a scale."""
    torch.manual_seed(1)
    x = torch.randn(300, 5, dtype=torch.float64)
    y = torch.tanh(x @ torch.randn(5, 6).double()) @ torch.randn(6, 3).double()
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    return dagrow.trace(model, x[:2]), [(x, y)], lambda output, target: scale * nn.functional.mse_loss(output, target)


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e7])
def test_the_scale_of_the_loss_makes_no_difference_to_a_plan(scale: float) -> None:
    operators = [AddNeurons(k=1), dagrow.AddConnection(), dagrow.AddLayer(3, nn.Tanh())]
    found = []
    for times in (1.0, scale):
        growths = dagrow.propose(*scaled(times), operators)
        falls = ByLineSearch().values(growths, growths[0].objective, ())
        found.append(
            (
                {(g.operator, g.where): fall / times for g, fall in zip(growths, falls, strict=True)},
                [(g.operator, g.where) for g in dagrow.plan(growths, Budget(growths=4))],
            )
        )
    (one, plan), (other, plan_of_other) = found
    assert len(one) > 10
    assert one == pytest.approx(other, rel=1e-6)
    assert plan == plan_of_other


@pytest.mark.parametrize("scale", [1e-6, 1e7])
def test_the_scale_of_the_loss_makes_no_difference_to_grow(scale: float) -> None:
    one, other = (dagrow.grow(*scaled(times), [AddNeurons(k=1)]) for times in (1.0, scale))
    assert one.where == other.where
    assert one.loss_after == pytest.approx(other.loss_after / scale, rel=1e-6)


def test_amplitudes_at_which_the_loss_overflows_are_not_chosen() -> None:
    torch.manual_seed(0)
    x = torch.randn(400, 3)
    batches = [(x, torch.poisson((x[:, :1] + x[:, 1:2] * x[:, 2:]).exp().clamp(max=50)))]

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.poisson_nll_loss(1e3 * output, target)

    dag = dagrow.trace(nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1)), x[:2])
    with torch.no_grad():
        dag.model[2].weight.mul_(1e-3)
        dag.model[2].bias.zero_()
    growth = dagrow.propose(dag, batches, loss, [dagrow.AddLayer(4)])[0]
    with pytest.raises(dagrow.LossError, match="the loss is inf"):
        growth.loss(1e6)
    receipt = dagrow.grow(dag, batches, loss, [dagrow.AddLayer(4)])
    assert 0 < receipt.gamma < 1e6
    assert receipt.loss_after < receipt.loss_before


def unbounded(gamma: float) -> float:
    return 1 - gamma


def levelling(gamma: float) -> float:
    return 1 - 0.3 * gamma / (gamma + 1)


def levelling_above(gamma: float) -> float:
    """It has a minimum on the way, and rises to where it levels out."""
    return 1 - 0.3 * gamma / (gamma + 1) ** 1.01


@pytest.mark.parametrize("start", [1 / 16, 1.0, 2.0**20, 2.0**30])
def test_an_amplitude_is_bounded_where_the_loss_falls_on_and_on(start: float) -> None:
    found = line_search(unbounded, 1.0, start)
    assert found.gamma == 256 * start
    assert "falls on and on" in found.note
    for loss in (levelling, levelling_above):
        found = line_search(loss, 1.0, start)
        assert 1 < found.gamma < 100
        assert found.loss < 1 - 0.9 * 0.28
        assert "levels out" in found.note or found.gamma == 256 * start
    found = line_search(lambda gamma: (gamma - start) ** 2, start**2, start)
    assert found.gamma == pytest.approx(start, rel=0.05)
    assert not found.note
    found = line_search(lambda gamma: (gamma - start) ** 2, start**2, 1.6 * start)  # as low at a quarter of that
    assert found.gamma == pytest.approx(start, rel=0.05)
    assert not found.note


class PostNorm(nn.Module):
    """A norm behind the sum: the larger the amplitude, the less it matters."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.a, self.b = nn.Embedding(11, 6), nn.Linear(6, 5), nn.Linear(5, 6)
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        return self.head(self.norm(x + self.b(torch.relu(self.a(x)))))


def test_random_tokens_do_not_make_amplitudes_run_away(caplog: pytest.LogCaptureFixture) -> None:
    bounded = 0
    for seed in range(6):
        model = PostNorm()
        generator = torch.Generator().manual_seed(seed)
        tokens, targets = torch.randint(11, (2, 200), generator=generator)
        dag = dagrow.trace(model, tokens)
        old = float(model.b.weight.detach().square().mean().sqrt())
        with caplog.at_level("WARNING", "dagrow"):
            receipt = dagrow.grow(dag, [(tokens, targets)], nn.functional.cross_entropy, [AddNeurons(k=3, folds=1)])
        bounded += bool(receipt.note)
        assert receipt.loss_after < receipt.loss_before
        assert float(model.b.weight.detach().abs().max()) < 300 * old
        assert receipt.note in str(receipt)
    assert bounded
    assert len([message for message in caplog.messages if "amplitude" in message]) == bounded


def test_a_loss_without_a_minimum_is_not_followed_forever() -> None:
    dag, batches, _ = scaled(1.0)
    before = float(dag.model[4].weight.detach().abs().max())
    receipt = dagrow.grow(dag, batches, lambda o, t: (o * t).mean(), [AddNeurons(k=1, folds=1)])
    assert receipt.loss_after < receipt.loss_before
    assert "falls on and on" in str(receipt)
    assert float(dag.model[4].weight.detach().abs().max()) < 100 * before
