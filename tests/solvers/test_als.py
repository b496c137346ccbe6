"""Neurons that are read in several slots: turns never explain less."""

import pytest
import torch
from regressions import P, V, data, of

from dagrow.solvers import SlotMoments, alternating_least_squares, leading_svd


@pytest.mark.parametrize("seed", range(3))
def test_turns_never_explain_less_than_where_they_start(seed: int) -> None:
    d = data(n=200, p=6, o=4, seed=seed)
    m, slots = of(d), 2
    consumer = SlotMoments.of(m[P, P], m[P, V], slots, 0.1)
    start = leading_svd(consumer.cross.flatten(1), 2)[0]
    alpha = alternating_least_squares([consumer], start, m.resolution)
    before, after = (consumer.drop(a, consumer.fan_out(a, m.resolution)) for a in (start, alpha))
    assert after >= before > 0
    both = alternating_least_squares([consumer, consumer], start, m.resolution)
    torch.testing.assert_close(both, alpha)
