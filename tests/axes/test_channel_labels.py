"""What a run on labels finds out: riders, and layers that do not act once on each sample."""

import pytest
import torch
from torch import Tensor, nn
from zoo import Plan, Stage, Twice, built

import dagrow
from dagrow.testing import try_axis


def test_riders_of_a_channel() -> None:
    case = built(Plan((Stage(kind="scale", width=2, norm="before"),), inputs=3, tokens=0))
    dag = dagrow.trace(case.model, case.batches[0][0])
    axis = dag.axis("parts.0.up")
    neutral = {rider.name: rider.neutral for rider in axis.riders}
    assert set(neutral) == {"parts.0.between.0.norm", "parts.0.scale", "parts.0.shift"}
    assert (neutral["parts.0.scale"], neutral["parts.0.shift"]) == (1.0, 0.0)


class Positioned(nn.Module):
    """Adds what a small network makes of the positions, as relative position biases do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("positions", torch.rand(5, 2))
        self.near, self.far = nn.Linear(2, 7), nn.Linear(7, 6)
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x + self.far(self.near(self.positions).relu())).relu()).mean(1)


def test_layers_that_read_no_samples_are_left_out_of_closed_forms() -> None:
    dag = dagrow.trace(Positioned(), torch.randn(4, 5, 6))
    assert dag.axis("near").growable
    assert dag.axis("near").shared == "near reads a constant, not the samples"
    batches = [(torch.randn(8, 5, 6), torch.randn(8, 2))]
    operators = [dagrow.AddNeurons(k=1), dagrow.MoveWeights()]
    where = {growth.where for growth in dagrow.propose(dag, batches, nn.functional.mse_loss, operators)}
    assert {"up", "down"} <= where
    assert not any("near" in name or "far" in name for name in where)
    (growth,) = dagrow.propose(
        dag, batches, nn.functional.mse_loss, [dagrow.AddNeurons(k=1, init="zero", axes=("near",))]
    )
    assert growth.where == "near"


def test_a_layer_that_is_called_twice_grows_for_both_calls() -> None:
    dag = dagrow.trace(Twice(), torch.randn(2, 3))
    axis = dag.axis("first+again")
    assert axis.growable
    assert axis.shared == "again is called more than once"
    assert try_axis(dag, axis.name, [torch.randn(2, 3), torch.randn(4, 3)], tolerance=1e-5) is None
    batches = [(torch.randn(8, 3), torch.randn(8, 2))]
    for init in ("zero", "copy"):
        (growth,) = dagrow.propose(dag, batches, nn.functional.mse_loss, [dagrow.AddNeurons(k=1, init=init)])
        assert growth.where == axis.name
    for axes in (None, (axis.name,)):
        with pytest.raises(dagrow.GrowthError, match=r"again is called more than once\. Give init='zero' or 'copy'"):
            dagrow.propose(dag, batches, nn.functional.mse_loss, [dagrow.AddNeurons(k=1, axes=axes)])
