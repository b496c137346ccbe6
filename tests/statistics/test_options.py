"""What verbs take beside batches and a loss is checked before anything runs."""

from typing import Any

import pytest
from small_net import BATCHES, MSE, X, setting

import dagrow
from dagrow import BatchError, GrowthError, LossError
from dagrow.statistics import Objective, sample_count

BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"reduction": "median"}, LossError, "'mean' or 'sum'.*'batch'"),
    ({"reduction": 1}, LossError, "'mean' or 'sum'"),
    ({"batch_dim": -1}, BatchError, "whole number from 0 on"),
    ({"batch_dim": True}, BatchError, "whole number"),
    ({"batch_dim": 1.0}, BatchError, "whole number"),
    ({"groups": "subject"}, BatchError, "a key for each sample"),
    ({"groups": 3}, BatchError, "a int; give a key for each sample"),
    ({"groups": {0: "a"}}, BatchError, "a key for each sample"),
    ({"max_batches": 0}, BatchError, "whole number from 1 on"),
    ({"max_batches": 2.5}, BatchError, "whole number from 1 on"),
    ({"max_memory": 0}, GrowthError, "finite number above 0"),
    ({"max_memory": "8GB"}, GrowthError, "max_memory.*finite number"),
    ({"max_seconds": -1}, GrowthError, "max_seconds.*above 0"),
    ({"samples": 0}, BatchError, "whole number from 1 on, or 'auto'"),
    ({"samples": -1}, BatchError, "whole number from 1 on, or 'auto'"),
    ({"samples": 2.5}, BatchError, "whole number from 1 on, or 'auto'"),
    ({"samples": True}, BatchError, "samples=True: give a whole number"),
    ({"samples": "all"}, BatchError, "samples='all': give a whole number"),
    ({"samples": 4, "groups": [0] * 8}, BatchError, "groups is a list"),
    ({"progress": "no"}, GrowthError, "True or False"),
    ({"max_batch": 3}, TypeError, "did you mean 'max_batches'"),
    (
        {"colour": 3},
        TypeError,
        "there are reduction, batch_dim, groups, max_batches, samples, max_memory, max_seconds, progress",
    ),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD)
def test_options_that_are_none(options: dict[str, Any], error: type[Exception], message: str) -> None:
    _, dag = setting()
    for verb in (dagrow.bottlenecks, dagrow.propose, dagrow.grow, dagrow.tangent, dagrow.Grower):
        with pytest.raises(error, match=message):
            verb(dag, MSE, **options) if verb is dagrow.Grower else verb(dag, BATCHES, MSE, **options)


def test_an_objective_shows_its_options() -> None:
    model, _ = setting()
    plain = Objective(model, BATCHES, MSE)
    assert (plain.batch_dim, plain.groups, plain.max_batches, plain.progress) == (0, None, None, True)
    given = Objective(model, BATCHES, MSE, batch_dim=0, groups=[0, 1], max_batches=2, progress=False)
    for objective in (given, given.with_batches(BATCHES), given.with_model(model)):
        assert (objective.groups, objective.max_batches, objective.progress) == ([0, 1], 2, False)


def test_samples_lie_along_any_dimension() -> None:
    assert sample_count((X.mean(), X[0], X), 0) == X.shape[1]
    assert sample_count((X.mean(), X[0], X), 1) == X.shape[1]
    assert sample_count({"x": X}) == len(X)
    with pytest.raises(BatchError, match="sample dimension 2"):
        sample_count(X, 2)
    with pytest.raises(BatchError, match="no samples"):
        sample_count(X[:, :0], 1)
