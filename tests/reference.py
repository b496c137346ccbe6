"""Slow truths: every closed form again, from its equation, in float64, one sample at a time.

Shape letters: `n` samples, `s` positions, `i` features read (the constant 1 among them if the edge has a
bias), `o` features written, `p` candidate features, `k` new neurons. `B [n,s,i]`, `P [n,s,p]`, `V [n,s,o]`.
Means are over samples, sums over positions: E f = 1/n sum_n sum_s f. Nothing here comes from the package.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

Array = npt.NDArray[np.float64]
Loss = Callable[[Tensor, Tensor], Tensor]

GRAM_CUT = 1e-12  # directions that hold less than this part of the largest mean square count as absent
DATA_CUT = GRAM_CUT**0.5  # the same cut in the units of the data


class Neurons(NamedTuple):
    """K linear neurons; what they add to the pre-activation is `Omega A^T p + D b`."""

    fan_in: Array  # A [p,k]
    fan_out: Array  # Omega [o,k]
    values: Array  # l [k], largest first
    compensation: Array  # D [o,i]


class Fit(NamedTuple):
    """A regression of `v_perp` on new features; what it adds to the pre-activation is `X f + D b`."""

    weight: Array  # X [o,f]
    compensation: Array  # D [o,i]
    residual: Array  # [n,s,o]
    gain: float  # E <v, X f + D b>


class Slopes(NamedTuple):
    """Derivative of a scalar function at 0, from the right and from both sides."""

    one_sided: float
    central: float


# ---------------------------------------------------------------- data


def sample(batch: Any, n: int) -> Any:
    """The batch of one that holds sample n of a tensor, or of a tuple, list or dict of them."""
    if isinstance(batch, dict):
        return {key: sample(value, n) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return type(batch)(sample(value, n) for value in batch)
    return batch[n : n + 1]


def length(batch: Any) -> int:
    """Number of samples in a batch."""
    if isinstance(batch, dict):
        return length(next(iter(batch.values())))
    return length(batch[0]) if isinstance(batch, tuple | list) else len(batch)


def call(forward: Callable[..., Tensor], inputs: Any) -> Tensor:
    """forward(x), forward(*tuple) or forward(**dict)."""
    if isinstance(inputs, dict):
        return forward(**inputs)
    return forward(*inputs) if isinstance(inputs, tuple | list) else forward(inputs)


@contextmanager
def eval_mode(forward: Callable[..., Tensor]) -> Iterator[None]:
    """Every module of the model in eval mode, and back as each of them was."""
    modules = list(forward.modules()) if isinstance(forward, nn.Module) else []
    training = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module, mode in zip(modules, training, strict=True):
            module.training = mode


def is_convolution(edge: nn.Module) -> bool:
    return isinstance(edge, nn.modules.conv._ConvNd)


def rows(edge: nn.Module, a: Tensor) -> Tensor:
    """A batch of one as [s, channels]: channels are dimension 1 of a convolution, else the last one."""
    return a[0].flatten(1).T if is_convolution(edge) else a.reshape(-1, a.shape[-1])


def goals(forward: Callable[..., Tensor], loss: Loss, inputs: Any, targets: Any, edge: nn.Module) -> Array:
    """v [n,s,o] = - d loss_n / d a_n, a_n the pre-activation that `edge` writes for sample n run alone.

    An edge that is called several times in one pass writes the positions of each call, in turn.
    """
    with eval_mode(forward):
        return np.stack(
            [_goal(forward, loss, sample(inputs, n), sample(targets, n), edge) for n in range(length(inputs))]
        )


def _goal(forward: Callable[..., Tensor], loss: Loss, inputs: Any, target: Any, edge: nn.Module) -> Array:
    """The derivative of the loss with respect to a zero that is added to the pre-activation."""
    probes: list[Tensor] = []

    def add_zero(module: nn.Module, args: Any, a: Tensor) -> Tensor:
        probes.append(torch.zeros_like(a, requires_grad=True))
        return a + probes[-1]

    handle = edge.register_forward_hook(add_zero)
    try:
        with torch.enable_grad():
            value = loss(call(forward, inputs), target)
            slopes = torch.autograd.grad(value, probes, materialize_grads=True)
    finally:
        handle.remove()
    return -torch.cat([rows(edge, slope) for slope in slopes]).double().numpy()


def features(model: Callable[..., Tensor], inputs: Any, edge: nn.Module, bias: bool = True) -> Array:
    """b [n,s,i], such that a = W b with W = edge.weight [o,i] and, if `bias`, edge.bias as last column."""
    with eval_mode(model), torch.no_grad():
        B = np.stack([_features(model, sample(inputs, n), edge) for n in range(length(inputs))])
    return np.concatenate([B, np.ones_like(B[..., :1])], axis=-1) if bias else B


def _features(model: Callable[..., Tensor], inputs: Any, edge: nn.Module) -> Array:
    caught: list[Tensor] = []

    def catch(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        caught.append(patches(edge, args[0]) if is_convolution(edge) else rows(edge, args[0]))

    handle = edge.register_forward_pre_hook(catch)
    try:
        call(model, inputs)
    finally:
        handle.remove()
    return torch.cat(caught).detach().double().numpy()


def patches(conv: Any, x: Tensor) -> Tensor:
    """What a convolution reads at each position: [s, channels * kernel], from a batch of one."""
    if conv.groups != 1:
        raise NotImplementedError("a grouped convolution reads other features for each group")
    if isinstance(conv, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        return _transposed_patches(conv, x)
    x = padded(conv, x)[0]
    spans = [d * (k - 1) + 1 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    sizes = [(x.shape[1 + a] - spans[a]) // conv.stride[a] + 1 for a in range(len(spans))]
    found = []
    for position in np.ndindex(*sizes):
        starts = [position[a] * conv.stride[a] for a in range(len(spans))]
        window = [slice(starts[a], starts[a] + spans[a], conv.dilation[a]) for a in range(len(spans))]
        found.append(x[(slice(None), *window)].reshape(-1))
    return torch.stack(found)


def _transposed_patches(conv: Any, x: Tensor) -> Tensor:
    """Input position s writes through tap j to output position s * stride - padding + j * dilation."""
    space = range(len(conv.kernel_size))
    sizes = [
        (x.shape[2 + a] - 1) * conv.stride[a]
        - 2 * conv.padding[a]
        + conv.dilation[a] * (conv.kernel_size[a] - 1)
        + conv.output_padding[a]
        + 1
        for a in space
    ]
    found = x.new_zeros(*sizes, x.shape[1], *conv.kernel_size)
    for s in np.ndindex(*x.shape[2:]):
        for j in np.ndindex(*conv.kernel_size):
            t = tuple(s[a] * conv.stride[a] - conv.padding[a] + j[a] * conv.dilation[a] for a in space)
            if all(0 <= t[a] < sizes[a] for a in space):
                found[(*t, slice(None), *j)] = x[(0, slice(None), *s)]
    return found.flatten(0, len(sizes) - 1).flatten(1)


def padded(conv: Any, x: Tensor) -> Tensor:
    """The image with the borders that a convolution gives it."""
    margins: list[int] = []
    for axis in reversed(range(len(conv.kernel_size))):
        if isinstance(conv.padding, str):
            total = conv.dilation[axis] * (conv.kernel_size[axis] - 1) if conv.padding == "same" else 0
            margins += [total // 2, total - total // 2]
        else:
            margins += [conv.padding[axis], conv.padding[axis]]
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    return nn.functional.pad(x, margins, mode=mode)


# ---------------------------------------------------------------- matrices


def flat(X: Array) -> Array:
    """[n,s,x] -> [n*s, x], float64."""
    X = np.asarray(X, dtype=np.float64)
    return X.reshape(-1, X.shape[-1])


def moment(X: Array, Y: Array) -> Array:
    """E x y^T [x,y], summed sample by sample."""
    total = np.zeros((X.shape[-1], Y.shape[-1]))
    for x, y in zip(X, Y, strict=True):
        total += np.asarray(x).T @ np.asarray(y)
    return total / len(X)


def energy(V: Array) -> float:
    """E |v|^2: mean over samples of the sum over positions."""
    return float(np.mean([np.sum(np.square(v)) for v in np.asarray(V, dtype=np.float64)]))


def product(U: Array, V: Array) -> float:
    """E <u, v>: mean over samples of the sum over positions."""
    return float(np.mean([np.sum(np.asarray(u) * np.asarray(v)) for u, v in zip(U, V, strict=True)]))


def inverse_root(G: Array, scale: float | None = None, cut: float = GRAM_CUT) -> Array:
    """G^-1/2 by eigh; eigenvalues at or below cut * scale (default: the largest one) are left out."""
    values, vectors = np.linalg.eigh(G)
    kept = values > cut * (values.max() if scale is None else scale)
    return (vectors[:, kept] / np.sqrt(values[kept])) @ vectors[:, kept].T


def regress(X: Array, Y: Array, penalty: float = 0.0, scale: float | None = None) -> Array:
    """argmin_T E |y - T x|^2 + penalty |T|^2 by lstsq; [y,x], the smallest one where x is rank-deficient.

    `scale`, if given, is the largest singular value to which the cut-off on x is relative.
    """
    design, wanted = flat(X), flat(Y)
    rcond = None
    if penalty > 0:
        design = np.vstack([design, np.sqrt(penalty * len(X)) * np.eye(design.shape[1])])
        wanted = np.vstack([wanted, np.zeros((design.shape[1], wanted.shape[1]))])
    elif scale is not None:
        largest = np.linalg.norm(design, 2)
        if largest <= DATA_CUT * scale:
            return np.zeros((wanted.shape[1], design.shape[1]))
        rcond = DATA_CUT * scale / largest
    return np.asarray(np.linalg.lstsq(design, wanted, rcond=rcond)[0].T, dtype=np.float64)


def truncated(X: Array, P: Array, k: int, penalty: float = 0.0) -> Array:
    """The best rank-k solution, from the full-rank one: keep the k main directions of what X p writes."""
    written = np.vstack([flat(P) @ X.T, np.sqrt(penalty * len(P)) * X.T])
    V_k = np.linalg.svd(written, full_matrices=False)[2][:k]
    return V_k.T @ V_k @ X


# ---------------------------------------------------------------- what the layer can follow


def best_move(B: Array, V: Array) -> Array:
    """dW [o,i] = argmin E |v - dW b|^2 = M^T S^-1."""
    return regress(B, V)


def residual(B: Array, V: Array) -> Array:
    """v_perp [n,s,o] = v - dW b."""
    return np.asarray(V, dtype=np.float64) - np.asarray(B, dtype=np.float64) @ best_move(B, V).T


def bottleneck(B: Array, V: Array) -> float:
    """E |v_perp|^2."""
    return energy(residual(B, V))


def move_slope(B: Array, V: Array, dW: Array) -> float:
    """Slope of the loss along dW: - E <v, dW b>."""
    return -product(V, np.asarray(B) @ dW.T)


# ---------------------------------------------------------------- new neurons and connections


def neurons_sequential(B: Array, P: Array, V: Array, k: int) -> Neurons:
    """U L V^T = svd(P^-1/2 N), N = E p v_perp^T; alpha = sqrt(l) P^-1/2 u, omega = sqrt(l) v; D = 0."""
    fan_in, fan_out, values = _neurons(P, residual(B, V), k)
    return Neurons(fan_in, fan_out, values, np.zeros((V.shape[-1], B.shape[-1])))


def neurons_joint(B: Array, P: Array, V: Array, k: int) -> Neurons:
    """The same with p_perp = p - C S^-1 b for p; D = - Omega A^T C S^-1 leaves of the neurons what is new."""
    explained_by_b = regress(B, P)  # C S^-1 [p,i]
    fan_in, fan_out, values = _neurons(residual(B, P), residual(B, V), k, scale=largest_mean_square(P))
    return Neurons(fan_in, fan_out, values, -fan_out @ fan_in.T @ explained_by_b)


def _neurons(P: Array, V: Array, k: int, scale: float | None = None) -> tuple[Array, Array, Array]:
    root = inverse_root(moment(P, P), scale)
    U, values, Vt = np.linalg.svd(root @ moment(P, V), full_matrices=False)
    U, values, Vt = U[:, :k], values[:k], Vt[:k]
    return root @ U * np.sqrt(values), Vt.T * np.sqrt(values), values


def largest_mean_square(P: Array) -> float:
    """The largest eigenvalue of E p p^T."""
    return float(np.linalg.norm(flat(P), 2) ** 2 / len(P))


def written(neurons: Neurons, B: Array, P: Array) -> Array:
    """Omega A^T p + D b [n,s,o]: what the neurons and their compensation add to the pre-activation."""
    return np.asarray(P) @ neurons.fan_in @ neurons.fan_out.T + np.asarray(B) @ neurons.compensation.T


def connection(B: Array, P: Array, V: Array) -> Fit:
    """X = N^T (P - C S^-1 C^T)^-1 [o,p], D = - X C S^-1; gain = tr(X N) = E <v, X p + D b>."""
    new, v_perp = residual(B, P), residual(B, V)
    X = regress(new, v_perp, scale=float(np.linalg.norm(flat(P), 2)))
    return Fit(X, -X @ regress(B, P), v_perp - new @ X.T, product(V, new @ X.T))


def explained(B: Array, H: Array, V: Array, variant: str = "raw", ridge: float = 0.0) -> Fit:
    """X = argmin E |v_perp - X h'|^2 + ridge tr(E h' h'^T) / k |X|^2; gain = E <v, X h'>.

    `raw`: h' = h. `centred`: h' = h minus its mean over samples and positions, which needs the constant in b.
    `residual`: h' = the part of h that b does not explain. h' = h + T b, so the compensation is X T.
    """
    H, v_perp = np.asarray(H, dtype=np.float64), residual(B, V)
    T = _taken_out(B, H, variant)
    new = H + np.asarray(B) @ T.T
    penalty = ridge * energy(new) / H.shape[-1]
    X = regress(new, v_perp, penalty, scale=float(np.linalg.norm(flat(H), 2)))
    return Fit(X, X @ T, v_perp - new @ X.T, product(V, new @ X.T))


def _taken_out(B: Array, H: Array, variant: str) -> Array:
    """T [k,i] such that h' = h + T b."""
    if variant == "residual":
        return -regress(B, H)
    T = np.zeros((H.shape[-1], B.shape[-1]))
    if variant == "centred":
        constant = np.flatnonzero(np.all(flat(B) == 1.0, axis=0))
        if len(constant) == 0:
            raise ValueError("the mean of h can only be taken out where b has the constant 1")
        T[:, constant[0]] = -flat(H).mean(axis=0)
    elif variant != "raw":
        raise ValueError(f"variant is {variant!r}, not raw, centred or residual")
    return T


