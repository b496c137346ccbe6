"""Sums of products of patches are those of the patches themselves."""

import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from images import Kernel, kernels

from dagrow.layers import DEFAULT_RULES, rule_for
from dagrow.statistics._patch_products import patch_gram

DRAWN = settings(
    max_examples=25,
    derandomize=True,
    deadline=None,
    database=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)


@given(kernel=st.sampled_from((1, 2, 3)).flatmap(kernels), groups=st.sampled_from((1, 2)), alike=st.booleans())
@DRAWN
def test_sums_by_lag_are_those_of_patches(kernel: Kernel, groups: int, alike: bool) -> None:
    layer, sizes = kernel.layer(2, 3), (6, 5, 4)[: len(kernel.size)]
    geometry = rule_for(layer, DEFAULT_RULES).geometry(layer)
    assume(all(step == 1 for step in geometry.stride))
    left = torch.randn(3, 2 * groups, *sizes).double()
    right = left if alike else torch.randn(3, 4 * groups, *sizes).double()
    try:
        lines = [[1.0] * size for size in geometry.sizes(sizes)]
        x, y = (geometry.patches(image.unflatten(1, (groups, -1)).flatten(0, 1)) for image in (left, right))
    except RuntimeError:  # more margin than image
        assume(False)
    assume(all(lines))
    lines[0][-1], lines[-1][0] = 0.5, 2.0
    weights = torch.ones(()).double()
    for line in lines:
        weights = weights[..., None] * torch.tensor(line).double()
    x, y = (rows.unflatten(0, (3, groups)) for rows in (x, y))
    expected = torch.einsum("t, ngti, ngtj -> gij", weights.flatten(), x, y)
    gram = patch_gram(left, right, geometry, lines, groups)
    torch.testing.assert_close(gram.reshape(expected.shape), expected, rtol=1e-10, atol=1e-10)
