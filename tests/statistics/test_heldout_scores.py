"""Gains that compare: errors and z from scores of samples."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import reference as truth
import torch
from tokens import DOUBLE, N, Tokens, data, loss
from torch import Tensor, nn

import dagrow
from dagrow import AddConnection, AddLayer, AddNeurons, MoveWeights
from dagrow.operators import Place, Proposal, Widen
from dagrow.solvers import Moments
from dagrow.statistics import DirectionScore, FitScore, SampleScores

RIDGE, FOLDS = 0.1, 4


def found(operator: dagrow.Operator, model: nn.Module, where: str) -> dagrow.Growth:
    """With ridges that are known."""
    x, y = data()
    batches = list(zip(x.split(37), y.split(37), strict=True))
    growths = dagrow.propose(dagrow.trace(model, x[:2]), batches, loss, [operator])
    return next(growth for growth in growths if growth.where == where)


def regressed(X: np.ndarray, Y: np.ndarray, ridge: float) -> np.ndarray:
    """[y,x], with a ridge relative to each feature's second moment."""
    size = np.sqrt((truth.flat(X) ** 2).sum(0) / len(X))
    rows = np.vstack([truth.flat(X) / size, np.sqrt(ridge * len(X)) * np.eye(X.shape[-1])])
    wanted = np.vstack([truth.flat(Y), np.zeros((X.shape[-1], Y.shape[-1]))])
    return np.linalg.lstsq(rows, wanted, rcond=None)[0].T / size


def agrees(growth: dagrow.Growth, scores: np.ndarray, z: float | None = None) -> None:
    d, c = scores.T
    assert growth.samples == N
    assert growth.heldout_gain == pytest.approx(d.mean(), rel=1e-7)
    assert growth.heldout_error == pytest.approx(d.std(ddof=1) / N**0.5, rel=1e-7)
    assert growth.z == pytest.approx(c.sum() / np.sqrt(2 * (c**2).sum()) if z is None else z, rel=1e-7)


def test_scores_of_a_move_are_those_of_samples_one_by_one() -> None:
    model, (x, y) = Tokens(), data()
    b, v = truth.features(model, x, model.two), truth.goals(model, loss, x, y, model.two)
    scores = truth.scores(b, v, FOLDS, lambda on: (regressed(b[on], v[on], RIDGE), np.concatenate([b, v], -1)))
    agrees(found(MoveWeights(ridge=RIDGE), model, "two"), scores)


