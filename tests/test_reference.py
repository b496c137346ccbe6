"""The slow truths against each other, against theory, and against networks that are really made wider."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pytest
import torch
from reference import (
    Array,
    Neurons,
    best_move,
    bottleneck,
    connection,
    energy,
    explained,
    features,
    finite_slope,
    flat,
    goals,
    held_out,
    inverse_root,
    moment,
    move_slope,
    neurons_joint,
    neurons_sequential,
    product,
    residual,
    ridge_rank,
    tangent_projection,
    written,
)
from torch import Tensor, nn

EXACT = 1e-9  # relative, for what is equal up to rounding
SLOPE = 1e-6  # relative, for what a finite difference measures


@dataclass(frozen=True)
class Case:
    """Random data in which p overlaps b, and v asks for both and for more."""

    seed: int
    n: int = 60
    s: int = 1
    i: int = 4
    o: int = 3
    p: int = 6
    bias: bool = True
    duplicates: int = 0

    def data(self) -> tuple[Array, Array, Array]:
        rng = np.random.default_rng(self.seed)
        x = rng.normal(size=(self.n, self.s, self.p)) * np.linspace(0.5, 2.0, self.p)
        B = np.tanh(x @ rng.normal(size=(self.p, self.i)))
        P = np.concatenate([x, x[..., : self.duplicates]], axis=-1)
        V = B @ rng.normal(size=(self.i, self.o)) + x @ rng.normal(size=(self.p, self.o)) * 0.3 + 0.7
        V = V + rng.normal(size=V.shape) * 0.5
        one = np.ones((self.n, self.s, 1))
        return (np.concatenate([B, one], -1), np.concatenate([P, one], -1), V) if self.bias else (B, P, V)


CASES = [
    Case(0),
    Case(1, n=40, s=5),
    Case(2, bias=False),
    Case(3, duplicates=3),
    Case(4, n=30, s=3, i=2, o=5, p=4, bias=False, duplicates=2),
    Case(5, o=1, p=9),
]
VARIANTS = ["raw", "centred", "residual"]  # "centred" takes the mean out, which a constant among the features can
over_cases = pytest.mark.parametrize("case", CASES, ids=str)
over_ranks = pytest.mark.parametrize("k", [1, 2])


def near(value: float | Array, rel: float = EXACT) -> object:
    return pytest.approx(value, rel=rel, abs=rel * 1e-2)


# ---------------------------------------------------------------- what the layer can follow


@over_cases
def test_the_residual_is_orthogonal_to_what_the_layer_reads(case: Case) -> None:
    B, _, V = case.data()
    overlap = np.einsum("nsi,nso->io", B, residual(B, V))
    assert np.abs(overlap).max() < 1e-10 * case.n
    assert np.abs(np.einsum("nsi,nso->io", B, V)).max() > 1.0


@over_cases
def test_the_move_explains_what_the_moments_say(case: Case) -> None:
    B, _, V = case.data()
    S, M = np.einsum("nsi,nsj->ij", B, B) / case.n, np.einsum("nsi,nso->io", B, V) / case.n
    dW = np.linalg.solve(S, M).T
    assert best_move(B, V) == near(dW)
    assert bottleneck(B, V) == near(np.sum(V**2) / case.n - np.trace(dW @ M))
    assert move_slope(B, V, best_move(B, V)) == near(-np.trace(dW @ M))


def test_a_feature_read_twice_changes_no_residual() -> None:
    B, _, V = Case(6).data()
    twice = np.concatenate([B, B[..., :2]], axis=-1)
    assert residual(twice, V) == near(residual(B, V))
    assert bottleneck(B[..., 1:], V) > bottleneck(B, V) * 1.01


# ---------------------------------------------------------------- neurons


@over_cases
@over_ranks
def test_sequential_neurons_lower_the_residual_by_their_squared_values(case: Case, k: int) -> None:
    B, P, V = case.data()
    found = neurons_sequential(B, P, V, k)
    drop = bottleneck(B, V) - energy(residual(B, V) - P @ found.fan_in @ found.fan_out.T)
    assert drop == near(np.sum(found.values**2))
    assert drop > 1e-3
    assert not found.compensation.any()


@over_cases
@over_ranks
def test_joint_neurons_lower_the_residual_by_their_squared_values(case: Case, k: int) -> None:
    B, P, V = case.data()
    found = neurons_joint(B, P, V, k)
    left = V - B @ best_move(B, V).T - P @ found.fan_in @ found.fan_out.T - B @ found.compensation.T
    assert bottleneck(B, V) - energy(left) == near(np.sum(found.values**2))
    assert energy(left) == near(bottleneck(np.concatenate([B, P @ found.fan_in], axis=-1), V))


@over_cases
@over_ranks
def test_neurons_are_the_truncated_regression(case: Case, k: int) -> None:
    """svd(P^-1/2 N) gives what lstsq followed by the svd of the fitted values gives."""
    B, P, V = case.data()
    found = neurons_sequential(B, P, V, k)
    assert found.fan_out @ found.fan_in.T == near(ridge_rank(P, residual(B, V), 0.0, k), 1e-7)
    new = residual(B, P)
    joint = neurons_joint(B, P, V, k)
    assert written(joint, B, P) == near(new @ ridge_rank(new, V, 0.0, k).T, 1e-7)


@over_cases
@over_ranks
def test_joint_is_at_least_sequential(case: Case, k: int) -> None:
    B, P, V = case.data()
    joint, sequential = neurons_joint(B, P, V, k), neurons_sequential(B, P, V, k)
    assert np.sum(joint.values**2) >= np.sum(sequential.values**2)
    freed = np.concatenate([B, P @ sequential.fan_in], axis=-1)
    assert energy(residual(B, V) - written(joint, B, P)) <= bottleneck(freed, V) * (1 + EXACT)


@over_cases
@over_ranks
def test_no_random_candidate_explains_more(case: Case, k: int) -> None:
    """Random fan-in, and the best fan-out and move for it: neither one beats its closed form."""
    B, P, V = case.data()
    rng = np.random.default_rng(100 + case.seed)
    v_perp, start = residual(B, V), bottleneck(B, V)
    joint = np.sum(neurons_joint(B, P, V, k).values ** 2)
    sequential = np.sum(neurons_sequential(B, P, V, k).values ** 2)
    for _ in range(500):
        H = P @ rng.normal(size=(P.shape[-1], k))
        assert start - bottleneck(H, v_perp) <= sequential + 1e-10
        assert start - bottleneck(np.concatenate([B, H], axis=-1), V) <= joint + 1e-10


def alternate(B: Array, P: Array, V: Array, k: int, rng: np.random.Generator, turns: int = 40) -> float:
    """E |v - dW b - Omega A^T p|^2 by least squares for (dW, Omega) and (dW, A) in turn."""
    A = rng.normal(size=(P.shape[-1], k))
    value = np.inf
    for _ in range(turns):
        found = best_move(np.concatenate([B, P @ A], axis=-1), V)
        Omega = found[:, B.shape[-1] :]
        read = np.hstack([np.kron(np.eye(V.shape[-1]), flat(B)), np.kron(Omega, flat(P))])
        solution = np.linalg.lstsq(read, flat(V).T.reshape(-1), rcond=None)[0]
        value = np.sum((flat(V).T.reshape(-1) - read @ solution) ** 2) / len(V)
        A = solution[B.shape[-1] * V.shape[-1] :].reshape(k, -1).T
    return float(value)


@pytest.mark.parametrize("case", CASES[:5], ids=str)
@over_ranks
def test_alternating_least_squares_meets_the_joint_optimum(case: Case, k: int) -> None:
    B, P, V = case.data()
    rng = np.random.default_rng(case.seed)
    best = bottleneck(B, V) - np.sum(neurons_joint(B, P, V, k).values ** 2)
    reached = [alternate(B, P, V, k, rng) for _ in range(3)]
    assert min(reached) >= best * (1 - EXACT)
    assert min(reached) == pytest.approx(best, rel=1e-4)


def test_nothing_new_makes_no_neuron() -> None:
    B, _, V = Case(7).data()
    P = B @ np.random.default_rng(7).normal(size=(B.shape[-1], 4))
    assert neurons_joint(B, P, V, 2).values == pytest.approx(0, abs=1e-10)
    assert connection(B, P, V).gain == pytest.approx(0, abs=1e-10)
    assert np.abs(connection(B, P, V).weight).max() < 1e-6


# ---------------------------------------------------------------- regressions on given features


@over_cases
def test_a_connection_gains_what_reading_both_explains(case: Case) -> None:
    B, P, V = case.data()
    found = connection(B, P, V)
    both = bottleneck(np.concatenate([B, P], axis=-1), V)
    assert found.gain == near(bottleneck(B, V) - both)
    assert energy(found.residual) == near(both)
    added = P @ found.weight.T + B @ found.compensation.T
    assert residual(B, V) - added == near(found.residual)
    assert found.gain == near(np.trace(found.weight @ moment(P, residual(B, V))))


@over_cases
def test_all_neurons_together_are_the_connection(case: Case) -> None:
    B, P, V = case.data()
    values = neurons_joint(B, P, V, min(P.shape[-1], V.shape[-1])).values
    assert np.sum(values**2) == near(connection(B, P, V).gain)


def hidden(case: Case, P: Array) -> Array:
    rng = np.random.default_rng(50 + case.seed)
    return np.maximum(P @ rng.normal(size=(P.shape[-1], 3)), 0.0)


@pytest.mark.parametrize(
    ("case", "variant"), [(c, v) for c in CASES for v in VARIANTS if c.bias or v != "centred"], ids=str
)
@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_the_explained_part_is_the_ridge_regression(case: Case, variant: str, ridge: float) -> None:
    B, P, V = case.data()
    H = hidden(case, P)
    found = explained(B, H, V, variant, ridge)
    new = {"raw": H, "centred": H - H.mean(axis=(0, 1)), "residual": residual(B, H)}[variant]
    G = moment(new, new)
    G = G + ridge * np.trace(G) / 3 * np.eye(3)
    X = np.linalg.solve(G, np.einsum("nsk,nso->ko", new, residual(B, V)) / case.n).T
    assert found.weight == near(X)
    added = H @ found.weight.T + B @ found.compensation.T
    assert residual(B, V) - added == near(found.residual)
    assert found.gain == near(product(V, added))


@pytest.mark.parametrize("case", [c for c in CASES if c.bias], ids=str)
def test_taking_out_more_of_b_explains_more(case: Case) -> None:
    B, P, V = case.data()
    H = hidden(case, P)
    left = [energy(explained(B, H, V, variant).residual) for variant in ("raw", "centred", "residual")]
    assert left[0] > left[1] > left[2]
    assert left[2] == near(bottleneck(np.concatenate([B, H], axis=-1), V))


def test_a_mean_is_not_taken_out_without_the_constant() -> None:
    B, P, V = Case(2, bias=False).data()
    with pytest.raises(ValueError, match="constant"):
        explained(B, hidden(Case(2), P), V, "centred")


# ---------------------------------------------------------------- out of sample


@over_cases
@over_ranks
@pytest.mark.parametrize("ridge", [0.0, 0.1])
def test_the_held_out_drop_is_read_off_the_moments(case: Case, k: int, ridge: float) -> None:
    B, P, V = case.data()
    v_perp, folds, expected = residual(B, V), 4, []
    for f in range(folds):
        test = [g for g in range(case.n) if g % folds == f]
        train = [g for g in range(case.n) if g % folds != f]
        G, N = moment(P[train], P[train]), moment(P[train], v_perp[train])
        root = inverse_root(G + ridge * np.trace(G) / len(G) * np.eye(len(G)))
        U, values, Vt = np.linalg.svd(root @ N, full_matrices=False)
        X = (root @ U[:, :k] * values[:k] @ Vt[:k]).T
        N_f, P_f = moment(P[test], v_perp[test]), moment(P[test], P[test])
        expected.append(2 * np.trace(X @ N_f) - np.trace(X @ P_f @ X.T))
    assert held_out(P, v_perp, folds, ridge, k) == near(np.array(expected), 1e-8)


def test_noise_is_found_out_by_the_held_out_drop() -> None:
    rng = np.random.default_rng(8)
    P, noise = rng.normal(size=(80, 1, 10)), rng.normal(size=(80, 1, 4))
    signal = P @ rng.normal(size=(10, 4)) + noise
    assert held_out(P, noise, 4, 0.0, 4).mean() < 0
    assert held_out(P, signal, 4, 0.0, 4).mean() > 0.5 * energy(signal)
    assert abs(held_out(P, noise, 4, 10.0, 4).mean()) < abs(held_out(P, noise, 4, 0.0, 4).mean())


# ---------------------------------------------------------------- goals and features of networks


def convolution(**options: object) -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 2, (3, 2), **options))


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))


NETWORKS: list[tuple[Callable[[], nn.Module], tuple[int, ...]]] = [
    (perceptron, (4,)),
    (perceptron, (5, 4)),
    (convolution, (2, 6, 5)),
    (lambda: convolution(stride=(2, 1), padding=(1, 2), dilation=(1, 2)), (2, 6, 5)),
    (lambda: convolution(padding="same", padding_mode="reflect", dilation=(1, 2)), (2, 6, 5)),
    (lambda: nn.Sequential(nn.Conv1d(2, 3, 3), nn.ReLU(), nn.Conv1d(3, 2, 2, stride=2)), (2, 9)),
]


@pytest.mark.parametrize(("build", "shape"), NETWORKS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_goals_and_features_make_the_weight_gradient(
    build: Callable[[], nn.Module], shape: tuple[int, ...], reduction: str
) -> None:
    """d loss / d W = - E v b^T, and a = W b, for the first and the last layer."""
    torch.manual_seed(0)
    net, x = build().double().train(), torch.randn(7, *shape, dtype=torch.float64)
    target = torch.randn_like(net(x))
    loss = nn.MSELoss(reduction=reduction)
    net.zero_grad()
    loss(net(x), target).backward()
    per_sample = 1 if reduction == "mean" else 7
    for edge in (net[0], net[2]):
        B, V = features(net, x, edge), goals(net, loss, x, target, edge)
        W = torch.cat([edge.weight.flatten(1), edge.bias[:, None]], 1).detach().numpy()
        slope = torch.cat([edge.weight.grad.flatten(1), edge.bias.grad[:, None]], 1).numpy() / per_sample
        assert -moment(V, B) == near(slope)
        B_last, a = B @ W.T, net[0](x) if edge is net[0] else net(x)
        channels_last = a if isinstance(edge, nn.Linear) else a.movedim(1, -1)
        assert B_last == near(channels_last.detach().numpy().reshape(B_last.shape))
    assert net.training
    assert not net[0]._forward_hooks


def test_goals_of_a_linear_layer_by_hand() -> None:
    edge = nn.Linear(2, 2, bias=False, dtype=torch.float64)
    x, y = torch.randn(5, 2, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    by_hand = (2 * (y - edge(x)) / 2).detach().numpy()[:, None]
    assert goals(edge, nn.MSELoss(), x, y, edge) == near(by_hand)
    edge.requires_grad_(False)
    assert goals(edge, nn.MSELoss(reduction="sum"), x, y, edge) == near(2 * by_hand)


def test_an_edge_called_twice_has_the_positions_of_both_calls() -> None:
    torch.manual_seed(1)
    edge = nn.Linear(3, 3, dtype=torch.float64)
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)

    def forward(x: Tensor) -> Tensor:
        return edge(torch.tanh(edge(x)))

    nn.functional.mse_loss(forward(x), y).backward()
    V, B = goals(forward, nn.MSELoss(), x, y, edge), features(forward, x, edge, bias=False)
    assert V.shape == B.shape == (5, 2, 3)
    assert -moment(V, B) == near(edge.weight.grad.numpy())


def test_goals_are_those_of_eval_mode_one_sample_at_a_time() -> None:
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)).double()
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.randint(2, (6,))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    V = goals(net, nn.CrossEntropyLoss(), x, y, net[3])
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert net.training
    assert net[1].training
    chance = torch.softmax(net.eval()(x), 1) - nn.functional.one_hot(y)
    assert V[:, 0] == near(-chance.detach().numpy())


# ---------------------------------------------------------------- slopes through wider networks


class Sine(nn.Module):
    """An activation with sigma(0) = 0 and sigma'(0) = 2."""

    def forward(self, z: Tensor) -> Tensor:
        return torch.sin(2 * z)


