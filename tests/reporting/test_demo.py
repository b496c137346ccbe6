"""The demo and its claims."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from demo_runs import TINY
from torch.nn.functional import cross_entropy

from dagrow.reporting._data import Samples
from dagrow.reporting._demo import (
    ARMS,
    CONTINUED,
    COPIES,
    DIGITS,
    ENLARGED,
    MNIST,
    RANDOM,
    SCRATCH,
    Outcome,
    Run,
    further,
    network,
    run,
    score,
    start_of,
    stopped_improving,
)


@pytest.fixture(scope="module")
def small(data):
    return stopped_improving(data, TINY, 0)[0]


@pytest.fixture(scope="module")
def starts(data, small):
    return {arm: start_of(arm, small, data, TINY, 0) for arm in ARMS}


def widths(model):
    return model.hidden1.out_features, model.hidden2.out_features


def test_all_arms_but_one_have_the_large_size(starts):
    assert TINY.large == (10, 13)
    assert {arm: widths(model) for arm, model in starts.items()} == {
        **dict.fromkeys(ARMS, (10, 13)),
        CONTINUED: (4, 5),
    }


def test_the_small_network_stays_as_it_is(data, small, starts):
    before = copy.deepcopy(small.state_dict())
    for arm in (ENLARGED, COPIES, CONTINUED):
        further(start_of(arm, small, data, TINY, 0), data, TINY, 3, 0.01, 0)
    assert all(torch.equal(before[key], value) for key, value in small.state_dict().items())
    assert widths(small) == (4, 5)


def test_enlarging_lowers_the_validation_loss_at_once_and_random_neurons_do_not_raise_it(data, small, starts):
    losses = {arm: score(model, data.validation)[0] for arm, model in starts.items()}
    assert losses[ENLARGED] < losses[RANDOM] <= losses[CONTINUED] + 1e-6
    assert losses[ENLARGED] < losses[COPIES]
    assert losses[SCRATCH] > losses[CONTINUED]


def test_copies_have_noise_and_do_not_stay_equal(data, starts):
    model = further(starts[COPIES], data, TINY, 60, 0.01, 0)
    rows = torch.nn.functional.normalize(model.hidden1.weight.detach(), dim=1)
    assert float((rows @ rows.T - 2 * torch.eye(len(rows))).max()) < 0.9999


def test_the_small_network_stops_when_its_loss_stops_falling(data):
    few = Samples(data.validation.inputs[:50], data.validation.target[:50])
    model, steps = stopped_improving(replace(data, train=few, validation=data.validation), TINY, 0)
    assert steps == TINY.most == 300  # cut off
    _, longer = stopped_improving(replace(data, train=few), replace(TINY, most=20_000), 0)
    assert 300 < longer < 20_000
    assert longer % 100 == 0
    assert score(model, few)[0] < math.log(10)


def test_steps_are_held_then_annealed_and_so_many(data, small, monkeypatch):
    rates = []

    def noted(model, optimizer, batch):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()

    monkeypatch.setattr("dagrow.reporting._demo._step", noted)
    further(small, data, TINY, 10, 0.5, 0)
    assert rates[:5] == [0.5] * 5  # 40 %, and where the cosine begins
    assert rates[5:] == pytest.approx([0.25 * (1 + math.cos(math.pi * part / 6)) for part in range(1, 6)])


def test_all_arms_see_the_same_batches(data, small, starts, monkeypatch):
    seen = []

    def noted(model, optimizer, batch):
        seen.append(batch[1])
        optimizer.step()

    monkeypatch.setattr("dagrow.reporting._demo._step", noted)
    for arm in (CONTINUED, ENLARGED):
        further(starts[arm], data, TINY, 3, 0.1, 4)
    assert all(torch.equal(one, other) for one, other in zip(seen[:3], seen[3:], strict=True))


def test_a_run_holds_an_error_for_each_arm_and_budget(runs, data, small, starts):
    assert [found.seed for found in runs] == [0, 1]
    assert list(runs[0].arms) == list(ARMS)
    for arm, outcome in runs[0].arms.items():
        assert outcome.errors[0] == score(starts[arm], data.test)[1]
        assert len(outcome.errors) == 3
        assert outcome.step > 0
    model = further(starts[ENLARGED], data, TINY, round(0.3 * runs[0].steps), 0.01, 0)
    assert runs[0].arms[ENLARGED].errors[2] == score(model, data.test)[1]


def test_a_seed_repeats_the_run_and_leaves_the_global_one_alone(runs, data):
    state, heard = torch.random.get_rng_state(), []
    again = run(data, TINY, 1, lambda doing, done: heard.append((doing, done)))
    assert torch.equal(state, torch.random.get_rng_state())
    assert {arm: o.errors for arm, o in again.arms.items()} == {arm: o.errors for arm, o in runs[1].arms.items()}
    assert {doing for doing, _ in heard} == {"the small network", *ARMS}
    assert [done for _, done in heard] == sorted(done for _, done in heard)
    assert all(0 <= done < 1 for _, done in heard)


def test_ahead_is_less_error_than_every_other():
    found = Run(0, 100, {ENLARGED: Outcome(0, 1, [9.0, 5.0, 4.0, 3.0]), SCRATCH: Outcome(0, 1, [90.0, 6.0, 4.0, 2.0])})
    assert [found.is_ahead(ENLARGED, budget) for budget in (1, 2, 3)] == [True, False, False]
    assert [found.is_ahead(SCRATCH, budget) for budget in (1, 2, 3)] == [False, False, True]


@pytest.mark.parametrize("config", [DIGITS, MNIST])
def test_every_arm_has_a_rate_for_every_budget(config):
    assert set(config.rates) == set(ARMS)
    assert {len(rates) for rates in config.rates.values()} == {len(config.budgets)}


def test_weights_are_drawn_by_the_seed(data):
    models = [network(data, (4, 5), seed) for seed in (3, 3, 4)]
    first = [model.hidden1.weight for model in models]
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2])
    loss = cross_entropy(models[0](data.test.inputs), data.test.target)
    assert loss < 20
