"""Slopes and kinks of a loss, measured."""

import math

import pytest

from dagrow.testing._snapshots_and_slopes import derivative, kink


@pytest.mark.parametrize("steepness", [1e-3, 1.0, 1e6, 1e12])
def test_slopes_are_measured_where_the_loss_is_steep(steepness: float) -> None:
    found = derivative(lambda gamma: 2 + math.sin(1 + steepness * gamma))
    assert found == pytest.approx(steepness * math.cos(1.0), rel=1e-6)


def test_slopes_are_measured_where_the_loss_soon_saturates() -> None:
    assert derivative(lambda gamma: min((1 - 3e24 * gamma) ** 2, 9.0)) == pytest.approx(-6e24, rel=1e-6)
    assert derivative(lambda gamma: (1 - 3e24 * min(gamma, 1e-24)) ** 2) == pytest.approx(-6e24, rel=1e-6)


@pytest.mark.parametrize("steepness", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("jump", [0.0, 0.4])
def test_a_kink_is_half_of_the_jump_of_the_slope(steepness: float, jump: float) -> None:
    found = kink(lambda gamma: 2 + steepness * (math.sin(1 + gamma) + jump * max(gamma, 0.0)))
    assert found == pytest.approx(steepness * jump / 2, rel=1e-5, abs=1e-7 * max(1.0, steepness))
