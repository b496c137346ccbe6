"""Goals given to the wrong samples: the same as by brute force, uniform where nothing is there, small where it is."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest
import reference as truth
import torch
from torch import Tensor, nn

import dagrow
from dagrow import AddLayer, AddNeurons, GrowthError, MoveWeights
from dagrow.testing import snapshot
from dagrow.testing._snapshots_and_slopes import same

SPEC = spec_from_file_location("permutation", Path(__file__).parent / "benchmarks" / "permutation.py")
assert SPEC is not None
assert SPEC.loader is not None
permutation = module_from_spec(SPEC)
SPEC.loader.exec_module(permutation)
permutation_test = permutation.permutation_test
DOUBLE = torch.float64


def loss(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().sum() / len(output) / 2


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()


def noise(model: nn.Module, n: int, positions: int) -> tuple[Tensor, Tensor]:
    """The network's own outputs with noise; positions of a sample have most of features and noise in common."""
    x = torch.randn(n, 1, 4, dtype=DOUBLE) + 0.1 * torch.randn(n, positions, 4, dtype=DOUBLE)
    noise = torch.randn(n, 1, 2, dtype=DOUBLE) + 0.1 * torch.randn(n, positions, 2, dtype=DOUBLE)
    return x, model(x).detach() + noise


def growth(model: nn.Module, x: Tensor, y: Tensor, operator: dagrow.Operator | None = None) -> dagrow.Growth:
    batches = list(zip(x.split(31), y.split(31), strict=True))
    return dagrow.propose(dagrow.trace(model, x[:2]), batches, loss, [operator or AddNeurons(k=1, folds=1)])[0]


def explained(b: np.ndarray, p: np.ndarray, goals: np.ndarray) -> float:
    """The part of goals that the best direction explains, whitened by the root of the second moment with its ridge."""
    new, left = truth.residual(b, p), truth.residual(b, goals)
    gram = truth.moment(new, new) + 0.1 * np.diag(np.diag(truth.moment(p, p)))
    values, vectors = np.linalg.eigh(gram)
    root = vectors @ np.diag(values**-0.5) @ vectors.T
    return float(np.linalg.norm(root @ truth.moment(new, left), 2) ** 2 / truth.energy(left))


@pytest.mark.parametrize("positions", [1, 3])
def test_every_permutation_is_that_of_brute_force(positions: int) -> None:
    """Regressed again from the start, with the goals of all positions of a sample at another sample."""
    model = network(0)
    x, y = noise(model, 50, positions)
    b, v = truth.features(model, x, model[2]), truth.goals(model, loss, x, y, model[2])
    p, left = truth.features(model, x, model[0]), truth.residual(b, v)
    found = permutation_test(growth(model, x, y), 5, seed=3)
    assert found.samples == 50
    assert found.part == pytest.approx(explained(b, p, left), rel=1e-9)
    generator = torch.Generator().manual_seed(3)
    expected = [explained(b, p, left[torch.randperm(50, generator=generator).numpy()]) for _ in range(5)]
    assert found.permuted.tolist() == pytest.approx(expected, rel=1e-9)
    assert found.p_value == (1 + sum(part >= found.part for part in expected)) / 6
    assert f"p {found.p_value:.2g}" in str(found)


@pytest.mark.parametrize("positions", [1, 3])
def test_p_values_are_uniform_where_nothing_is_there(positions: int) -> None:
    p_values = []
    for seed in range(80):
        model = network(seed)
        p_values.append(permutation_test(growth(model, *noise(model, 40, positions)), 19, seed=seed).p_value)
    found = torch.tensor(p_values, dtype=DOUBLE)
    assert abs(float(found.mean()) - 0.525) < 3 * 0.29 / 80**0.5
    for level in (0.05, 0.25, 0.5, 0.75):
        share, error = float((found <= level + 1e-9).double().mean()), (level * (1 - level) / 80) ** 0.5
        assert abs(share - level) < 3 * error, f"{share} of p-values are {level} or less"


def test_a_neuron_that_is_missing_is_found() -> None:
    model = network(0)
    x, y = noise(model, 200, 1)
    y = y + 3 * torch.tanh(x @ torch.randn(4, 2, dtype=DOUBLE))
    for operator in (MoveWeights(edges=("2",)), AddNeurons()):
        proposed = growth(model, x, y, operator)
        before = snapshot(proposed.dag, None)
        found = permutation_test(proposed, 99)
        same(before, snapshot(proposed.dag, None), "a permutation test")
        assert found.p_value == 0.01, operator
        assert proposed.p_value is not None
        assert proposed.p_value < 0.01


class Between(nn.Module):
    """Two convolutions that read in several slots, then a mean."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.last = nn.Conv2d(2, 2, 3), nn.Conv2d(2, 3, 2), nn.Linear(3, 2)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.two(torch.tanh(self.one(x)))).mean((2, 3)))


def test_between_convolutions_taps_stand_side_by_side() -> None:
    model = Between()
    x, y = torch.randn(30, 2, 6, 5, dtype=DOUBLE), torch.randn(30, 2, dtype=DOUBLE)
    found = permutation_test(growth(model, x, y, AddNeurons(k=1, axes=("one",), folds=1)), 3)
    b, v = truth.features(model, x, model.two), truth.goals(model, loss, x, y, model.two)
    index = truth.read_at(model.two, (4, 3))
    slots, left = truth.in_slots(truth.features(model, x, model.one), index), truth.residual(b, v)
    taps = [slots[:, :, e] for e in range(index.shape[1])]
    new = [truth.residual(b, tap) for tap in taps]
    gram = np.mean([truth.moment(p, p) for p in new], 0)
    gram += 0.1 * np.diag(np.mean([np.diag(truth.moment(p, p)) for p in taps], 0))
    side = np.hstack([truth.moment(p, left) for p in new])
    values = np.linalg.eigvals(np.linalg.solve(gram, side @ side.T)).real
    assert found.part == pytest.approx(values.max() / truth.energy(left), rel=1e-8)


def test_what_cannot_be_permuted_says_why() -> None:
    model = network(0)
    x, y = noise(model, 40, 1)
    proposed = growth(model, x, y)
    with pytest.raises(ValueError, match="give one of AddNeurons or MoveWeights"):
        permutation_test(growth(model, x, y, AddLayer(2)))
    proposed.apply(0.5)
    with pytest.raises(GrowthError, match="stale"):
        permutation_test(proposed)
    sizes = [(x[:20], y[:20]), (x[20:].repeat(1, 2, 1), y[20:].repeat(1, 2, 1))]
    ragged = dagrow.propose(dagrow.trace(network(0), x[:2]), sizes, loss, [MoveWeights(folds=1)])[0]
    with pytest.raises(ValueError, match="samples of one size"):
        permutation_test(ragged)
