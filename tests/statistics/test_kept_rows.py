"""Rows instead of sums, and sums as soon as there are too many rows: it makes no difference."""

from unittest import mock

import pytest
import torch
from forms import by_rows
from measured import PAIRS, close, measured, model, samples
from torch import nn
from torch.nn.functional import mse_loss

import dagrow
from dagrow import AddNeurons, LossError
from dagrow.solvers import MomentView
from dagrow.statistics import InputFeatures, Objective, OutputGoal, measure
from dagrow.testing import check_slope


def same(m: MomentView, expected: MomentView) -> None:
    for x, y in PAIRS:
        close(m[x, y], expected[x, y])
        close(m[y, x], expected[x, y].T)
        if x == y:
            close(m.product(x, y).diagonal(), expected[x, y].diagonal())


@pytest.mark.parametrize("most", [0, 20, 30, 44, 10**6])
@pytest.mark.parametrize("folds", [1, 3])
def test_moments_are_the_same(most: int, folds: int) -> None:
    net, (x, y) = model(), samples(2)
    expected = measured(net, x, y, 3, 7, 12, folds=folds)
    with by_rows(most):
        m = measured(net, x, y, 3, 7, 12, folds=folds)
    assert set(m.rows) == (set(PAIRS) if most >= 44 else set())
    same(m, expected)
    for mine, theirs in zip(sum(m.split(), ()), sum(expected.split(), ()), strict=True):
        if folds > 1:
            same(mine, theirs)


def test_a_pair_is_summed_when_one_of_it_has_too_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """While others of the same feature are kept, and rows of it wait in a buffer."""
    net, (x, y) = model(), samples(2)
    expected = measured(net, x, y, 3, 7, 12)
    monkeypatch.setattr("dagrow.statistics._kept_rows._room", lambda f, *_: 25 if f == OutputGoal("2") else 100)
    m = measured(net, x, y, 3, 7, 12)
    assert set(m.rows) == {pair for pair in PAIRS if OutputGoal("2") not in pair}
    for pair in PAIRS:
        close(m[pair], expected[pair])


