"""What changes when an axis widens."""

import pytest
import torch
from hypothesis import given
from test_laws import LAW
from zoo import Plan, built, plans

import dagrow


@given(plan=plans())
@LAW
def test_every_growable_axis_widens_and_every_other_one_says_why(plan: Plan) -> None:
    case = built(plan)
    dag = dagrow.trace(case.model, case.batches[0][0])
    before = {key: value.clone() for key, value in case.model.state_dict().items()}
    for axis in dag.axes:
        assert axis.growable == (axis.reason is None)
        if not axis.growable:
            with pytest.raises(dagrow.GrowthError):
                dag.widening(axis, 1)
            continue
        widening = dag.widening(axis, 2)
        for places in (widening.rows, widening.columns):
            for landing in places.values():
                landed = sorted([*landing.old.tolist(), *landing.new.flatten().tolist()])
                assert landed == list(range(landing.size))
                assert landing.old.tolist() == sorted(landing.old.tolist())
                assert len(landing.new) == 2
    assert all(torch.equal(value, case.model.state_dict()[key]) for key, value in before.items())
