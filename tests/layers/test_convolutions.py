"""Convolutions with groups: new groups pass their channels, and sizes are stated as torch states them."""

import pytest
import torch
from torch import nn

from dagrow.layers import DEFAULT_RULES, BlockConvolutionRule, GroupedRule, RiderRule, rule_for

KINDS = [nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d]


def grouped(kind: type[nn.Module], inputs: int, outputs: int, groups: int) -> nn.Module:
    return kind(inputs, outputs, 3, padding=1, groups=groups)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [1, 2])
def test_a_new_group_passes_its_channels(kind: type[nn.Module], width: int) -> None:
    layer = grouped(kind, 4 * width, 4 * width, 4)
    rule = rule_for(layer, DEFAULT_RULES)
    assert isinstance(rule, GroupedRule)
    new, entries = grouped(kind, width, width, 1), rule.passing(layer)
    with torch.no_grad():
        new.weight.copy_(entries["weight"])
        new.bias.fill_(entries["bias"])
    x = torch.rand(2, width, *[5] * rule.space)
    torch.testing.assert_close(new(x), x)


@pytest.mark.parametrize("kind", KINDS)
def test_each_position_is_passed_to_itself(kind: type[nn.Module]) -> None:
    layer = grouped(kind, 4, 4, 4)
    rule = rule_for(layer, DEFAULT_RULES)
    assert isinstance(rule, RiderRule)
    tables = rule.source(layer, [5] * rule.space)
    assert [table.flatten().tolist() for table in tables] == [list(range(5))] * rule.space


@pytest.mark.parametrize("kind", KINDS)
def test_stated_sizes_are_those_of_the_layer(kind: type[nn.Module]) -> None:
    plain, depthwise, blocks = grouped(kind, 4, 6, 1), grouped(kind, 4, 8, 4), grouped(kind, 4, 6, 2)
    edge, rider = rule_for(plain, DEFAULT_RULES), rule_for(depthwise, DEFAULT_RULES)
    assert edge.widths(plain) == (4, 6)
    block = BlockConvolutionRule(edge.space, edge.transposed, 2)
    assert block.covers(blocks)
    assert not block.covers(plain)
    for layer, attributes in (
        (plain, edge.attributes(4, 6)),
        (depthwise, rider.attributes(depthwise, 8)),
        (blocks, block.attributes(2, 6)),
    ):
        assert {name: getattr(layer, name) for name in attributes} == attributes


def test_transposed_groups_of_unequal_numbers_are_refused() -> None:
    rule = GroupedRule(1, transposed=True)
    assert rule.refusal(grouped(nn.ConvTranspose1d, 4, 8, 4))
    assert not rule.refusal(grouped(nn.ConvTranspose1d, 4, 4, 4))