class OldNeuronsBend(nn.Module):
    """tanh for the three neurons of a `problem`, nothing for those that come after them."""

    def forward(self, z: Tensor) -> Tensor:
        return torch.cat([torch.tanh(z[..., :3]), z[..., 3:]], -1)


class Problem(NamedTuple):
    net: nn.Sequential
    loss: Callable[[Tensor, Tensor], Tensor]
    x: Tensor
    y: Tensor
    bias: bool

    def data(self) -> tuple[Array, Array, Array]:
        """What the second layer reads, what the first one reads, and the goal of the second."""
        net, loss, x, y, bias = self
        V = goals(net, loss, x, y, net[2])
        return features(net, x, net[2], bias), features(net, x, net[0], bias), V


def problem(seed: int, activation: nn.Module, bias: bool = True, s: int = 0, duplicates: int = 0) -> Problem:
    torch.manual_seed(seed)
    x = torch.randn(30, *([s] if s else []), 6, dtype=torch.float64) + 0.3
    x = torch.cat([x, x[..., :duplicates]], -1)
    net = nn.Sequential(nn.Linear(x.shape[-1], 3, bias), activation, nn.Linear(3, 4, bias)).double()
    if s:
        return Problem(net, nn.MSELoss(), x, torch.sin(x[..., :4] * x[..., 1:5]) + x[..., :1], bias)
    return Problem(net, nn.CrossEntropyLoss(), x, x[:, :4].argmax(1), bias)


