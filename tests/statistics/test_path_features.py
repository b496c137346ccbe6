"""What new layers would read and compute."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from dagrow.layers import DEFAULT_RULES, rule_for
from dagrow.statistics import ActivationGoal, Hidden, MeanInputs, PatchInputs
from dagrow.statistics._captures import Batch, Capture


def captured(layer: nn.Module, inputs: Tensor, **goals: Tensor) -> Batch:
    """What a batch leaves at a layer."""
    rule: Any = rule_for(layer, DEFAULT_RULES)
    capture = Capture(layer, rule, None, None, inputs, inputs._version, layer(inputs).shape, **goals)
    return Batch({"layer": capture}, len(inputs))


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (1, 2, 0), (2, 2, 1), (1, 1, 0)])
def test_patches_are_those_that_a_new_convolution_reads(kernel: int, stride: int, padding: int) -> None:
    x, new = torch.randn(4, 3, 6, 5), nn.Conv2d(3, 2, kernel, stride, padding)
    rule: Any = rule_for(new, DEFAULT_RULES)
    batch = captured(nn.Conv2d(3, 4, 3), x)
    feature = PatchInputs("layer", geometry=rule.geometry(new))
    rows = feature.rows(batch)
    assert rows.shape[0] == feature.count(batch)
    weight = torch.cat([new.weight.flatten(1), new.bias[:, None]], 1)
    torch.testing.assert_close(rows @ weight.T, new(x).permute(0, 2, 3, 1).flatten(0, 2))
    image = feature.image(batch)
    assert (image is not None) == (kernel == 1)
    if image is not None:
        torch.testing.assert_close(functional.conv2d(image, new.weight, new.bias), new(x))


def test_means_over_positions_have_a_row_for_each_image() -> None:
    x = torch.randn(4, 3, 6, 5)
    batch, feature = captured(nn.Conv2d(3, 4, 3), x), MeanInputs("layer")
    torch.testing.assert_close(feature.rows(batch), torch.cat([x.mean((2, 3)), torch.ones(4, 1)], 1))
    assert feature.count(batch) == 4


def test_goals_of_an_activation_have_its_channels_last() -> None:
    x, goal = torch.randn(4, 3, 6, 5), torch.randn(4, 3, 6, 5)
    batch, feature = captured(nn.Conv2d(3, 4, 3), x, input_goal=goal), ActivationGoal("layer")
    assert torch.equal(feature.rows(batch), goal.permute(0, 2, 3, 1).flatten(0, 2))
    assert feature.count(batch) == 4 * 6 * 5
    assert feature.image(batch) is goal
    assert ActivationGoal("layer").image(captured(nn.Linear(3, 2), torch.randn(4, 3), input_goal=goal)) is None


def test_hidden_units_are_what_a_layer_in_between_computes() -> None:
    x, layer = torch.randn(4, 3, 6, 5), nn.Conv2d(3, 7, 3, padding=1)
    rule: Any = rule_for(layer, DEFAULT_RULES)
    source = PatchInputs("layer", geometry=rule.geometry(layer))
    alpha = torch.cat([layer.weight.flatten(1), layer.bias[:, None]], 1).T.detach()
    rows = Hidden(source, alpha, nn.Tanh()).rows(captured(nn.Conv2d(3, 4, 3), x))
    torch.testing.assert_close(rows, layer(x).tanh().permute(0, 2, 3, 1).flatten(0, 2).detach())
