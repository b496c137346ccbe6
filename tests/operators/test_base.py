"""Settings that all operators have."""

import math
from collections.abc import Callable
from typing import Any

import pytest

import dagrow
from dagrow import AddConnection, AddLayer, AddNeurons, GrowthError, MoveWeights


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AddNeurons(k=1, ridge="a"), "ridge='a'"),
        (lambda: AddNeurons(k=1, ridge=float("inf")), "ridge=inf"),
        (lambda: AddNeurons(k=True), "k=True"),
        (lambda: AddNeurons(k=1, folds=True), "folds=True"),
        (lambda: AddNeurons(k=1, axes=5), "axes=5"),
        (lambda: AddNeurons(k=1, axes=()), r"axes=\(\)"),
        (lambda: AddNeurons(k=1, seed=1.5), "seed=1.5"),
        (lambda: MoveWeights(edges="fc"), "edges='fc'"),
        (lambda: MoveWeights(ridge=-1.0), "ridge=-1.0"),
    ],
)
def test_settings_that_make_no_sense(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(dagrow.DagrowError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AddNeurons(k=0), "whole number from 1 on"),
        (lambda: AddNeurons(k=-1), "whole number from 1 on"),
        (lambda: AddNeurons(k=1.5), "whole number from 1 on"),  # type: ignore[arg-type]
        (lambda: AddNeurons(k="3"), "whole number from 1 on"),  # type: ignore[arg-type]
        (lambda: AddNeurons(solver="best"), "not one of"),  # type: ignore[arg-type]
        (lambda: AddNeurons(init="xavier"), "not one of"),  # type: ignore[arg-type]
        (lambda: AddNeurons(folds=0), "whole number from 1 on"),
        (lambda: AddNeurons(ridge=-1.0), "finite number from 0 on"),
        (lambda: AddNeurons(ridge=math.nan), "finite number from 0 on"),
        (lambda: AddNeurons(folds=1), "Give k="),
        (lambda: AddNeurons(init="copy"), "Give k="),
        (lambda: AddNeurons(axes="0"), "tuple of names"),  # type: ignore[arg-type]
        (lambda: MoveWeights(edges="0"), "tuple of names"),  # type: ignore[arg-type]
        (lambda: MoveWeights(folds=0), "whole number from 1 on"),
        (lambda: MoveWeights(ridge=-1.0), "finite number from 0 on"),
        (lambda: MoveWeights(ridge=True), "finite number from 0 on"),
        (lambda: MoveWeights(ridge=10**400), "finite number from 0 on"),
        (lambda: AddNeurons(seed=2**70), "whole number from 0 to 4294967295"),
        (lambda: AddNeurons(seed=True), "whole number from 0 to"),
        (lambda: AddConnection(rank=0), "whole number from 1 on, or None for a single layer"),
        (lambda: AddConnection(kernel=None), "whole number from 1 on[.]"),  # type: ignore[arg-type]
        (lambda: AddLayer(k=None), "whole number from 1 on[.]"),  # type: ignore[arg-type]
        (lambda: AddLayer(3, seed=-1), "whole number from 0 to"),
    ],
)
def test_operators_that_make_no_sense(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(GrowthError, match=message):
        make()
