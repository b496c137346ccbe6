"""Neurons between convolutions: their theory against slow truths, what they grow into, and what they cost."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from zoo import case_of

import dagrow
from dagrow import AddNeurons


def test_a_chain_of_biased_convolutions_grows_again_and_again() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(3, 3, 3, stride=2),
        nn.Tanh(),
        nn.Conv2d(3, 2, 2),
        nn.Flatten(),
    )
    case = case_of(model, 2, 6, 5, sizes=(20, 20))
    dag, x = case.copy(), case.batches[0][0]
    for where in ("0", "0", "0", "2", "0", "2"):
        before = dag.model(x)
        (growth, *_) = dagrow.propose(dag, case.batches, case.loss, [AddNeurons(k=2, axes=(where,))])
        torch.testing.assert_close(dag.model(x), before, rtol=0, atol=0)
        receipt = growth.apply(0.0)
        torch.testing.assert_close(dag.model(x), before, rtol=0, atol=1e-10)
        receipt.undo()
        assert dagrow.grow(dag, case.batches, case.loss, [AddNeurons(k=2, axes=(where,))]).neurons in (0, 2)
    assert dag.model[0].weight.shape[0] > 3


@pytest.mark.parametrize(
    "layers",
    [
        [nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(3, 2, 2, dilation=2)],
        [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, groups=2, stride=2), nn.Conv2d(4, 2, 1)],
        [nn.ConvTranspose2d(2, 3, 3, stride=2), nn.Tanh(), nn.ConvTranspose2d(3, 2, 4, stride=3, padding=2)],
        [nn.Conv2d(2, 3, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(48, 2)],
    ],
    ids=["convolutions", "groups", "transposed", "flatten"],
)
def test_cost_is_what_torch_counts(layers: list[nn.Module]) -> None:
    model, x = nn.Sequential(*layers), torch.randn(3, 2, 10, 10)

    def count() -> tuple[int, int]:
        with FlopCounterMode(display=False) as counter:
            model(x)
        return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // len(x)

    for axis in [axis.name for axis in dagrow.trace(model, x).axes if axis.growable]:
        before, zero = count(), AddNeurons(k=2, init="zero", folds=1, axes=(axis,))
        (growth,) = dagrow.propose(dagrow.trace(model, x), [(x, model(x).detach())], nn.MSELoss(), [zero])
        growth.apply(1.0)
        assert (growth.cost.parameters, growth.cost.flops) == tuple(b - a for a, b in zip(before, count(), strict=True))