# ---------------------------------------------------------------- between convolutions


def read_at(consumer: Any, hidden: tuple[int, ...]) -> npt.NDArray[np.int64]:
    """Which position of the hidden image each output position reads through each tap, -1 for none: [s', taps]."""
    numbered = torch.arange(1.0, float(np.prod(hidden)) + 1, dtype=torch.float64).view(1, 1, *hidden)
    return patches(consumer, numbered).numpy().astype(np.int64) - 1


def in_slots(P: Array, index: npt.NDArray[np.int64]) -> Array:
    """P [n,s,p] as a consumer reads it through each of its taps e: [n,s',e,p], zero where there is nothing."""
    found = np.zeros((len(P), *index.shape, P.shape[-1]))
    for t, e in np.ndindex(*index.shape):
        if index[t, e] >= 0:
            found[:, t, e] = P[:, index[t, e]]
    return found


def neurons_between(B: Array, P: Array, V: Array, index: npt.NDArray[np.int64]) -> Array:
    """Singular values of P^-1/2 N, N = E p_e v_perp^T with taps side by side, P the mean over taps of E p_e p_e^T."""
    arrived, v_perp = in_slots(P, index), residual(B, V)
    taps = [arrived[:, :, e] for e in range(index.shape[1])]
    mean = np.mean([moment(p, p) for p in taps], axis=0)
    return np.linalg.svd(inverse_root(mean) @ np.hstack([moment(p, v_perp) for p in taps]), compute_uv=False)


