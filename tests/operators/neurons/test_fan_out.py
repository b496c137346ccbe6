"""New neurons in front of norms: what was measured in a preview holds in train mode as well."""

import copy

import pytest
import torch
from torch import Tensor, nn

import dagrow
from dagrow import AddNeurons


def digits(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images of stripes, whose direction is their class."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 4
    at = torch.stack(torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij"))
    turns = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.7, 0.7], [0.7, -0.7]])[y]
    phase = 6 * torch.rand(n, 1, 1, generator=generator)
    x = torch.sin(2 * torch.einsum("nd, dhw -> nhw", turns, at) + phase)
    return (x + 0.5 * torch.randn(n, 8, 8, generator=generator))[:, None].double(), y


@pytest.mark.parametrize("gamma", [0.01, 0.1, 1.0])
def test_in_train_mode_the_loss_follows_the_prediction(gamma: float) -> None:
    """New channels pass a BatchNorm as they were measured, whether it norms by its statistics or by the batch."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1),
        nn.BatchNorm2d(2),
        nn.ReLU(),
        nn.Conv2d(2, 2, 3, padding=1),
        nn.BatchNorm2d(2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2, 4),
    ).double()
    x, y = digits(400, 1)
    loss, optimizer = nn.functional.cross_entropy, torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(60):
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()
    for where in ("0", "3"):
        dag = dagrow.trace(copy.deepcopy(model), x[:2])
        growth = dagrow.propose(dag, [(x, y)], loss, [AddNeurons(k=3, axes=(where,))])[0]
        trained = copy.deepcopy(dag.model).train()
        before = float(loss(trained(x), y)), growth.loss(0.0)
        predicted = growth.loss(gamma)  # what the line search sees, in eval mode
        growth.apply(gamma)
        after = float(loss(dag.model.train()(x), y)), predicted
        assert after[0] / before[0] == pytest.approx(after[1] / before[1], rel=0.05)
        assert after[0] == pytest.approx(after[1], rel=0.05)


@pytest.mark.parametrize("operator", [AddNeurons(k=1), AddNeurons(k=1, folds=1), AddNeurons(k=1, init="random")])
@pytest.mark.parametrize("norm", [nn.InstanceNorm2d(3), nn.Identity()])
def test_what_arrives_in_the_size_of_rounding_is_noted(operator: AddNeurons, norm: nn.Module) -> None:
    """The mean of what an instance norm gives is zero, but for rounding, which a fan-out would make large."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 1), norm, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)).double()
    batches = [(torch.randn(12, 2, 4, 4).double(), torch.randn(12, 2).double())]
    growths = dagrow.propose(dagrow.trace(model, batches[0][0][:2]), batches, nn.functional.mse_loss, [operator])
    said = ["of the size of rounding, of which no gain holds" in " ".join(growth.notes) for growth in growths]
    assert said == [not isinstance(norm, nn.Identity)]
