"""Every special case either grows exactly or refuses with the right reason; nothing is silent."""

import re

import pytest
from conformance import CASES

import dagrow
from dagrow.testing import try_axis


@pytest.mark.parametrize("name", CASES)
def test_each_case_grows_exactly_or_says_why_not(name: str) -> None:
    case = CASES[name]
    dag = dagrow.trace(case.model(), case.inputs(4))
    growing = [axis for axis in dag.axes if axis.growable]
    for axis in growing:
        assert try_axis(dag, axis.name, [case.inputs(4), case.inputs(3)]) is None, axis.name
    written = {edge.name for axis in growing for edge in axis.producers}
    assert set(case.grows) <= written, [(axis.name, axis.reason) for axis in dag.axes]
    for layer, reason in case.refuses.items():
        reasons = [axis.reason for axis in dag.axes if layer in {edge.name for edge in axis.producers}]
        assert layer not in written
        assert any(re.search(reason, found or "") for found in reasons), reasons


def test_there_are_enough_of_them() -> None:
    assert len(CASES) >= 50