def fall_between(B: Array, P: Array, V: Array, index: npt.NDArray[np.int64], fan_in: Array) -> float:
    """E |v_perp|^2 less what is left by linear neurons with this fan-in [p,k] and their best fan-out for every tap."""
    arrived = in_slots(P, index) @ fan_in
    return energy(residual(B, V)) - energy(residual(arrived.reshape(*arrived.shape[:2], -1), residual(B, V)))


# ---------------------------------------------------------------- units that go


def without(B: Array, W: Array, gone: Iterable[int]) -> tuple[Array, float]:
    """W [o,i] without some features, the others standing in for them, and what is lost: E |W b - W' b|^2.

    W' = argmin E |W b - W' b|^2 over all W' that are 0 there, which is a regression of W b on the features that stay.
    """
    stay = sorted({*range(B.shape[-1])} - {*gone})
    refitted = np.zeros_like(W)
    refitted[:, stay] = regress(B[..., stay], B @ W.T)
    return refitted, energy(B @ W.T - B @ refitted.T)


def least_needed(readers: Iterable[tuple[Array, Array, list[list[int]]]], k: int) -> list[int]:
    """The k units that go one after the other, each the one without which all readers together lose least.

    A reader is (B, W, the features of each unit); every set is regressed anew.
    """
    gone: list[int] = []
    readers = list(readers)
    for _ in range(k):
        left = [unit for unit in range(len(readers[0][2])) if unit not in gone]

        def lost(unit: int) -> float:
            sets = [[i for u in (*gone, unit) for i in columns[u]] for _, _, columns in readers]
            return sum(without(B, W, columns)[1] for (B, W, _), columns in zip(readers, sets, strict=True))

        gone.append(min(left, key=lost))
    return gone


