"""Sums of products of patches are those of the patches themselves."""

import itertools
from math import prod

import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from images import Kernel, kernels

from dagrow.layers import DEFAULT_RULES, rule_for
from dagrow.statistics._patch_products import Offsets, lagged, patch_gram

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


@given(
    dims=st.lists(
        st.tuples(*(st.integers(1, 3) for _ in range(6)), st.integers(-2, 1), st.integers(-2, 1)),
        min_size=1,
        max_size=2,
    ),
    groups=st.sampled_from((1, 2)),
)
@DRAWN
def test_sums_with_strides_are_those_of_a_loop(dims: list[tuple[int, ...]], groups: int) -> None:
    """Against the equation, place by place, also where a stride leaves margins and entries unread."""
    sizes = [(2 + m, 3 + n) for m, n, *_ in dims]
    left, right = (
        torch.randn(2, groups * c, *size).double() for c, size in zip((2, 3), zip(*sizes, strict=True), strict=True)
    )
    offsets = [
        Offsets(
            tuple(e + gap_e * i for i in range(taps_e)),
            tuple(d + gap_d * j for j in range(taps_d)),
            (1.0, 0.5, 1.0, 1.0, 2.0),
            (m, n),
        )
        for m, n, taps_e, taps_d, gap_e, gap_d, e, d in dims
    ]
    taps = [len(o.second) for o in offsets], [len(o.first) for o in offsets]
    found = lagged(left, right, offsets, groups, torch.empty(groups, 3, *taps[0], *taps[1], 2).double())
    expected = torch.zeros_like(found)
    places = itertools.product(
        *(
            itertools.product(range(size), enumerate(o.first), enumerate(o.second))
            for o, (size, _) in zip(offsets, sizes, strict=True)
        )
    )
    for place in places:
        s = [o.strides[0] * u + e for o, (u, (_, e), _) in zip(offsets, place, strict=True)]
        other = [o.strides[1] * at + d for o, at, (_, _, (_, d)) in zip(offsets, s, place, strict=True)]
        if not all(0 <= at < len(o.weights) for o, at in zip(offsets, s, strict=True)):
            continue
        if not all(0 <= at < size for at, (_, size) in zip(other, sizes, strict=True)):
            continue
        weight = prod(o.weights[at] for o, at in zip(offsets, s, strict=True))
        x = left[(..., *(u for u, _, _ in place))].unflatten(1, (groups, -1))
        y = right[(..., *other)].unflatten(1, (groups, -1))
        first, second = [i for _, (i, _), _ in place], [j for _, _, (j, _) in place]
        expected[(slice(None), slice(None), *second, *first)] += weight * torch.einsum("nga,ngb->gba", x, y)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
