"""New layers as plain values, and where they are put into a graph."""

import pytest
import torch
from torch import Tensor, fx, nn

from dagrow.errors import StoreError
from dagrow.surgery._new_layers import crossed, dependent, layer_specs, rebuilt, zeroed

PATHS = {
    "a layer": nn.Linear(3, 4, bias=False),
    "layers": nn.Sequential(nn.Linear(3, 5), nn.LeakyReLU(0.2), nn.Linear(5, 4)),
    "images": nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.Tanh(), nn.Conv2d(5, 4, (1, 3), stride=2)),
}


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_layers_are_built_again_from_plain_values(path: nn.Module) -> None:
    again = rebuilt(layer_specs(path), 3, 4)
    assert repr(again) == repr(path)
    assert {name: p.shape for name, p in again.named_parameters()} == {
        name: p.shape for name, p in path.named_parameters()
    }
    assert not any(p.any() for p in again.parameters())


def test_both_ends_may_have_other_widths() -> None:
    again = rebuilt(layer_specs(PATHS["layers"]), 7, 8)
    assert again(torch.rand(2, 7)).shape == (2, 8)
    assert again[0].out_features == again[2].in_features == 5


def test_a_layer_of_ones_own_has_no_plain_value() -> None:
    class Own(nn.Tanh):
        pass

    with pytest.raises(StoreError, match="a new layer of type Own cannot be saved"):
        layer_specs(nn.Sequential(nn.Linear(3, 4), Own()))


def test_zeroed_layers_are_the_same_object() -> None:
    layer = nn.Linear(3, 4)
    assert zeroed(layer) is layer
    assert not layer(torch.rand(2, 3)).any()


def test_what_lies_between_and_what_waits() -> None:
    def forward(x: Tensor) -> Tensor:
        a = x.sin()
        b = a.cos()
        c = x.tan()
        return b + c

    graph = fx.symbolic_trace(forward).graph
    nodes = {node.name: node for node in graph.nodes}
    assert [node.name for node in crossed(nodes["sin"], nodes["add"])] == ["cos", "tan"]
    assert crossed(nodes["add"], nodes["sin"]) == []
    assert {node.name for node in dependent(nodes["sin"])} == {"cos", "add", "output"}
