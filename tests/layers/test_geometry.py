"""Patches of convolutions of any kind against loops over positions and taps."""

import reference as truth
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from images import Kernel, kernels
from torch import Tensor

import dagrow
from dagrow.layers import rule_for

DRAWN = settings(
    max_examples=25,
    derandomize=True,
    deadline=None,
    database=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)
SPACES = st.sampled_from((1, 2, 3)).flatmap(lambda space: st.tuples(kernels(space), kernels(space)))


def image(space: int, channels: int, n: int = 3) -> Tensor:
    return torch.randn(n, channels, *(5, 4, 3)[:space], dtype=torch.float64)


@given(kernel=SPACES)
@DRAWN
def test_patches_are_those_of_loops(kernel: tuple[Kernel, Kernel]) -> None:
    layer, x = kernel[0].layer(2, 3).double(), image(len(kernel[0].size), 2)
    try:
        written = layer(x)
    except RuntimeError:
        assume(False)
    rule = rule_for(layer, dagrow.layers.DEFAULT_RULES)
    found = rule.features(layer, x)
    torch.testing.assert_close(found, torch.cat([truth.patches(layer, x[n : n + 1]) for n in range(3)]))
    o, i = rule.dims["weight"]
    matrix = layer.weight.movedim((o, i), (0, 1)).flatten(1)
    again = found @ matrix.T + (0 if layer.bias is None else layer.bias)
    torch.testing.assert_close(again, rule.rows(layer, written))