@pytest.mark.parametrize("rank", [None, 1])
def test_scores_of_a_connection(rank: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left of features and goals, too, is fitted on the other folds."""
    monkeypatch.setattr("dagrow.solvers._cross_validation.RIDGES", (1e-3,))
    model, (x, y) = Tokens(), data()
    b, v = truth.features(model, x, model.three), truth.goals(model, loss, x, y, model.three)
    p = truth.features(model, x, model.one, bias=False)

    def fit(on: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        d, dw = regressed(b[on], p[on], 1e-3), regressed(b[on], v[on], 1e-3)
        new, left = p - b @ d.T, v - b @ dw.T
        size = (truth.flat(p[on]) ** 2).sum(0) / len(on)
        gram, cross = truth.moment(new[on], new[on]) + RIDGE * np.diag(size), truth.moment(new[on], left[on])
        weights = np.linalg.solve(gram, cross).T
        if rank is not None:
            root = np.linalg.cholesky(gram)
            u, _, _ = np.linalg.svd(np.linalg.solve(root, cross))
            alpha = np.linalg.solve(root.T, u[:, :rank])
            few = truth.moment(new[on] @ alpha, new[on] @ alpha)
            unit = ((truth.flat(p[on]) @ alpha) ** 2).sum(0) / len(on)
            weights = (alpha @ np.linalg.solve(few + RIDGE * np.diag(unit), alpha.T @ cross)).T
        return weights, np.concatenate([new, left], -1)

    agrees(found(AddConnection(rank, ridge=RIDGE), model, "x -> three"), truth.scores(p, v, FOLDS, fit))


def test_scores_of_neurons(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gain is that of what the neurons compute, z that of directions from the other folds."""
    monkeypatch.setattr("dagrow.solvers._cross_validation.RIDGES", (1e-3,))
    model, (x, y) = Tokens(), data()
    b, v = truth.features(model, x, model.three), truth.goals(model, loss, x, y, model.three)
    p = truth.features(model, x, model.two)
    growth = found(AddNeurons(k=2, ridge=RIDGE), model, "two")
    growth.apply(0.0)
    h = truth.features(model, x, model.three, bias=False)[..., 3:]

    def fit(on: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        left, new = v - b @ regressed(b[on], v[on], 1e-3).T, h - truth.flat(h[on]).mean(0)
        size = (truth.flat(h[on]) ** 2).sum(0) / len(on)
        gram = truth.moment(new[on], new[on]) + RIDGE * np.diag(size)
        return np.linalg.solve(gram, truth.moment(new[on], left[on])).T, np.concatenate([new, left], -1)

    def directions(on: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        left = v - b @ regressed(b[on], v[on], 1e-3).T
        gram, cross = truth.moment(p[on], p[on]), truth.moment(p[on], left[on])
        root = np.linalg.cholesky(gram + RIDGE * np.diag(np.diag(gram)))
        u, s, vt = np.linalg.svd(np.linalg.solve(root, cross), full_matrices=False)
        alpha = np.linalg.solve(root.T, u[:, :2])
        return (alpha * s[:2] @ vt[:2]).T, np.concatenate([p, left], -1)

    c = truth.scores(p, v, FOLDS, directions)[:, 1]
    agrees(growth, truth.scores(h, v, FOLDS, fit), c.sum() / np.sqrt(2 * (c**2).sum()))


@pytest.mark.parametrize(
    "operator",
    [
        MoveWeights(ridge=RIDGE),
        AddNeurons(k=1, ridge=RIDGE),
        AddConnection(ridge=RIDGE),
        AddConnection(1, ridge=RIDGE),
        AddLayer(2, nn.Tanh(), ridge=RIDGE),
        AddNeurons(k=8, init="random_features", ridge=RIDGE),
    ],
    ids=str,
)
def test_what_judges_a_sample_has_not_seen_its_goals(
    operator: dagrow.Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other targets for a fold: what fits explain there, ``|X p|^2 = 2 c - d``, stays, and changes everywhere else.

    The activation is a rectifier, so that of each random direction the better sign is taken."""
    monkeypatch.setattr("dagrow.solvers._cross_validation.RIDGES", (1e-3,))
    honest = DirectionScore if isinstance(operator, AddNeurons) and operator.init == "optimal" else FitScore
    seen: list[Tensor] = []
    rows = SampleScores.rows

    def kept(self: SampleScores, batch: Any) -> Tensor:
        scores = rows(self, batch)
        if isinstance(self.parts[0], honest):
            seen.append(2 * scores[:, 1] - scores[:, 0])
        return scores

    monkeypatch.setattr(SampleScores, "rows", kept)
    x, y = data()
    other = y.clone()
    other[::FOLDS] = torch.randn(y[::FOLDS].shape, dtype=DOUBLE)
    for target in (y, other):
        dagrow.propose(dagrow.trace(Tokens(torch.relu), x[:2]), [(x, target)], loss, [operator])
    before, after = torch.stack(seen).chunk(2)
    assert len(before)
    torch.testing.assert_close(after[:, ::FOLDS], before[:, ::FOLDS], rtol=1e-7, atol=1e-12)
    assert all((after[:, f::FOLDS] - before[:, f::FOLDS]).abs().max() > 1e-6 for f in range(1, FOLDS))


def test_several_consumers_are_scored_sample_by_sample() -> None:
    """One sample's part at one consumer is not independent of its part at another."""

    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.one, self.a, self.b = nn.Linear(4, 2), nn.Linear(2, 2), nn.Linear(2, 2)
            self.double()
            self.b.load_state_dict(self.a.state_dict())

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.one(x))
            return self.a(h) + self.b(h)

    class Single(Twins):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.a(torch.tanh(self.one(x)))

    twice, once = (found(AddNeurons(k=1, ridge=RIDGE), model, "one") for model in (Twins(), Single()))
    assert twice.z == pytest.approx(once.z, rel=1e-6)
    share, expected = twice.heldout_error / twice.heldout_gain, once.heldout_error / once.heldout_gain
    assert share == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (1, 2)])
def test_the_order_in_which_consumers_run_makes_no_difference(kernel: int, stride: int) -> None:
    """One reads new channels where they are written, the other elsewhere."""

    class Both(nn.Module):
        def __init__(self, turned: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.turned, self.one = turned, nn.Conv2d(2, 3, 3, padding=1)
            self.far, self.near = nn.Conv2d(3, 2, kernel, stride), nn.Conv2d(3, 2, 1)
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            h, means = torch.tanh(self.one(x)), {}
            for layer in (self.near, self.far) if self.turned else (self.far, self.near):
                means[layer] = layer(h).mean((2, 3))
            return torch.cat([means[self.far], means[self.near]], 1)

    torch.manual_seed(3)
    x = torch.randn(80, 2, 6, 6, dtype=DOUBLE)
    y = torch.sin(3 * x).mean((2, 3)).repeat(1, 2)
    growth, turned_growth = (
        dagrow.propose(dagrow.trace(Both(turned), x[:2]), [(x, y)], loss, [AddNeurons(k=1, ridge=RIDGE)])[0]
        for turned in (False, True)
    )
    assert growth.z == pytest.approx(turned_growth.z, rel=1e-6)
    assert growth.heldout_gain == pytest.approx(turned_growth.heldout_gain, rel=1e-6)


@dataclass(frozen=True)
class Cheating(Widen):
    """Directions of one's own."""

    def propose(self, m: Moments, place: Place) -> Proposal:
        return Proposal(torch.eye(place.width, dtype=DOUBLE)[:, :2])


def test_growths_of_every_kind_report_the_same() -> None:
    x, y = data()
    operators = [MoveWeights(), AddNeurons(), AddNeurons(k=1), AddConnection(), AddLayer(2), Cheating()]
    growths = dagrow.propose(dagrow.trace(Tokens(), x[:2]), [(x, y)], loss, operators)
    assert {type(growth.operator) for growth in growths} >= {MoveWeights, AddNeurons, AddConnection, AddLayer, Cheating}
    for growth in growths:
        assert growth.samples == N
        assert growth.heldout_error > 0
        assert (growth.p_value is None) == (growth.operator == AddNeurons(k=1))
        assert growth.significant == (growth.p_value is None or (growth.p_value <= 0.05 and growth.heldout_gain > 0))
        assert "±" in str(growth)
    unknown = dagrow.propose(
        dagrow.trace(Tokens(), x[:2]), [(x, y)], loss, [MoveWeights(folds=1), AddConnection(folds=1)]
    )
    assert all(growth.z is growth.p_value is growth.heldout_gain is None for growth in unknown)