# ---------------------------------------------------------------- out of sample


def ridge_rank(P: Array, V: Array, ridge: float, k: int) -> Array:
    """X [o,p] of rank k that minimises E |v - X p|^2 + ridge tr(P) / dim(P) |X|^2.

    The same as X^T = P_r^-1/2 U_k L_k V_k^T with U L V^T = svd(P_r^-1/2 N), P_r = P + ridge tr(P) / dim(P).
    """
    penalty = ridge * energy(P) / P.shape[-1]
    X = regress(P, V, penalty, scale=float(np.linalg.norm(flat(P), 2)))
    return truncated(X, P, k, penalty)


def held_out(P: Array, V: Array, folds: int, ridge: float, k: int) -> Array:
    """Drop of E_f |v|^2 [folds] on each fold f = {g : g % folds == f}, X being fitted on all the others.

    drop_f = E_f |v|^2 - E_f |v - X p|^2 = 2 tr(X N_f) - tr(X P_f X^T); V is the target: v or v_perp.
    """
    P, V = np.asarray(P, dtype=np.float64), np.asarray(V, dtype=np.float64)
    fold = np.arange(len(P)) % folds
    drops = []
    for f in range(folds):
        X = ridge_rank(P[fold != f], V[fold != f], ridge, k)
        drops.append(energy(V[fold == f]) - energy(V[fold == f] - P[fold == f] @ X.T))
    return np.array(drops)


