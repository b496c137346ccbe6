"""From moments to weights and gains: the closed forms, one function per equation.

One regression carries everything. At a pre-activation with goal ``v`` that reads ``b`` (and new features ``p``),

    v  =  dW b  +  v_perp,        v_perp  ~  X p,

with ``S = E b b^T``, ``M = E b v^T``, ``C = E p b^T``, ``R = E p v^T``, ``P = E p p^T``. Equations
are numbered as in docs/method.md. Source: Verbockhaven and Charpiat, "Neural Architecture Growth using Tangent Space";
the joint form and the compensation of the constant are this package's own.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

from dagrow.solvers._linalg import Whitening, combine_columns, combine_rows, leading_subspace, leading_svd, whitening
from dagrow.solvers._moments import MomentView, Pair

LOST = 100  #: precision lost by regressing features out of others
OVERSAMPLED = 16  #: more goals than neurons in which singular vectors are sought
Compensation = Literal["none", "constant", "all"]


@dataclass(frozen=True)
class Regression:
    """New features at one target.

    Attributes:
        features: the new features ``p`` as they arrive there.
        reads: the features ``b`` that the target's own weights can use; None if they are frozen, or if what they can
            follow was taken out of the goal when it was measured.
        goal: the goal ``v``.
        compensation: which part of ``b`` is regressed out of the new features, with the target's own weights moving
            along: none of it, the constant only (the bias takes out the features' mean), or all (the joint optimum).
        project: whether the target is ``v_perp`` or, if not, ``v`` itself.
        ridge: of the regression on ``b``, relative to each feature's second moment.
        constant: whether the last of ``b`` is the constant 1.
    """

    features: Hashable
    reads: Hashable | None
    goal: Hashable
    compensation: Compensation = "none"
    project: bool = True
    ridge: float = 0.0
    constant: bool = False

    def pairs(self) -> list[Pair]:
        """The moments that the block needs."""
        pairs: list[Pair] = [(self.features, self.features), (self.features, self.goal)]
        if self.reads is not None:
            pairs += [(self.features, self.reads), (self.reads, self.reads), (self.reads, self.goal)]
        return pairs


@dataclass(frozen=True)
class Move:
    """The best move of a target's own weights: ``dW = M^T S^-1 [o, i]`` and what it does to the goal."""

    weights: Tensor
    gain: float  #: tr(dW M): minus the slope of the loss along dW
    goal: float  #: E|v|^2
    bottleneck: float  #: E|v - dW b|^2
    note: str


@dataclass(frozen=True)
class Directions:
    """The leading directions ``alpha [p, k]``, ``alpha^T (P + ridge) alpha = 1``, and singular values ``l [k]``."""

    alpha: Tensor
    values: Tensor
    note: str


@dataclass(frozen=True)
class Fit:
    """The regression of what is left to explain on given features.

    Attributes:
        weights: fan-out ``X [o, k]``.
        compensation: the move of the target's own weights that goes with it ``[o, i]``, or None.
        gain: ``E <v, X h'>`` with h' the compensated features: minus the slope of the loss.
        drop: by how much the bottleneck falls.
    """

    weights: Tensor
    compensation: Tensor | None
    gain: float
    drop: float
    note: str


def best_move(m: MomentView, reads: Hashable, goal: Hashable, ridge: float = 0.0) -> Move:
    """Equation 1: ``dW = M^T S^-1``, bottleneck ``E|v|^2 - 2 tr(dW M) + tr(dW S dW^T)``, for any ridge."""
    s, cross, energy = m[reads, reads], m[reads, goal], float(m[goal, goal].trace())
    white = m.whitening(reads, ridge)
    dw = white.solve(cross).T
    gain = float((dw.T * cross).sum())
    return Move(dw, gain, energy, energy - 2 * gain + float((dw @ s * dw).sum()), white.note)


@dataclass(frozen=True, eq=False)
class Residual:
    """Equation 2: what is left of new features and goals at one target, fitted on moments ``m``.

    With ``T = S^-1 M`` (the best move) taken out of the goals and ``D = C S^-1`` (or its last column alone, or
    nothing) out of the new features, ``p' = p - D b`` and ``t = v - T^T b`` leave ``P = E p' p'^T`` and
    ``N = E p' t^T``. Both are known by products with few combinations: ``B [p, k]`` of the new features, or the indices
    ``[k]`` of some of them, or None for all, and ``G [o, q]`` of the goals.
    """

    m: MomentView
    block: Regression

    @property
    def white(self) -> Whitening:
        """Of S."""
        assert self.block.reads is not None
        return self.m.whitening(self.block.reads, self.block.ridge)

    @property
    def note(self) -> str:
        return self.white.note if self.block.reads and (self.block.project or self.block.compensation == "all") else ""

    def resolution(self, basis: Tensor | None = None) -> float:
        """Relative precision of ``B^T P B``: once all of ``b`` is taken out, it is a difference of larger numbers."""
        if self.block.compensation != "all" or self.block.reads is None:
            return self.m.resolution
        taken = self.taken(basis)
        assert taken is not None
        summed = (taken.abs() * (self.m[self.block.reads, self.block.reads].abs() @ taken.abs())).sum(0)
        unit = self.unit_of(basis)
        lost = float((summed / torch.where(unit > 0, unit, 1)).max()) if len(unit) else 0.0
        return self.m.resolution * max(LOST, lost)

    @property
    def unit(self) -> Tensor:
        """``E p^2``: what the features were before anything was taken out of them."""
        return self.m[self.block.features, self.block.features].diagonal()

    def unit_of(self, basis: Tensor | None) -> Tensor:
        """The same for combinations of features, or some of them, or all."""
        if basis is None or not basis.is_floating_point():
            return self.unit if basis is None else self.unit[basis]
        return (basis * combine_columns(self.m[self.block.features, self.block.features], basis)).sum(0).to(self.unit)

    def taken(self, basis: Tensor | None = None) -> Tensor | None:
        """``D^T B [i, k]``, or None if nothing is taken out."""
        reads, compensation = self.block.reads, self.block.compensation
        if reads is None or compensation == "none" or (compensation == "constant" and not self.block.constant):
            return None
        overlap = combine_columns(self.m[reads, self.block.features], basis)
        if compensation == "all":
            return self.white.solve(overlap)
        constant = torch.zeros_like(overlap)
        constant[-1] = overlap[-1] / self.m[reads, reads][-1, -1]
        return constant

    def moved(self, goals: Tensor) -> Tensor | None:
        """``T G [i, q]``, or None if goals are not projected."""
        if self.block.reads is None or not self.block.project:
            return None
        return self.white.solve(self.m[self.block.reads, self.block.goal] @ goals)

    def gram(self, basis: Tensor | None = None, on: MomentView | None = None) -> Tensor:
        """``B^T P B [k, k]`` on these moments or on others."""
        m, features, reads, taken = on or self.m, self.block.features, self.block.reads, self.taken(basis)
        p = m[features, features]
        p = combine_rows(combine_columns(p, basis), basis)
        if taken is None:
            return p
        assert reads is not None
        overlap = taken.T @ combine_columns(m[reads, features], basis)
        return p - overlap - overlap.T + taken.T @ (m[reads, reads] @ taken)

    def times(self, goals: Tensor, basis: Tensor | None = None, on: MomentView | None = None) -> Tensor:
        """``B^T N G [k, q]`` on these moments or on others."""
        m, features, reads, goal = on or self.m, self.block.features, self.block.reads, self.block.goal
        n = combine_rows(m[features, goal] @ goals, basis)
        if reads is None:
            return n
        moved, taken = self.moved(goals), self.taken(basis)
        if moved is not None:
            n = n - combine_rows(m[features, reads] @ moved, basis)
        if taken is None:
            return n
        rest = m[reads, goal] @ goals
        return n - taken.T @ (rest if moved is None else rest - m[reads, reads] @ moved)

    def rows(self, basis: Tensor | None = None) -> Tensor:
        """``B^T N [k, o]``, at less expense than :meth:`times` where B has fewer columns than there are goals."""
        m, features, reads, goal = self.m, self.block.features, self.block.reads, self.block.goal
        n = combine_rows(m[features, goal], basis)
        if reads is None:
            return n
        used, taken = None, self.taken(basis)
        if self.block.project:
            overlap = combine_rows(m[features, reads], basis).T
            used = self.white.solve(overlap if taken is None else overlap - m[reads, reads] @ taken)
        for out in (used, taken):
            n = n if out is None else n - out.T @ m[reads, goal]
        return n


@dataclass(frozen=True, eq=False)
class StackedResidual:
    """Several consumers: N side by side, P averaged over them.

    The average is exact when all read the new features at the same positions with the same ``b`` taken out of them;
    otherwise it is a proposal, and the fan-outs are fitted to each consumer afterwards.
    """

    parts: Sequence[Residual]

    @classmethod
    def of(cls, m: MomentView, blocks: Sequence[Regression]) -> "StackedResidual":
        return cls([Residual(m, block) for block in blocks])

    @cached_property
    def gram(self) -> Tensor:
        """``P [p, p]``."""
        return _mean([part.gram() for part in self.parts])

    @cached_property
    def widths(self) -> list[int]:
        """Columns of N that belong to each part."""
        return [part.m[part.block.features, part.block.goal].shape[1] for part in self.parts]

    def whitening(self, ridge: float) -> Whitening:
        """Of P, with a ridge relative to what the features were before anything was taken out of them."""
        unit = _mean([part.unit for part in self.parts])
        return whitening(self.gram, ridge, max(part.resolution() for part in self.parts), unit)

    def times(self, goals: Tensor) -> Tensor:
        """``N G [p, q]``."""
        products = [part.times(g) for part, g in zip(self.parts, goals.split(self.widths), strict=True)]
        return sum(products[1:], products[0])

    def cross(self, goals: Tensor) -> Tensor:
        """``R G [p, q]``: what N is made from, before anything is taken out of features and goals."""
        parts = zip(self.parts, goals.split(self.widths), strict=True)
        products = [part.m[part.block.features, part.block.goal] @ g for part, g in parts]
        return sum(products[1:], products[0])

    def rows(self, basis: Tensor) -> Tensor:
        """``B^T N [k, o]``."""
        return torch.cat([part.rows(basis) for part in self.parts], 1)

    def leading_goals(self, white: Whitening, few: int, iterations: int) -> Tensor:
        """Orthonormal combinations of goals ``[o, few]`` that hold the leading right singular vectors of ``W N``."""
        return leading_subspace(
            lambda goals: white.whiten(self.times(goals)),
            lambda u: self.rows(white.back(u)).T,
            sum(self.widths),
            few,
            self.gram,
            iterations,
        )


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.stack(list(tensors)).mean(0)


def directions(m: MomentView, blocks: Sequence[Regression], k: int, ridge: float = 0.0) -> Directions:
    """Equation 3 (and 4 with compensation "all"): ``U L V^T = svd(W N)``, ``alpha_k = W^T u_k``.

    Directions that are rounding are left out: of the largest one, or of ``W R``, where all of N is.
    """
    stack = StackedResidual.of(m, blocks)
    white = stack.whitening(ridge)
    goals = stack.leading_goals(white, k + OVERSAMPLED, iterations=4)
    u, values, _ = leading_svd(white.whiten(stack.times(goals)), k)
    kept = values > m.resolution * max(
        len(stack.gram) * float(values[:1].sum()), LOST * float(white.whiten(stack.cross(goals)).norm())
    )
    notes = dict.fromkeys(note for note in (white.note, *(part.note for part in stack.parts)) if note)
    return Directions(white.back(u[:, kept]), values[kept], "; ".join(notes))


def fan_out(m: MomentView, block: Regression, choice: Tensor | None, ridge: float = 0.0) -> Fit:
    """Equation 5 with few features: the regression of what is left on ``h = choice^T features``, for any activation.

    Args:
        choice: the indices of the measured features that are offered ``[k]``, or which sums of them ``[features, k]``;
            None for all.
    """
    remainder = Residual(m, block)
    p, n, taken = remainder.gram(choice), remainder.rows(choice), remainder.taken(choice)
    white = whitening(p, ridge, remainder.resolution(choice), remainder.unit_of(choice))
    x = white.solve(n).T
    slope, compensation = combine_rows(m[block.features, block.goal], choice), None
    if taken is not None:
        assert block.reads is not None
        slope = slope - taken.T @ m[block.reads, block.goal]
        compensation = -x @ taken.T
    drop = 2 * float((x.T * n).sum()) - float((x @ p * x).sum())
    return Fit(x, compensation, float((x.T * slope).sum()), drop, white.note)


def explained_alone(m: MomentView, block: Regression, slots: int, ridge: float = 0.0) -> Tensor:
    """What each unit (``slots`` neighbouring features) would explain alone: ``n^T (p + ridge)^-1 n`` ``[units]``."""
    remainder = Residual(m, block)
    p = rearrange(remainder.gram(), "(u s) (w t) -> u w s t", s=slots, t=slots).diagonal().permute(2, 0, 1)
    n = rearrange(remainder.rows(), "(u s) o -> u s o", s=slots)
    damping = max(ridge, 100 * m.resolution) * rearrange(remainder.unit, "(u s) -> u s", s=slots)
    inverse = torch.linalg.pinv(p + torch.diag_embed(damping), hermitian=True)
    return torch.einsum("uso, ust, uto -> u", n, inverse, n)


def selected(m: MomentView, block: Regression, k: int, ridge: float = 0.0, offered: Tensor | None = None) -> Tensor:
    """Forward selection: the feature that explains most beside those taken before, k times; their indices ``[k]``.

    Each step takes the feature out of all others: ``P' <- P' - P'_j P'_j^T / P'_jj``, ``N <- N - P'_j N_j / P'_jj``.

    Args:
        offered: indices of the features that may be taken; all by default.
    """
    remainder = Residual(m, block)
    p, n = remainder.gram(), remainder.rows()
    damping = (ridge + len(p) * remainder.resolution()) * remainder.unit
    every = torch.arange(len(p))
    allowed = torch.isin(every, every if offered is None else offered).to(p.device)
    chosen: list[int] = []
    for _ in range(min(k, len(p))):
        free = p.diagonal() > damping * 1e-3
        free[chosen] = False
        free &= allowed
        worth = torch.where(free, n.square().sum(1) / (p.diagonal() + damping).clamp_min(1e-300), -1)
        j = int(worth.argmax())
        if worth[j] <= 0:
            break
        chosen.append(j)
        column = p[:, j] / (p[j, j] + damping[j])
        p, n = p - torch.outer(column, p[j]), n - torch.outer(column, n[j])
    return torch.tensor(chosen, device=p.device, dtype=torch.long)
