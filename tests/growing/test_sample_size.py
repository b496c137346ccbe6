"""How many samples are measured: a number, or as many as the best gain asks for; what chooses amplitudes."""

from typing import Any

import pytest
import torch
from small_net import MSE
from test_planning import made
from tokens import Tokens
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dagrow
from dagrow import AddNeurons, BatchError, GrowthError, MoveWeights
from dagrow.growing._bottlenecks import ROWS
from dagrow.growing._sample_size import enlarged
from dagrow.statistics import DrawnSamples, Objective, drawn

N = 3000
FIRST = 256
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(N, 4, generator=GENERATOR).double()
NOISE = torch.randn(N, 2, generator=GENERATOR).double()
Y = torch.sin(X[:, :2] + X[:, 2:]) + NOISE
OPERATORS = [MoveWeights(), AddNeurons()]


def traced(width: int = 2, inputs: int = 4) -> dagrow.Dag:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, 2)).double()
    return dagrow.trace(model, torch.zeros(2, inputs).double())


def split(y: Tensor = Y, x: Tensor = X) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(100), y.split(100), strict=True))


def mean(dag: dagrow.Dag, batches: Any) -> float:
    with torch.no_grad():
        sums = [(float(MSE(dag.model(x), y)) * len(x), len(x)) for x, y in batches]
    return sum(loss for loss, _ in sums) / sum(n for _, n in sums)


def test_as_many_samples_as_the_best_gain_is_known_to_a_tenth_on() -> None:
    growths = dagrow.propose(traced(), split(), MSE, OPERATORS, samples="auto")
    best = growths[0]
    assert FIRST < best.samples < N
    assert best.samples_for(0.1) <= 1.5 * best.samples
    assert best.samples_for(0.1) > best.samples / 4  # nor were there many more than it takes
    assert {growth.samples for growth in growths} == {best.samples}


@pytest.mark.parametrize(
    ("found", "count"),
    [
        ([(1.0, 0.12)], None),  # 1.4 times as many are not worth a pass
        ([(1.0, 0.15)], 576),
        ([(1.0, 0.15), (0.9, 10.0), (-1.0, 1.0)], 576),  # the best one counts
        ([(1.0, 0.5)], 1024),  # at most four times as many at once
        ([(-1.0, 0.1)], 1024),
        ([], 1024),
    ],
)
def test_the_error_of_the_best_gain_says_how_many_more(found: list[tuple[float, float]], count: int | None) -> None:
    samples = DrawnSamples(split(), "auto", {})
    objective = Objective(traced().model, samples, MSE)
    growths = [made({"x": 1.0}, heldout_gain=gain, heldout_error=error, samples=FIRST) for gain, error in found]
    assert enlarged(objective, growths) is (count is not None)
    assert samples.count == (count or FIRST)
    assert not enlarged(Objective(traced().model, DrawnSamples(split(), FIRST, {}), MSE), growths)


def test_what_is_plain_to_see_takes_few_samples() -> None:
    (best, *_) = dagrow.propose(traced(), split(100 + Y), MSE, [MoveWeights()], samples="auto")
    assert best.samples == FIRST
    assert best.heldout_gain is not None
    assert best.heldout_error is not None
    assert best.heldout_error < 0.1 * best.heldout_gain


