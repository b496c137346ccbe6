"""Linear layers and products with a parameter are rows times a matrix."""

import pytest
import torch
from torch import nn

from dagrow.layers import DEFAULT_RULES, EdgeRule, rule_for
from dagrow.layers._linear import Product


def by_rows(layer: nn.Module, inputs: torch.Tensor) -> None:
    """The rule's rows of features times its matrix are its rows of outputs."""
    rule = rule_for(layer, DEFAULT_RULES)
    assert isinstance(rule, EdgeRule)
    o, i = rule.dims["weight"]
    matrix = layer.weight.movedim((o, i), (0, 1))
    assert rule.widths(layer) == (matrix.shape[1], matrix.shape[0])
    assert rule.attributes(*rule.widths(layer)) == {
        "in_features": layer.in_features,
        "out_features": layer.out_features,
    }
    bias = 0 if layer.bias is None else layer.bias
    torch.testing.assert_close(rule.features(layer, inputs) @ matrix.T + bias, rule.rows(layer, layer(inputs)))
    assert inputs.shape[rule.channel_dim(inputs.ndim)] == matrix.shape[1]


@pytest.mark.parametrize("leading", [(2,), (2, 5), (2, 5, 6)])
@pytest.mark.parametrize("bias", [False, True])
def test_every_position_is_a_row(leading: tuple[int, ...], bias: bool) -> None:
    by_rows(nn.Linear(3, 4, bias=bias), torch.rand(*leading, 3))


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("columns", [False, True])
def test_a_product_is_one_of_rows_or_of_columns(turned: bool, columns: bool) -> None:
    weight = torch.rand(3, 4) if turned else torch.rand(4, 3)
    layer, x = Product(weight, turned=turned, columns=columns), torch.rand(2, 3, 5) if columns else torch.rand(2, 5, 3)
    matrix = weight.T if turned else weight
    torch.testing.assert_close(layer(x), matrix @ x if columns else x @ matrix.T)
    by_rows(layer, x)
