"""A rule for a type of layer of a user's own: it is asked before those that dagrow has, and only of its own forward."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import dagrow
from dagrow.layers import DEFAULT_RULES, RiderRule, rule_for, with_constant


class Scale(nn.Module):
    """A Bessel function, which no rule knows, so that nothing but its own rule lets channels through."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.weight = width, nn.Parameter(torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.i0(x) * self.weight


class Shifted(Scale):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


@dataclass(frozen=True)
class ScaleRule(RiderRule):
    types = (Scale,)

    def channel_dim(self, ndim: int) -> int:
        return ndim - 1

    def attributes(self, module: nn.Module, width: int) -> dict[str, int]:
        return {"width": width}

    def passing(self, module: nn.Module) -> dict[str, Tensor]:
        return {"weight": torch.ones(())}


def test_an_axis_grows_through_a_layer_with_a_rule_of_its_own() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 4), Scale(4), nn.Linear(4, 2)).double(), torch.randn(5, 3).double()
    assert not dagrow.trace(model, x).axis("0").growable
    dag, before = dagrow.trace(model, x, rules=[ScaleRule()]), model(x)
    loss = nn.MSELoss()
    (growth,) = dagrow.propose(dag, [(x, torch.randn(5, 2).double())], loss, [dagrow.AddNeurons(k=2, folds=1)])
    growth.apply(0.0)
    assert model[1].width == 6
    assert model[1].weight.tolist()[4:] == [1.0, 1.0]
    torch.testing.assert_close(model(x), before)


def test_rules_speak_for_a_class_and_for_subclasses_that_keep_its_forward() -> None:
    rules = (ScaleRule(), *DEFAULT_RULES)
    assert rule_for(Scale(2), rules) is rules[0]
    assert rule_for(Shifted(2), rules) is None
    assert rule_for(nn.Linear(2, 2), DEFAULT_RULES) is DEFAULT_RULES[0]
    assert with_constant(torch.zeros(3, 2), True).tolist() == [[0.0, 0.0, 1.0]] * 3
