"""Learning rates: held while a network grows, lowered after that."""

import copy
import math
import warnings

import pytest
import torch
from test_grower import BATCHES, TWO, mse, traced
from torch.optim.lr_scheduler import CosineAnnealingLR, StepLR

import dagrow
from dagrow import AfterEpoch, AnnealAfterGrowing, Grower


def rates(optimizer: torch.optim.Optimizer) -> list[float]:
    return [group["lr"] for group in optimizer.param_groups]


def test_rates_are_held_and_then_fall_as_a_cosine_that_begins_there() -> None:
    """As torch's own does, for every group from its own rate."""
    dag, other = traced(), torch.nn.Linear(2, 2)
    groups = [{"params": [p], "lr": 10.0 ** -(1 + i)} for i, p in enumerate(dag.model.parameters())]
    optimizer = torch.optim.SGD(groups)
    grower = Grower(dag, mse, TWO, stop=[AfterEpoch(2)], optimizer=optimizer)
    scheduler = AnnealAfterGrowing(optimizer, grower, 10)
    twin = torch.optim.SGD([{"params": [p], "lr": lr} for p, lr in zip(other.parameters(), (0.1, 0.01), strict=True)])
    expected = CosineAnnealingLR(twin, 7)
    for epoch in range(10):
        if epoch > 3:
            twin.step()
            expected.step()
        assert rates(optimizer)[:2] == pytest.approx(rates(twin))
        grower.step(epoch, BATCHES)
        optimizer.step()
        scheduler.step()
    assert rates(optimizer) == pytest.approx([0.0] * len(groups), abs=1e-12)
    optimizer.step()
    scheduler.step()  # and stay there
    assert rates(optimizer) == pytest.approx([0.0] * len(groups), abs=1e-12)


def test_its_state_goes_on_elsewhere() -> None:
    dag = traced()
    optimizer = torch.optim.Adam(dag.model.parameters(), lr=0.1)
    grower = Grower(dag, mse, TWO, stop=[AfterEpoch(0)], optimizer=optimizer)
    scheduler = AnnealAfterGrowing(optimizer, grower, 4)
    grower.step(0, BATCHES)
    optimizer.step()
    scheduler.step()
    state = copy.deepcopy(scheduler.state_dict())
    assert all(isinstance(value, (int, float, bool, list, type(None))) for value in state.values())
    loaded = AnnealAfterGrowing(optimizer, grower, 99)
    loaded.load_state_dict(state)
    assert (loaded.begun, loaded.steps, loaded.last_epoch) == (1, 4, 1)
    optimizer.step()
    loaded.step()
    assert rates(optimizer)[0] == pytest.approx(0.1 * (1 + math.cos(math.pi / 3)) / 2)


def test_fit_anneals() -> None:
    dag = traced()
    optimizer = torch.optim.SGD(dag.model.parameters(), lr=1e-2)
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append(rates(optimizer)[0]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dagrow.fit(dag, BATCHES, mse, TWO, stop=[AfterEpoch(1)], epochs=4, optimizer=optimizer, scheduler="anneal")
    assert seen[:: len(BATCHES)] == pytest.approx([1e-2, 1e-2, 1e-2, 5e-3])
    with pytest.raises(dagrow.OptimizerError, match="'anneal'"):
        dagrow.fit(dag, BATCHES, mse, TWO, epochs=1, optimizer=optimizer, scheduler="cosine")  # type: ignore[arg-type]


def test_what_is_refused_leaves_rates_as_they_are() -> None:
    dag = traced()
    optimizer = torch.optim.SGD(dag.model.parameters(), lr=1e-2)
    optimizer.param_groups[0]["initial_lr"] = 1.0  # of a scheduler before
    with pytest.raises(dagrow.BatchError):
        dagrow.fit(dag, [], mse, TWO, epochs=1, optimizer=optimizer, scheduler="anneal")
    assert rates(optimizer) == [1e-2]


def test_growing_that_is_never_over_is_told() -> None:
    dag = traced()
    optimizer = torch.optim.SGD(dag.model.parameters(), lr=1e-2)
    with pytest.warns(UserWarning, match="all 2 steps are over, and the grower is still growing"):
        dagrow.fit(dag, BATCHES, mse, TWO, stop=[], epochs=2, optimizer=optimizer, scheduler="anneal")
    assert rates(optimizer) == [1e-2]
    with pytest.raises(dagrow.GrowthError, match="steps"):
        AnnealAfterGrowing(optimizer, Grower(dag, mse, TWO), 0)


@pytest.mark.parametrize(("factor", "told"), [(0.4, 1), (0.6, 0)])
def test_growing_under_a_rate_that_has_fallen_is_told_once(factor: float, told: int) -> None:
    dag = traced()
    optimizer = torch.optim.SGD(dag.model.parameters(), lr=1e-2)
    grower = Grower(dag, mse, TWO, optimizer=optimizer)
    scheduler = StepLR(optimizer, 1, factor)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert grower.step(0, BATCHES).neurons
        assert not caught
        optimizer.step()
        scheduler.step()
        assert grower.step(1, BATCHES).neurons
        assert grower.step(2, BATCHES).neurons
    messages = [str(each.message) for each in caught]
    assert len(messages) == told
    assert all("it is 0.004, and was 0.01" in message and "AnnealAfterGrowing" in message for message in messages)