PROBLEMS: list[dict[str, int | bool]] = [
    {"seed": 0},
    {"seed": 1, "s": 3},
    {"seed": 2, "bias": False},
    {"seed": 3, "duplicates": 2},
    {"seed": 4, "s": 2, "bias": False, "duplicates": 3},
]
over_problems = pytest.mark.parametrize("options", PROBLEMS, ids=str)


def set_weights(edge: nn.Linear, W: Array) -> None:
    W = torch.as_tensor(W)
    with torch.no_grad():
        edge.weight.copy_(W[:, : edge.in_features])
        if edge.bias is not None:
            edge.bias.copy_(W[:, -1])


def full_weight(edge: nn.Linear) -> Array:
    columns = [edge.weight] if edge.bias is None else [edge.weight, edge.bias[:, None]]
    return torch.cat(columns, 1).detach().numpy()


def wider(net: nn.Sequential, fan_in: Array, fan_out: Array, move: Array | float = 0.0) -> nn.Sequential:
    """A new network with the neurons inserted, and `move` [o,i] added to the old weights of the second."""
    first, activation, second = net
    k, old = fan_in.shape[1], first.out_features
    one = nn.Linear(first.in_features, old + k, first.bias is not None, dtype=torch.float64)
    two = nn.Linear(old + k, second.out_features, second.bias is not None, dtype=torch.float64)
    set_weights(one, np.concatenate([full_weight(first), fan_in.T]))
    set_weights(two, np.insert(full_weight(second) + move, [old], fan_out, axis=1))
    return nn.Sequential(one, activation, two)