def test_groups_of_samples() -> None:
    net, (x, y) = model(), samples(2)
    batches = [(x[:10], y[:10]), (x[10:], y[10:])]
    dag = dagrow.trace(net, x[:2])
    objective = Objective(net, batches, mse_loss, groups=[i // 3 for i in range(22)])
    expected = measure(dag, objective, PAIRS)
    with by_rows(10**6):
        m = measure(dag, Objective(net, batches, mse_loss, groups=[i // 3 for i in range(22)]), PAIRS)
    assert set(m.rows) == set(PAIRS)
    for mine, theirs in zip(sum(m.split(), ()), sum(expected.split(), ()), strict=True):
        same(mine, theirs)


def test_wide_layers_are_kept_as_rows_of_their_own() -> None:
    """Not as views that hold all of a batch, and in at least single precision."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(300, 400), nn.ReLU(), nn.Linear(400, 3)).bfloat16()
    x, y = torch.randn(12, 300).bfloat16(), torch.randn(12, 3).bfloat16()
    reads = InputFeatures("2")
    m = measure(dagrow.trace(net, x[:2]), Objective(net, [(x, y)], mse_loss), [(reads, reads)], folds=2)
    kept = m.rows[reads, reads][0]
    assert [tuple(part.shape) for part in kept.folds] == [(6, 401)] * 2
    assert all(part.dtype == torch.float32 and part.untyped_storage().nbytes() == 6 * 401 * 4 for part in kept.folds)


@pytest.mark.parametrize("solver", ["sequential", "joint"])
@pytest.mark.parametrize("folds", [1, 4])
def test_growths_are_the_same(solver: str, folds: int) -> None:
    """More entries than rows, as in wide layers: neither form is singular for the other."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(9, 10, 3, padding=1), nn.ReLU(), nn.Conv2d(10, 8, 3), nn.Flatten(), nn.Linear(32, 3))
    x, y = torch.randn(16, 9, 4, 4).double(), torch.randn(16, 3).double()
    dag, found = dagrow.trace(net.double(), x[:2]), []
    for most in (0, 10**6):
        with by_rows(most):
            operator = AddNeurons(k=2, solver=solver, folds=folds, axes=("0",))
            found += dagrow.propose(dag, [(x[:9], y[:9]), (x[9:], y[9:])], mse_loss, [operator])
    sums, rows = found
    assert rows.gain == pytest.approx(sums.gain, rel=1e-8)
    assert rows.drop == pytest.approx(sums.drop, rel=1e-8)
    assert rows.heldout_gain == (None if folds == 1 else pytest.approx(sums.heldout_gain, rel=1e-8))


def test_what_is_not_finite_is_refused() -> None:
    net, (x, y) = model(torch.float32), samples(2, dtype=torch.float32)
    with torch.no_grad():
        net[0].weight.mul_(1e30)
        net[1] = nn.Identity()
    objective = Objective(net, [(x, y)], lambda o, t: (o * 1e-35).square().mean(), reduction="mean")
    with by_rows(10**6), pytest.raises(LossError, match="not finite, or too large"):
        measure(dagrow.trace(net, x[:2]), objective, PAIRS)


def test_what_a_wide_layer_reads_is_no_square_matrix() -> None:
    """As a Gram 100,000 entries would take 80 GB."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 100_000), nn.ReLU(), nn.Linear(100_000, 2)).double()
    batches = [(torch.randn(8, 4).double(), torch.randn(8, 2).double())]
    dag = dagrow.trace(net, batches[0][0])
    found = dagrow.bottlenecks(dag, batches, mse_loss)
    assert found["2"].bottleneck <= 1e-5 * found["2"].goal
    (growth,) = dagrow.propose(dag, batches, mse_loss, [AddNeurons(k=1, folds=4)])
    check_slope(growth)


class TwoTypes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(300, 4), nn.Linear(4, 300).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.relu(self.a(x)).double())


def test_features_of_two_types_are_summed_in_the_wider_one() -> None:
    """The second batch is one too many."""
    torch.manual_seed(1)
    x, y, gains = torch.randn(200, 300), torch.randn(200, 300).double(), []
    for size in (100, 200):
        batches = [*zip(x.split(size), y.split(size), strict=True)]
        dag = dagrow.trace(TwoTypes(), x[:2])
        gains += [growth.gain for growth in dagrow.propose(dag, batches, mse_loss, [AddNeurons(k=1)])]
    assert gains[1] == pytest.approx(gains[0], rel=1e-4)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 4, (3, 2), stride=2, padding=1),
        nn.Conv2d(3, 4, 3, dilation=2, padding="same", padding_mode="reflect", bias=False),
        nn.ConvTranspose2d(3, 4, 3, stride=2),
        nn.Conv1d(3, 4, 5),
        nn.Linear(3, 4),
    ],
)
@pytest.mark.parametrize("bias", [True, False])
def test_entries_are_known_without_rows(layer: nn.Module, bias: bool) -> None:
    sizes = (3,) if isinstance(layer, nn.Linear) else (3, *[7] * (layer.weight.ndim - 2))
    x = torch.randn(2, *sizes)
    dag, feature, seen = dagrow.trace(layer, x), InputFeatures("", bias), list[bool]()
    with by_rows(10**6):
        m = measure(dag, Objective(layer, [(x, layer(x).detach())], mse_loss), [(feature, feature)], folds=1)
    with mock.patch("dagrow.statistics._kept_rows.most_rows", side_effect=lambda n, _: seen.append(n) or 0):
        measure(dag, Objective(layer, [(x, layer(x).detach())], mse_loss), [(feature, feature)], folds=1)
    assert seen == [m.rows[feature, feature][0].folds[0].shape[1]]


@pytest.mark.parametrize(
    ("layer", "size", "samples", "folds", "kept"),
    [
        (nn.Linear(300, 2), (300,), 300, 1, True),  # with the constant there are 301 entries
        (nn.Linear(300, 2), (300,), 302, 1, False),
        (nn.Linear(300, 2), (300,), 150, 2, True),
        (nn.Linear(300, 2), (300,), 152, 2, False),
        (nn.Conv1d(300, 2, 1), (300, 1), 150, 1, True),
        (nn.Conv1d(300, 2, 1), (300, 1), 152, 1, False),
        (nn.Linear(200, 2), (200,), 10, 1, False),
    ],
)
def test_rows_are_kept_where_products_are_dearer(
    layer: nn.Module, size: tuple[int, ...], samples: int, folds: int, kept: bool
) -> None:
    x = torch.randn(samples, *size)
    objective = Objective(layer, [(x, torch.zeros(samples, 2, *size[1:]))], mse_loss)
    feature = InputFeatures("", True)
    m = measure(dagrow.trace(layer, x[:2]), objective, [(feature, feature)], folds=folds)
    assert bool(m.rows) == kept
