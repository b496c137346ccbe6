"""New channels pass norms unchanged."""

from typing import Any

import pytest
import torch
from torch import nn

from dagrow.layers import DEFAULT_RULES, RiderRule, rule_for


def rule_of(layer: nn.Module) -> Any:
    rule = rule_for(layer, DEFAULT_RULES)
    assert isinstance(rule, RiderRule)
    return rule


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(1), nn.InstanceNorm1d(1, affine=True, track_running_stats=True)])
@pytest.mark.parametrize("calibrated", [False, True])
def test_a_channel_with_its_entries_passes_in_eval_mode(layer: nn.Module, calibrated: bool) -> None:
    rule, x = rule_of(layer.double().eval()), torch.rand(6, 1, 7).double() * 3 + 2
    entries = rule.calibrated(layer, x.mean(), x.var()) if calibrated else rule.passing(layer)
    assert set(entries) == {"weight", "bias", "running_mean", "running_var"}
    with torch.no_grad():
        for name, value in entries.items():
            getattr(layer, name).fill_(value)
        torch.testing.assert_close(layer(x), x)
        if calibrated:  # and in train mode it has the mean and the variance that it had
            torch.testing.assert_close(layer.running_mean[0], x.mean())


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.BatchNorm1d(4, affine=False), "without affine parameters"),
        (nn.BatchNorm2d(4, track_running_stats=False), "mixes the samples"),
        (nn.InstanceNorm2d(4, track_running_stats=True), "no affine parameters"),
        (nn.BatchNorm2d(4), None),
        (nn.InstanceNorm2d(4), None),
    ],
)
def test_norms_that_cannot_pass_a_channel_say_why(layer: nn.Module, reason: str | None) -> None:
    why = rule_of(layer).refusal(layer)
    assert why is None if reason is None else reason in why


def test_groups_grow_as_a_whole() -> None:
    layer = nn.GroupNorm(3, 6)
    rule = rule_of(layer)
    assert rule.group(layer) == (2, 2)
    wider = rule.attributes(layer, 8)
    assert wider == {"num_channels": 8, "num_groups": 4}
    x = torch.rand(5, 8, 3)
    torch.testing.assert_close(nn.GroupNorm(wider["num_groups"], wider["num_channels"])(x)[:, :6], layer(x[:, :6]))


def test_a_slope_for_all_channels_is_none_of_each() -> None:
    assert rule_for(nn.PReLU(), DEFAULT_RULES) is None
    rule = rule_of(nn.PReLU(4))
    assert rule.passing(nn.PReLU(4))["weight"] == nn.PReLU(1).weight
    assert [rule.channel_dim(ndim) for ndim in (1, 2, 4)] == [0, 1, 1]