def loss_of(task: Problem, net: nn.Module) -> float:
    with torch.no_grad():
        return task.loss(net(task.x), task.y).item()


def check_slope(task: Problem, predicted: float, neurons: Neurons, move: Array | float = 0.0) -> None:
    """The slope of the loss of the wider network, with gamma on the fan-out and on the moves."""

    def loss(gamma: float) -> float:
        moves = gamma * (neurons.compensation + move)
        return loss_of(task, wider(task.net, neurons.fan_in, gamma * neurons.fan_out, moves))

    assert loss(0.0) == pytest.approx(loss_of(task, task.net), abs=1e-13)
    assert finite_slope(loss, 1e-4).central == pytest.approx(predicted, rel=SLOPE)
    assert finite_slope(loss, 1e-5).one_sided == pytest.approx(predicted, rel=1e-4)


over_activations = pytest.mark.parametrize("activation", [nn.Identity(), OldNeuronsBend()], ids=str)


@over_problems
@over_ranks
@over_activations
def test_slope_along_joint_neurons(options: dict, k: int, activation: nn.Module) -> None:
    """- sum l^2, and together with the best move - sum l^2 - tr(dW M)."""
    task = problem(activation=activation, **options)
    B, P, V = task.data()
    found, dW = neurons_joint(B, P, V, k), best_move(B, V)
    drop = np.sum(found.values**2)
    assert drop > 1e-5
    check_slope(task, -drop, found)
    check_slope(task, -drop - np.trace(dW @ moment(B, V)), found, dW)


