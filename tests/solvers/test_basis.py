"""Indices of features stand for the features with them."""

import pytest
import torch
from regressions import VARIANTS, B, Data, P, V, case, near, of

from dagrow.solvers import (
    Regression,
    fan_out,
    validate_fan_out,
)
from dagrow.solvers._basis import Basis


@case
@pytest.mark.parametrize("ridge", [0.0, 0.3])
@pytest.mark.parametrize("compensation", VARIANTS)
def test_indices_stand_for_the_features_with_them(d: Data, compensation: str, ridge: float) -> None:
    m, block, chosen = of(d, 2), Regression(P, B, V, compensation, constant=True), torch.tensor([2, 0])
    choices = (chosen, torch.eye(d.p.shape[-1], dtype=torch.float64)[:, chosen])
    fit, expected = (fan_out(m, block, choice, ridge) for choice in choices)
    near(fit.weights, expected.weights)
    near((fit.gain, fit.drop), (expected.gain, expected.drop))
    held, expected = (validate_fan_out(m.split(), block, choice, (ridge,)) for choice in choices)
    near(held.gain, expected.gain)
    near(*(Basis(choice).spread(fit.weights, d.p.shape[-1]) for choice in choices))
    every = torch.arange(d.p.shape[-1])
    near(fan_out(m, block, None, ridge).weights, fan_out(m, block, every, ridge).weights)