def scores(P: Array, V: Array, folds: int, fit: Callable[[Array], tuple[Array, Array]]) -> Array:
    """(d, c) [n,2] of each sample, by how much what others are fitted on explains of it.

    `fit(others)` gives X [o,p] and what is left of the features and the goals of all samples, stacked [n,s,p+o], from
    the samples in `others` alone: c_n = sum_s <v_n, X p_n>, d_n = |v_n|^2 - |v_n - X p_n|^2.
    """
    found = np.zeros((len(P), 2))
    for f in range(folds):
        X, left = fit(np.flatnonzero(np.arange(len(P)) % folds != f))
        for n in range(f, len(P), folds):
            p, v = left[n][:, : P.shape[-1]], left[n][:, P.shape[-1] :]
            found[n, 0] = np.sum(v**2) - np.sum((v - p @ X.T) ** 2)
            found[n, 1] = sum(float(v[t] @ X @ p[t]) for t in range(len(v)))
    return found


def closed_testing(p_values: Iterable[float], tests: int) -> list[float]:
    """Adjusted p-values: the largest min(1, |S| min of S) over all sets S of tests that a test belongs to.

    `tests` are made, of which those that are not listed have a p-value of 1.
    """
    known = [*p_values]
    everything = known + [1.0] * (tests - len(known))
    sets = [s for size in range(1, len(everything) + 1) for s in combinations(range(len(everything)), size)]
    return [max(min(1.0, len(s) * min(everything[j] for j in s)) for s in sets if i in s) for i in range(len(known))]