@over_problems
@over_ranks
@over_activations
def test_slope_along_sequential_neurons(options: dict, k: int, activation: nn.Module) -> None:
    """- (sum l^2 + tr(dW C^T A O^T)), whether or not the second term is nothing."""
    task = problem(activation=activation, **options)
    B, P, V = task.data()
    found, dW = neurons_sequential(B, P, V, k), best_move(B, V)
    drop, cross = np.sum(found.values**2), cross_term(B, P, dW, found)
    assert drop > 1e-5
    check_slope(task, -(drop + cross), found)
    if isinstance(activation, OldNeuronsBend):
        assert abs(cross) > 100 * SLOPE * drop


def cross_term(B: Array, P: Array, dW: Array, found: Neurons) -> float:
    return float(np.trace(dW @ moment(P, B).T @ found.fan_in @ found.fan_out.T))


@over_problems
@over_ranks
def test_where_p_says_all_that_b_says_the_two_solvers_agree(options: dict, k: int) -> None:
    """b = T p: C^T A = T P P^-1 N ... = E b v_perp^T ... = 0, so the cross term and the compensation vanish.

    A network without activations is such a case: it cannot tell a formula with the cross term from one
    without it.
    """
    task = problem(activation=nn.Identity(), **options)
    B, P, V = task.data()
    sequential, joint = neurons_sequential(B, P, V, k), neurons_joint(B, P, V, k)
    assert joint.values == near(sequential.values, 1e-7)
    assert written(joint, B, P) == near(written(sequential, B, P), 1e-6)
    assert abs(cross_term(B, P, best_move(B, V), sequential)) < 1e-10 * np.sum(sequential.values**2)


