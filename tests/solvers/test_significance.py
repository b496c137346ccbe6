"""What is more than chance: z of scores, tails, and p-values of many places together."""

import numpy as np
import pytest
import reference as truth
import torch
from hypothesis import given
from hypothesis import strategies as st

from dagrow.solvers import Verdict, holm, upper_tail


@pytest.mark.parametrize("factor", [1e-6, 1.0, 1e6])
def test_verdicts_in_any_unit(factor: float) -> None:
    rng = np.random.default_rng(15)
    noise = rng.normal(size=400)

    def of(d: np.ndarray, c: np.ndarray) -> Verdict:
        rows = torch.from_numpy(np.stack([factor * d, factor * c, np.ones(len(d))], 1))
        return Verdict.of(rows.T @ rows)

    found = of(noise + 0.3, noise + 0.5)
    assert found.samples == 400
    assert found.gain == pytest.approx(factor * np.mean(noise + 0.3))
    assert found.error == pytest.approx(factor * np.std(noise, ddof=1) / 20)
    assert found.z == pytest.approx(np.sum(noise + 0.5) / np.sqrt(2 * np.sum((noise + 0.5) ** 2)))
    assert of(noise, 0 * noise).z == 0
    assert upper_tail(0) == 0.5
    assert upper_tail(1.6448536269514722) == pytest.approx(0.05, rel=1e-9)
    assert upper_tail(3) == pytest.approx(0.00134989803, rel=1e-6)


@given(st.lists(st.sampled_from([1e-5, 0.001, 0.009, 0.01, 0.02, 0.3]), max_size=5), st.integers(0, 3))
def test_adjusted_p_values_are_those_of_closed_testing(p_values: list[float], further: int) -> None:
    tests = len(p_values) + further
    assert holm(p_values, tests) == pytest.approx(list(truth.closed_testing(p_values, tests)))
