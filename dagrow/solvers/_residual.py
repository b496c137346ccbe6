"""Equation 2: what is left of new features and of goals once what the target reads is regressed out of them.

In the letters of docs/method.md, with ``b`` what a pre-activation reads, ``v`` its goal and ``p`` new features,

    S = E b b^T,    M = E b v^T,    C = E p b^T,    R = E p v^T,    P = E p p^T.

Both the goals and the new features can be regressed on ``b``,

    T = S^-1 M  [i, o]        the best move dW = T^T of the target's own weights, for the goals
    D = S^-1 C^T  [i, p]      the same for the new features

and what is left of them, ``t = v - T^T b`` and ``p' = p - D^T b``, has the moments

    P' = E p' p'^T = P - C D - D^T C^T + D^T S D
    N  = E p' t^T  = R - C T - D^T (M - S T)

These hold for any T and D: also where one of them is left out (zero), where D takes out the constant alone, where S
has a ridge, and for moments of other samples than those that T and D were fitted on. Source of N: Verbockhaven and
Charpiat, "Neural Architecture Growth using Tangent Space"; the compensation ``D`` is this package's own.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from dagrow.solvers._basis import Basis
from dagrow.solvers._linalg import Whitening, leading_subspace, whitening
from dagrow.solvers._moments import MomentView, Pair
from dagrow.solvers._row_products import Product, dense, magnitudes_times, mean_of

CANCELLATION = 100  #: by how much, at least, regressing features out of others makes moments less precise
Compensation = Literal["none", "constant", "all"]


@dataclass(frozen=True)
class Regression:
    """New features at one target: what is regressed on what.

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
        """The moments that it needs.

        Returns:
            Pairs of features, each in one order.
        """
        pairs: list[Pair] = [(self.features, self.features), (self.features, self.goal)]
        if self.reads is not None:
            pairs += [(self.features, self.reads), (self.reads, self.reads), (self.reads, self.goal)]
        return pairs


@dataclass(frozen=True, eq=False)
class Residual:
    """What is left at one target of some features ``B^T p`` and of the goals, fitted on moments ``m``.

    Attributes:
        basis: ``B [p, k]``.
        D: ``D B [i, k]``, or None if nothing is taken out of the features.
    """

    m: MomentView
    regression: Regression
    basis: Basis
    D: Tensor | None

    @classmethod
    def of(cls, m: MomentView, regression: Regression, choice: Tensor | None = None) -> "Residual":
        """On all features, on those with the indices ``choice [k]``, or on the combinations ``choice [p, k]``."""
        b, compensation, basis = regression.reads, regression.compensation, Basis(choice)
        if b is None or compensation == "none" or (compensation == "constant" and not regression.constant):
            return cls(m, regression, basis, None)
        overlap = dense(basis.columns(m.product(b, regression.features)))
        if compensation == "all":
            return cls(m, regression, basis, m.whitening(b, regression.ridge).solve(overlap))
        constant = torch.zeros_like(overlap)
        constant[-1] = overlap[-1] / m.product(b, b).diagonal()[-1]
        return cls(m, regression, basis, constant)

    def restricted(self, choice: Tensor) -> "Residual":
        """Some of the features, or combinations of them."""
        return Residual.of(self.m, self.regression, choice)

    def _solve(self, x: Tensor) -> Tensor:
        """``S^-1 X``."""
        return self.m.whitening(self.regression.reads, self.regression.ridge).solve(x)

    def best_moves(self, goals: Tensor) -> Tensor | None:
        """``T G [i, q]`` for combinations ``G [o, q]`` of goals, or None if nothing is taken out of the goals."""
        b, v = self.regression.reads, self.regression.goal
        return self._solve(self.m.product(b, v) @ goals) if b is not None and self.regression.project else None

    @cached_property
    def gram(self) -> Product:
        """``B^T P' B [k, k]``."""
        return self.gram_on(self.m)

    def gram_on(self, m: MomentView) -> Product:
        """``B^T P' B [k, k]`` on other samples."""
        p, b, D = self.regression.features, self.regression.reads, self.D
        P = self.basis.rows(self.basis.columns(m.product(p, p)))
        if D is None:
            return P
        DC = D.T @ dense(self.basis.columns(m.product(b, p)))
        return dense(P) - DC - DC.T + D.T @ (m.product(b, b) @ D)

    @cached_property
    def cross(self) -> Tensor:
        """``B^T N [k, o]``, at less expense than :meth:`cross_on` where B has fewer columns than there are goals."""
        p, b, v, m, D = self.regression.features, self.regression.reads, self.regression.goal, self.m, self.D
        N = dense(self.basis.rows(m.product(p, v)))
        if b is not None and self.regression.project:
            C = dense(self.basis.columns(m.product(b, p)))
            N = N - self._solve(C if D is None else C - m.product(b, b) @ D).T @ m.product(b, v)
        return N if D is None else N - D.T @ m.product(b, v)

    def cross_on(self, m: MomentView, goals: Tensor) -> Tensor:
        """``B^T N G [k, q]`` on other samples, for combinations ``G [o, q]`` of goals."""
        p, b, v, D = self.regression.features, self.regression.reads, self.regression.goal, self.D
        N, T = dense(self.basis.rows(m.product(p, v) @ goals)), self.best_moves(goals)
        if T is not None:
            N = N - dense(self.basis.rows(m.product(p, b) @ T))
        if D is None:
            return N
        M = m.product(b, v) @ goals
        return N - D.T @ (M if T is None else M - m.product(b, b) @ T)

    @cached_property
    def unit(self) -> Tensor:
        """``E (B^T p)^2 [k]``: what the features were before anything was taken out of them."""
        return self.basis.diagonal(self.m.product(self.regression.features, self.regression.features))

    @cached_property
    def resolution(self) -> float:
        """Relative precision of :attr:`gram`: once all of ``b`` is taken out, it is a difference of larger numbers."""
        b, D = self.regression.reads, self.D
        if self.regression.compensation != "all" or D is None:
            return self.m.resolution
        summed = (D.abs() * magnitudes_times(self.m.product(b, b), D.abs())).sum(0)
        lost = float((summed / torch.where(self.unit > 0, self.unit, 1)).max()) if len(self.unit) else 0.0
        return self.m.resolution * max(CANCELLATION, lost)

    @property
    def note(self) -> str:
        """What had to be done to S, if it was inverted."""
        regression = self.regression
        inverted = regression.reads is not None and (regression.project or regression.compensation == "all")
        return self.m.whitening(regression.reads, regression.ridge).note if inverted else ""