@over_problems
def test_slope_along_the_best_move(options: dict) -> None:
    task = problem(activation=nn.Tanh(), **options)
    B, P, V = task.data()
    dW = best_move(B, V)
    none = Neurons(np.zeros((P.shape[-1], 1)), np.zeros((V.shape[-1], 1)), np.zeros(1), np.zeros_like(dW))
    check_slope(task, move_slope(B, V, dW), none, dW)


@over_problems
def test_slope_through_an_activation_with_gamma_shared_by_both_sides(options: dict) -> None:
    """sqrt(gamma) on fan-in and fan-out: the slope of the linear theory times sigma'(0)."""
    task = problem(activation=Sine(), **options)
    B, P, V = task.data()
    found = neurons_joint(B, P, V, 2)

    def loss(gamma: float) -> float:
        root = gamma**0.5 if gamma >= 0 else float("nan")
        moves = gamma * 2 * found.compensation
        return loss_of(task, wider(task.net, root * found.fan_in, root * found.fan_out, moves))

    measured = finite_slope(loss, 1e-5).one_sided
    assert measured == pytest.approx(-2 * np.sum(found.values**2), rel=1e-4)


@pytest.mark.parametrize(
    ("options", "variant"),
    [(p, v) for p in PROBLEMS for v in VARIANTS if p.get("bias", True) or v != "centred"],
    ids=str,
)
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.Tanh(), nn.Softplus()], ids=str)
def test_slope_along_the_fan_out_of_given_neurons(options: dict, variant: str, activation: nn.Module) -> None:
    """The true features of the new neurons make the slope exact for any activation, ridge or not."""
    task = problem(activation=activation, **options)
    B, P, V = task.data()
    fan_in = neurons_sequential(B, P, V, 2).fan_in
    H = activation(torch.as_tensor(P @ fan_in)).numpy()
    for ridge in (0.0, 0.2):
        found = explained(B, H, V, variant, ridge)
        check_slope(task, -found.gain, Neurons(fan_in, found.weight, np.zeros(2), found.compensation))


