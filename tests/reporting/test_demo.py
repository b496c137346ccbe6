"""The demo and its claims."""

from dataclasses import replace

import torch
from demo_runs import TINY

from dagrow.reporting._demo import HIDDEN, compare, twin_of
from dagrow.reporting._demo_report import refusals


def test_the_loss_falls_at_every_growth_and_neurons_are_worth_it(runs):
    grown = runs[0]
    growths = grown.history.growths()
    assert len(growths) >= 3
    assert all(fall > 0 for fall in grown.falls)
    assert grown.falls == [growth["loss_before"] - growth["loss_after"] for growth in growths]
    for growth in growths:
        assert growth["gain"] > 0
        assert growth["heldout_gain"] > 0


def test_widths_and_parameters_are_those_of_the_growths(runs, data):
    grown, random, scratch = runs
    added = {name: sum(g["neurons"] for g in grown.history.growths() if g["where"] == name) for name in HIDDEN}
    assert grown.widths == tuple(1 + added[name] for name in HIDDEN)
    first, second = grown.widths
    expected = (data.features + 1) * first + (first + 1) * second + (second + 1) * data.classes
    assert [run.parameters[-1] for run in runs] == [expected] * 3
    assert tuple(scratch.history.snapshots[0].widths.values()) == random.widths == grown.widths


def test_the_random_twin_has_the_same_start_and_schedule(runs):
    grown, random, scratch = runs
    assert random.scores[0] == grown.scores[0]
    assert random.history.snapshots[0] == grown.history.snapshots[0]
    assert [record.widths for record in random.history] == [record.widths for record in grown.history]
    assert len(random.falls) == len(grown.falls)
    assert all(fall >= -1e-6 for fall in random.falls)
    assert not scratch.falls
    assert scratch.work > grown.work


def test_a_seed_repeats_the_run_and_leaves_the_global_one_alone(runs, data):
    state = torch.random.get_rng_state()
    again = compare(data, TINY)
    assert torch.equal(state, torch.random.get_rng_state())
    for one, other in zip(runs, again, strict=True):
        assert (one.scores, one.falls, one.refused) == (other.scores, other.falls, other.refused)
        assert one.history.growths() == other.history.growths()


def test_listeners_hear_of_every_epoch_and_its_growths(data):
    names, growths, epochs = [], [], []
    config = replace(TINY, epochs=1, growing=1)

    def trained(training):
        epochs.append(len(training.history))
        growths.extend(training.history[-1].grown)

    found = compare(data, config, lambda training: names.append(training.name), trained)
    assert names == [run.name for run in found]
    assert growths == list(found[0].history[0].grown)
    assert epochs == 3 * [1]


def test_random_neurons_that_no_amplitude_helps_come_in_all_the_same(runs, data, monkeypatch):
    first = runs[0].history[0]
    monkeypatch.setattr("dagrow.growing._line_search.line_search", lambda loss, before, *args, **kwargs: (0.0, before))
    twin = twin_of(runs[0], data, replace(TINY, epochs=1))
    assert twin.history[0].widths == first.widths
    assert twin.refused == len(twin.falls) == len(first.grown) > 0
    assert all(abs(fall) < 1e-6 for fall in twin.falls)
    assert f"{len(twin.falls)} of the {len(twin.falls)} growths" in refusals(twin)
    assert refusals(runs[0]) is None


def test_an_accuracy_that_is_not_reached_is_never(runs):
    assert runs[0].reached(0.0) == 0
    assert runs[0].reached(1.1) is None