def test_there_is_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are, and whatever is found."""
    monkeypatch.setattr("dagrow.growing._sample_size.MOST", 600)
    growths = dagrow.propose(traced(), split(Y + NOISE), MSE, OPERATORS, samples="auto")
    assert {growth.samples for growth in growths} == {600}
    samples = DrawnSamples(split(), "auto", {})
    assert enlarged(Objective(traced().model, samples, MSE), [])
    assert not enlarged(Objective(traced().model, samples, MSE), [])
    assert samples.count == 600


def test_of_noise_all_is_measured() -> None:
    dag, seen = traced(), list[int]()

    def step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        seen.append(len(batch[0]))
        return MSE(model(batch[0]), batch[1])

    with torch.no_grad():
        batches = split(dag.model(X) + NOISE)
    growths = dagrow.propose(dag, batches, step=step, operators=OPERATORS, samples="auto", reduction="mean")
    assert not any(growth.significant for growth in growths)
    assert {growth.samples for growth in growths} <= {N}
    assert seen.count(100) >= len(batches)
    receipt = dagrow.grow(dag, batches, MSE, samples="auto")
    assert receipt.neurons == 0
    assert receipt.loss_before == pytest.approx(mean(dag, batches), rel=1e-12)


def test_growths_that_nobody_asks_about_take_few_samples() -> None:
    (growth,) = dagrow.propose(traced(), split(), MSE, [AddNeurons(k=1, init="zero")], samples="auto")
    assert sum(len(x) for x, _ in growth.objective.batches) == FIRST  # type: ignore[misc]


@pytest.mark.parametrize("samples", ["auto", FIRST, 10_000])
def test_where_there_are_no_more_all_is_as_without(samples: Any) -> None:
    batches = split()[:2]
    found, plain = (dagrow.propose(traced(), batches, MSE, OPERATORS, **o) for o in ({"samples": samples}, {}))
    assert [growth.gain for growth in found] == [growth.gain for growth in plain]
    receipts = [dagrow.grow(traced(), batches, MSE, OPERATORS, **options) for options in ({"samples": samples}, {})]
    assert len({(r.loss_before, r.loss_after, r.gamma) for r in receipts}) == 1


def squares(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().sum()


@pytest.mark.parametrize("loss", [MSE, squares], ids=["mean", "sum"])
@pytest.mark.parametrize("operator", [AddNeurons(k=2), AddNeurons(k=1, folds=1), MoveWeights()], ids=repr)
def test_gains_are_slopes_on_the_samples_that_were_drawn(loss: Any, operator: dagrow.Operator) -> None:
    """With all their positions."""
    x, y = X.view(-1, 3, 4)[:200], Y.view(-1, 3, 2)[:200]
    batches = [(x[:70], y[:70]), (x[70:90], y[70:90]), (x[90:], y[90:])]
    dag = dagrow.trace(Tokens(), x[:2])
    growths = dagrow.propose(dag, batches, loss, [operator], samples=50)
    for growth in growths:
        assert growth.samples == (50 if operator.folds > 1 else 0)
        assert isinstance(growth.objective.batches, DrawnSamples)
        assert sum(len(x) for x, _ in growth.objective.batches) == 50
        up, down = growth.loss(1e-5), growth.loss(-1e-5)
        assert growth.gain == pytest.approx((down - up) / 2e-5, rel=1e-6)
    assert growths[0].gain != pytest.approx(dagrow.propose(dag, batches, loss, [operator])[0].gain, rel=1e-3)


def test_amplitudes_are_chosen_on_others() -> None:
    torch.manual_seed(3)
    samples = drawn(split(), {"samples": 120})  # the same, as they follow from torch's generator
    assert isinstance(samples, DrawnSamples)
    dag = traced()
    before = mean(dag, samples.others)
    assert before != pytest.approx(mean(dag, samples))
    torch.manual_seed(3)
    receipt = dagrow.grow(dag, split(), MSE, OPERATORS, samples=120)
    assert receipt.neurons
    assert receipt.loss_before == pytest.approx(before, rel=1e-12)
    assert receipt.loss_after == pytest.approx(mean(dag, samples.others), rel=1e-9)


def test_validation_stays_whole() -> None:
    dag, validation = traced(), split()[:5]
    before = mean(dag, validation)
    receipt = dagrow.grow(dag, split(), MSE, OPERATORS, validation=validation, samples=120)
    assert receipt.loss_before == pytest.approx(before, rel=1e-12)
    assert receipt.loss_after == pytest.approx(mean(dag, validation), rel=1e-9)


@pytest.mark.parametrize(("inputs", "n", "expected"), [(4, N, FIRST), (60, N, 61 * ROWS), (60, 800, 800)])
def test_bottlenecks_take_ten_rows_for_each_feature(inputs: int, n: int, expected: int) -> None:
    """Or all samples, where these are hardly more."""
    x = torch.randn(n, inputs, generator=torch.Generator().manual_seed(0)).double()
    dag = traced(inputs=inputs)
    assert dagrow.bottlenecks(dag, split(Y[:n], x), MSE, samples="auto").samples == expected
    assert dagrow.bottlenecks(dag, split(Y[:n], x), MSE, samples=50).samples == 50


def test_positions_count_as_rows() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(60, 2), nn.Tanh(), nn.Linear(2, 2)).double()
    x, y = torch.randn(1000, 2, 60).double(), torch.randn(1000, 2, 2).double()
    found = dagrow.bottlenecks(dagrow.trace(model, x[:2]), split(y, x), MSE, samples="auto")
    assert found.samples == 61 * ROWS // 2


@pytest.mark.parametrize("samples", [90, "auto"])
def test_a_tangent_space_is_that_of_the_samples(samples: Any) -> None:
    expected = FIRST if samples == "auto" else samples
    found = dagrow.tangent(traced(), split(), MSE, samples=samples, iterations=5)
    assert found.samples == found.edges.samples == expected


def test_fit_trains_on_all_and_measures_some() -> None:
    dag, trained, measured = traced(), list[int](), list[int]()

    def step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        (trained if model.training else measured).append(len(batch[0]))
        return MSE(model(batch[0]), batch[1])

    optimizer = torch.optim.SGD(dag.model.parameters(), lr=1e-2)
    loader = DataLoader(TensorDataset(X, Y), 100, shuffle=True)
    validation = [(X[:300], Y[:300])]
    history = dagrow.fit(
        dag, loader, step=step, epochs=2, optimizer=optimizer, samples=150, validation=validation, reduction="mean"
    )
    assert trained == [100] * 2 * len(loader)
    assert history[0].grown
    assert measured.count(75)
    assert measured.count(100) < len(loader)  # some to look at the loss before it is trained on


def test_a_step_of_a_grower_is_one_draw() -> None:
    """Whose receipt tells of the others, of one growth or several."""
    dag = traced()
    grower = dagrow.Grower(dag, MSE, OPERATORS, samples=200)
    torch.manual_seed(5)
    samples = drawn(split(), {"samples": 200})
    assert isinstance(samples, DrawnSamples)
    loss, before = mean(dag, samples), mean(dag, samples.others)
    receipt = grower.step(0, split())
    assert len(receipt.parts) > 1
    assert grower.history[0].train_loss == pytest.approx(loss, rel=1e-12)
    assert receipt.loss_before == pytest.approx(before, rel=1e-12)
    assert receipt.loss_after == pytest.approx(mean(dag, samples.others), rel=1e-9)
    assert receipt.drop == pytest.approx(sum(part.drop for part in receipt.parts))


def test_a_grower_takes_as_many_as_it_needs() -> None:
    dag = traced()
    receipt = dagrow.Grower(dag, MSE, OPERATORS, samples="auto").step(0, split())
    measured = [part.growth.samples for part in receipt.parts if part.growth is not None]
    assert FIRST < measured[0] < N
    assert measured == sorted(measured)  # what is left to gain is smaller


VERBS: dict[str, Any] = {
    "propose": lambda dag, **options: dagrow.propose(dag, split(), MSE, **options),
    "grow": lambda dag, **options: dagrow.grow(dag, split(), MSE, **options),
    "Grower": lambda dag, **options: dagrow.Grower(dag, MSE, **options),
    "fit": lambda dag, **options: dagrow.fit(
        dag, split(), MSE, epochs=1, optimizer=torch.optim.SGD(dag.model.parameters(), lr=1e-2), **options
    ),
}


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
def test_what_cannot_be_is_refused_before_anything_runs(verb: Any) -> None:
    dag = traced()
    before = [parameter.clone() for parameter in dag.model.parameters()]
    without = [MoveWeights(), AddNeurons(k=1, folds=1)]
    with pytest.raises(GrowthError, match=r"samples='auto'.*AddNeurons\(k=1.* has no folds"):
        verb(dag, operators=without, samples="auto")
    with pytest.raises(BatchError, match=r"samples=50 draws.*groups is a list.*Give a function"):
        verb(dag, groups=list(range(N)), samples=50)
    assert all(map(torch.equal, before, dag.model.parameters()))


def test_groups_may_be_a_function() -> None:
    """Then whole batches are drawn."""

    def groups(batch: tuple[Tensor, Tensor]) -> list[float]:
        return (batch[0][:, 0] > 0).tolist() if len(batch[0]) < 100 else batch[0][:, 0].tolist()

    growths = dagrow.propose(traced(), split(), MSE, [MoveWeights()], groups=groups, samples=150)
    assert {growth.samples for growth in growths} == {200}