# ---------------------------------------------------------------- the whole network


def test_one_layer_follows_what_its_regression_explains() -> None:
    torch.manual_seed(3)
    net = nn.Linear(4, 3, dtype=torch.float64)
    x, y = torch.randn(20, 4, dtype=torch.float64), torch.randn(20, 3, dtype=torch.float64)
    B, V = features(net, x, net), goals(net, nn.MSELoss(), x, y, net)
    goal, followed = tangent_projection(net, nn.MSELoss(), x, y)
    assert goal == near(energy(V))
    assert goal - followed == near(bottleneck(B, V))


@over_problems
def test_the_tangent_space_of_two_layers(options: dict) -> None:
    """d output = dW2 b + W2 diag(sigma'(a)) dW1 p, its features written down by hand."""
    task = problem(activation=nn.Tanh(), **options)
    B, P, V = task.data()
    slope = 1 - B[..., :3] ** 2
    back = task.net[2].weight.detach().numpy()
    first = np.einsum("oh,nsh,nsp->nsohp", back, slope, P).reshape(V.size, -1)
    second = np.einsum("oq,nsi->nsoqi", np.eye(V.shape[-1]), B).reshape(V.size, -1)
    J = np.hstack([first, second])
    left = V.reshape(-1) - J @ np.linalg.lstsq(J, V.reshape(-1), rcond=None)[0]
    goal, followed = tangent_projection(task.net, task.loss, task.x, task.y)
    assert goal == near(energy(V))
    assert goal - followed == near(np.sum(left**2) / len(V), 1e-7)
    assert goal - followed < bottleneck(B, V)


def test_new_neurons_open_the_tangent_space() -> None:
    task = problem(1, nn.Identity(), s=3)
    B, P, V = task.data()
    found = neurons_joint(B, P, V, 1)
    grown = wider(task.net, found.fan_in, 0 * found.fan_out)
    before, after = (tangent_projection(net, task.loss, task.x, task.y)[1] for net in (task.net, grown))
    assert after > before
    assert energy(V) - after <= bottleneck(B, V) - np.sum(found.values**2) + 1e-12


# ---------------------------------------------------------------- finite differences


def test_finite_slopes_of_known_functions() -> None:
    assert finite_slope(lambda g: np.exp(3 * g), 1e-4) == pytest.approx((3, 3), rel=1e-6)
    assert finite_slope(np.sin, 0.1).central == pytest.approx(1, rel=1e-6)
    assert finite_slope(abs) == pytest.approx((1, 0), abs=1e-12)
    assert finite_slope(lambda g: 2 * g + 5 * abs(g) ** 1.5, exponent=0.5).one_sided == pytest.approx(2)
    assert abs(finite_slope(lambda g: 2 * g + 5 * abs(g) ** 1.5).one_sided - 2) > 1e-4


def test_a_function_that_refuses_the_left_side_has_no_central_slope() -> None:
    def one_sided_only(gamma: float) -> float:
        if gamma < 0:
            raise ValueError("no such amplitude")
        return 4 * gamma

    found = finite_slope(one_sided_only)
    assert found.one_sided == pytest.approx(4)
    assert np.isnan(found.central)
