"""Matrices: what is singular, dead or badly scaled."""

import torch
from regressions import near

from dagrow.solvers._linalg import whitening


def test_features_that_are_mostly_dead_and_depend_on_each_other() -> None:
    """In single precision, where LAPACK's eigenvalues of such a matrix do not converge."""
    generator = torch.Generator().manual_seed(0)
    x, alive = torch.randn(400, 160, generator=generator), torch.randperm(785, generator=generator)[:160]
    x[:, 1] = x[:, 0]
    p = torch.zeros(785, 785)
    p[alive[:, None], alive] = x.T @ x / 400
    found = whitening(p)
    near(found.whiten(found.whiten(p).T), torch.eye(159), 1e-3)
    assert found.note == "rank cut from 785 to 159"
