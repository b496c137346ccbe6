"""New hidden layers and residual blocks, against least squares on their own units."""

import pytest
import torch
from torch import nn
from wired import DOUBLE, Net, energy, images, left, loss

import dagrow
from dagrow import AddLayer, GrowthError


def test_a_layer_explains_what_its_own_units_explain() -> None:
    """The gain of a new layer is what least squares on its hidden units, taken from the grown model, adds."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3)).double()
    x = torch.randn(200, 4, dtype=DOUBLE)
    y = torch.sin(x @ torch.randn(4, 3, dtype=DOUBLE))
    (growth,) = dagrow.propose(dagrow.trace(model, x[:2]), [(x, y)], loss, [AddLayer(5, nn.ReLU(), folds=1)])
    goal = (y - model(x)).detach()
    growth.apply(0.0)
    hidden = torch.relu(model.hidden1.fan_in(x)).detach()
    ones = torch.ones(len(x), 1, dtype=DOUBLE)
    fall = left([x, ones], goal) - left([x, ones, hidden], goal)
    assert growth.gain == pytest.approx(fall, rel=1e-8)
    random = torch.relu(torch.randn(200, 5, 4, dtype=DOUBLE, generator=torch.Generator().manual_seed(1)) @ x.T)
    others = [left([x, ones], goal) - left([x, ones, units.T], goal) for units in random]
    assert fall > sorted(others)[-20]  # among the best tenth of random layers


@pytest.mark.parametrize("name", ["one", "two"])
def test_a_residual_block_explains_what_an_activation_wants(name: str) -> None:
    """Identity-initialised: ``x + f(x)``, f fitted to minus the gradient at the activation, for all that read it."""
    torch.manual_seed(0)
    model = Net().double()
    x, y = torch.randn(200, 5, dtype=DOUBLE), torch.randn(200, 2, dtype=DOUBLE)
    dag = dagrow.trace(model, x[:2])
    growths = dagrow.propose(dag, [(x, y)], loss, [AddLayer(4, nn.Tanh(), folds=1, exact=100)])
    (growth,) = [growth for growth in growths if growth.where == f"{name} -> itself"]
    one = torch.tanh(model.one(x))
    activation = (one if name == "one" else torch.tanh(model.two(one))).detach().requires_grad_()
    rest = model.three(torch.tanh(model.two(activation)) if name == "one" else activation)
    wish = -torch.autograd.grad((rest - y).square().sum() / 2, activation)[0]
    expected = model(x)
    receipt = growth.apply(0.0)
    assert torch.equal(model(x), expected)
    hidden = torch.tanh(model.hidden1.fan_in(activation)).detach()
    explained = energy(wish) - left([hidden], wish)
    assert growth.gain == pytest.approx(explained, rel=1e-8)
    receipt.undo()
    loss_before = loss(model(x), y)
    growth.apply(0.1)
    assert loss(model(x), y) < loss_before
    assert dag.axis(name).growable


def test_residual_blocks_between_images(tmp_path) -> None:
    """They keep the grid, whatever the kernel, and files hold them."""
    model, batches = images()
    x = batches[0][0]
    dag, expected = dagrow.trace(model, x[:2]), model(x)
    growths = dagrow.propose(dag, batches, loss, [AddLayer(2, nn.Tanh(), kernel=3, exact=100)])
    places = {growth.where for growth in growths if growth.where.endswith("itself")}
    assert places == {"norm -> itself", "second -> itself", "third -> itself"}
    (growth,) = [growth for growth in growths if growth.where == "second -> itself"]
    slope = (growth.loss(1e-4) - growth.loss(-1e-4)) / 2e-4
    assert -slope == pytest.approx(growth.gain, rel=1e-4, abs=1e-12)
    growth.apply(0.0)
    assert torch.allclose(model(x), expected, atol=1e-12)
    with torch.no_grad():
        model.hidden1.fan_out.weight.normal_()
    dagrow.save(dag, tmp_path / "grown.pt")
    fresh = images()[0]
    dagrow.load(fresh, tmp_path / "grown.pt", x[:2])
    assert torch.equal(fresh(x), model(x))


@pytest.mark.parametrize("exact", [1, 100])
def test_residual_blocks_in_front_of_frozen_layers(exact: int) -> None:
    """Their goals do not depend on what else is measured."""
    torch.manual_seed(0)
    model = Net().double()
    for parameter in (*model.one.parameters(), *model.two.parameters()):
        parameter.requires_grad_(False)
    x, y = torch.randn(60, 5, dtype=DOUBLE), torch.randn(60, 2, dtype=DOUBLE)
    dag = dagrow.trace(model, x[:2])
    growths = dagrow.propose(dag, [(x, y)], loss, [AddLayer(2, nn.Tanh(), folds=1, exact=exact)])
    if exact > 1:
        assert {"one -> itself", "two -> itself"} <= {growth.where for growth in growths}
    assert all(growth.gain > 0 for growth in growths)
    assert not model.one.weight.requires_grad


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AddLayer(0), "k=0"),
        (lambda: AddLayer(2, nn.Linear(2, 2)), "entry from itself alone"),
        (lambda: AddLayer(2, "relu"), "entry from itself alone"),
        (lambda: AddLayer(2, nn.RReLU()), "draws random numbers"),
        (lambda: AddLayer(2, nn.Dropout()), "draws random numbers"),
        (lambda: AddLayer(2, seed=0.5), "seed=0.5"),
    ],
)
def test_settings_of_layers_that_make_no_sense(make, message: str) -> None:
    with pytest.raises(GrowthError, match=message):
        make()
