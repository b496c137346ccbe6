"""Units of several channels."""

import copy

import pytest
import torch
from torch import nn

import dagrow
from dagrow import AddNeurons

UNITS = {
    "group norm": [nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 3, 1)],
    "groups": [nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.ReLU(), nn.Conv2d(4, 3, 1)],
    "reduction": [
        nn.Conv2d(3, 4, 3),
        nn.Conv2d(4, 2, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.Conv2d(2, 3, 1, padding=1),
    ],
    "multiplier": [
        nn.Conv2d(3, 2, 3, padding=1),
        nn.Conv2d(2, 4, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.Conv2d(4, 3, 1),
    ],
}


@pytest.mark.parametrize("solver", ["svd", "als", "joint"])
@pytest.mark.parametrize("layers", UNITS.values(), ids=UNITS)
def test_channels_of_a_unit_are_no_twins(layers: list[nn.Module], solver: str) -> None:
    torch.manual_seed(0)
    model, x = copy.deepcopy(nn.Sequential(*layers)).double(), torch.randn(40, 3, 6, 6).double()
    y = x.tanh().roll(1, 1)
    dag, width = dagrow.trace(model, x[:2]), model[-1].in_channels
    dagrow.propose(dag, [(x, y)], nn.MSELoss(), [AddNeurons(k=2, solver=solver)])[0].apply(0.1)
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(20):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    fan_in = torch.cat([model[0].weight.detach().flatten(1), model[0].bias.detach()[:, None]], 1)
    assert fan_in.norm(dim=1).min() > 0.01  # none is dead
    new = model[:-1](x).detach()[:, width:].transpose(0, 1).flatten(1)
    assert len(new) in (2, 4, 8)  # two units of one, two or four channels
    assert new.std(1).min() > 0.01
    alike = torch.corrcoef(new).abs() - torch.eye(len(new))
    assert alike.max() < 0.95
