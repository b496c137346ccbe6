"""Moments of folds, of sums of samples, and in either order."""

import torch
from regressions import B, P, V, data, moments, near, of


def test_moments_of_folds_are_those_of_their_samples() -> None:
    d = data(n=22, s=2)
    m = of(d, 3)
    for fold, (others, own) in enumerate(m.split()):
        kept = torch.arange(22).numpy() % 3 == fold
        for part, chosen in ((own, kept), (others, ~kept)):
            alone = moments({B: d.b[chosen], P: d.p[chosen], V: d.v[chosen]})
            assert part.samples == alone.samples
            near(part[P, V], alone[P, V])
            near(part[V, P], alone[P, V].T)


def test_moments_of_other_samples_add_and_those_of_the_same_ones_join() -> None:
    d = data(n=22)
    first, second = (moments({B: d.b[part], V: d.v[part]}) for part in (slice(0, 7), slice(7, 22)))
    near((first + second)[B, V], of(d)[B, V])
    both = moments({B: d.b}).joined(moments({P: d.p, V: d.v}))
    near(both[P, V], of(d)[P, V])
    assert (B, B) in both
    assert (B, P) not in both


def test_rounded_moments_are_those_of_all_samples_in_the_precision_of_activations() -> None:
    m = of(data(n=22), 3)
    assert (m.rounded.samples, m.rounded.units) == (22, 22)
    near(m.rounded[P, V], m[P, V])
    m.resolution = torch.finfo(torch.float32).eps
    again = of(data(n=22), 3).joined(m)
    assert again.rounded[P, V].dtype == torch.float32
    torch.testing.assert_close(again.rounded[P, V].double(), m[P, V], rtol=1e-5, atol=1e-6)
    assert m[P, V].dtype == torch.float64
