"""Rows of features and goals, and their moments: what the solvers are checked on."""

import itertools
from typing import NamedTuple

import numpy as np
import pytest
import torch

from dagrow.solvers import Moments, Rows

B, P, V, W = "b", "p", "v", "w"
FORM = "sums"  #: or "rows": how moments are kept
EPS = torch.finfo(torch.float64).eps


class Data(NamedTuple):
    """Rows ``[n, s, .]``: b with the constant last, candidates p, goals v."""

    b: np.ndarray
    p: np.ndarray
    v: np.ndarray


def data(n: int = 40, s: int = 1, i: int = 4, p: int = 5, o: int = 3, *, twins: int = 0, seed: int = 0) -> Data:
    """Candidates overlap with b, goals depend on both; ``twins`` features of each are repeated."""
    rng = np.random.default_rng(seed)
    b, c = rng.normal(size=(n, s, i)), rng.normal(size=(n, s, p))
    c[..., 0] += b[..., 0] + 0.7
    v = b @ rng.normal(size=(i, o)) + np.tanh(c @ rng.normal(size=(p, o))) + rng.normal(size=(n, s, o))
    b = np.concatenate([b, b[..., :twins] * 3.0, np.ones_like(b[..., :1])], -1)
    return Data(b, np.concatenate([c, c[..., :twins] * -2.0], -1), v)


def moments(rows: dict[str, np.ndarray], folds: int = 1) -> Moments:
    """Samples go round-robin into folds."""
    features = list(rows)
    n, s = rows[features[0]].shape[:2]
    counts = torch.tensor([len(range(f, n, folds)) for f in range(folds)])
    if FORM == "rows":
        kept = {
            x: Rows([torch.from_numpy(each[f::folds]).flatten(0, 1) for f in range(folds)]) for x, each in rows.items()
        }
        pairs = {(x, y): (kept[x], kept[y]) for x, y in itertools.combinations_with_replacement(features, 2)}
        return Moments(counts, {}, {f: float(s) for f in features}, EPS, rows=pairs)
    sums = {}
    for a in range(len(features)):
        for c in range(a, len(features)):
            x, y = (torch.from_numpy(rows[features[j]]) for j in (a, c))
            parts = [torch.einsum("nsx,nsy->xy", x[f::folds], y[f::folds]) for f in range(folds)]
            sums[features[a], features[c]] = torch.stack(parts)
    return Moments(counts, sums, {f: float(s) for f in features}, EPS)


def of(d: Data, folds: int = 1) -> Moments:
    return moments({B: d.b, P: d.p, V: d.v}, folds)


def near(actual: object, expected: object, rtol: float = 1e-8) -> None:
    """Entries apart by a part of the largest one."""
    a, e = np.asarray(actual, dtype=float), np.asarray(expected, dtype=float)
    np.testing.assert_allclose(a, e, rtol=0, atol=rtol * max(float(np.abs(e).max()), 1e-300))


VARIANTS = {"none": "raw", "constant": "centred", "all": "residual"}
CASES = {
    "plain": data(),
    "positions": data(n=20, s=3, seed=1),
    "one output": data(o=1, seed=2),
    "rank deficient": data(twins=2, seed=3),
    "fewer samples than features": data(n=6, i=9, p=8, seed=4),
    "wide goal": data(o=9, p=3, seed=5),
}


case = pytest.mark.parametrize("d", CASES.values(), ids=CASES)