# ---------------------------------------------------------------- the whole network


def tangent_projection(model: nn.Module, loss: Loss, inputs: Any, targets: Any) -> tuple[float, float]:
    """(E |v|^2, E |v_J|^2): v = - d loss / d output, v_J its part in the range of J = d output / d theta.

    J has one row for every sample and output, one column for every parameter of the whole network.
    """
    parameters = list(model.parameters())
    jacobian, wanted = [], []
    with eval_mode(model), torch.enable_grad():
        for n in range(length(inputs)):
            output = call(model, sample(inputs, n))
            for one in output.reshape(-1):
                row = torch.autograd.grad(one, parameters, retain_graph=True, materialize_grads=True)
                jacobian.append(torch.cat([slope.reshape(-1) for slope in row]).double().numpy())
            leaf = output.detach().requires_grad_()
            (slope,) = torch.autograd.grad(loss(leaf, sample(targets, n)), leaf)
            wanted.append(-slope.reshape(-1).double().numpy())
    J, v = np.stack(jacobian), np.concatenate(wanted)
    followed = J @ np.linalg.lstsq(J, v, rcond=None)[0]
    return float(v @ v / len(wanted)), float(followed @ followed / len(wanted))


def finite_slope(function: Callable[[float], float], step: float = 1e-6, exponent: float = 1.0) -> Slopes:
    """f'(0) by differences at step and step / 2, and Richardson's extrapolation of the two.

    The error of the one-sided difference is taken as step^exponent: 1 where f is smooth in gamma, 1/2 where
    it is smooth in sqrt(gamma). f is also called at -step: where it cannot be, central is NaN.
    """
    start = float(function(0.0))

    def forward(h: float) -> float:
        return (float(function(h)) - start) / h

    def both(h: float) -> float:
        return (float(function(h)) - float(function(-h))) / (2 * h)

    weight = 2.0**exponent
    one_sided = (weight * forward(step / 2) - forward(step)) / (weight - 1)
    try:
        return Slopes(one_sided, (4 * both(step / 2) - both(step)) / 3)
    except (ValueError, TypeError):  # a root of a negative number is refused, or is complex
        return Slopes(one_sided, float("nan"))