@dataclass(frozen=True, eq=False)
class StackedResidual:
    """Several targets of the same features: N side by side, P' averaged over them.

    The average is exact when all read the new features at the same positions with the same ``b`` taken out of them;
    otherwise it is a proposal, and the fan-outs are fitted to each target afterwards.
    """

    parts: Sequence[Residual]

    @classmethod
    def of(cls, m: MomentView, regressions: Sequence[Regression]) -> "StackedResidual":
        return cls([Residual.of(m, regression) for regression in regressions])

    @cached_property
    def gram(self) -> Product:
        """``P' [p, p]``."""
        return mean_of([part.gram for part in self.parts])

    @cached_property
    def raw_crosses(self) -> list[Product]:
        """``R [p, o]`` of each part."""
        return [part.m.product(part.regression.features, part.regression.goal) for part in self.parts]

    @cached_property
    def widths(self) -> list[int]:
        """Goals of each part."""
        return [cross.shape[1] for cross in self.raw_crosses]

    def whitening(self, ridge: float) -> Whitening:
        """Of P', with a ridge relative to what the features were before anything was taken out of them."""
        unit = torch.stack([part.unit for part in self.parts]).mean(0)
        return whitening(self.gram, ridge, max(part.resolution for part in self.parts), unit)

    def cross_of(self, goals: Tensor) -> Tensor:
        """``N G [p, q]``."""
        products = [part.cross_on(part.m, g) for part, g in zip(self.parts, goals.split(self.widths), strict=True)]
        return sum(products[1:], products[0])

    def raw_cross_of(self, goals: Tensor) -> Tensor:
        """``R G [p, q]``: what N is made from, before anything is taken out of features and goals."""
        products = [R @ g for R, g in zip(self.raw_crosses, goals.split(self.widths), strict=True)]
        return sum(products[1:], products[0])

    def leading_goals(self, white: Whitening, count: int, iterations: int) -> Tensor:
        """Orthonormal combinations of goals ``[o, count]`` that hold the leading right singular vectors of ``W N``."""

        def transposed(u: Tensor) -> Tensor:
            directions = white.back(u)
            return torch.cat([part.restricted(directions).cross for part in self.parts], 1).T

        return leading_subspace(
            lambda goals: white.whiten(self.cross_of(goals)),
            transposed,
            sum(self.widths),
            count,
            white.scale,
            iterations,
        )
