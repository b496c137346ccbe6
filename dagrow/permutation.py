"""Whether a growth explains more than chance, asked in another way: by giving the goals to the wrong samples.

With ``b`` regressed out of the new features and of the goals, ``p' = p - C S^-1 b`` and ``v_perp = v - dW b``, any
``W`` with ``W P' W^T = 1`` (and a small ridge) gives the part of the goals that the best single direction explains,

    l^2 / E|v*|^2,      l the largest singular value of W E p' v_perp^T.

Permuted goals ``v_perp`` of other samples, all positions of a sample together, have nothing to do with the features,
but for chance; of them, too, b is regressed out before their size is taken, ``v* = v_perp,pi(n) - dW_pi b``. If goals
are exchangeable, which they are if they do not depend on the features, all of these parts are draws from one
distribution, up to what b takes up (Freedman and Lane 1983). No fit on other folds, no normal distribution.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from einops import rearrange
from torch import Tensor

from dagrow.errors import SEEDS, GrowthError, check_whole
from dagrow.features import Sliding
from dagrow.growth import Growth
from dagrow.linalg import whitening
from dagrow.measure import collect
from dagrow.solve import Block

__all__ = ["PermutationTest", "permutation_test"]

RIDGE = 0.1  #: of the new features, relative to each one's second moment
SLACK = 1e-9  #: parts that differ by less, relatively, are equal


@dataclass(frozen=True)
class PermutationTest:
    """How much the best single direction explains, of the goals as they are and of permuted ones.

    Attributes:
        where: the growth's place.
        part: the part of what is left of the goals that the direction explains.
        permuted: the same for each permutation ``[permutations]``.
        p_value: the rank of the part among all, ``(1 + how many permuted ones are as large) / (1 + permutations)``.
            For one place: to compare several, multiply it by their number.
        samples: how many were measured.
    """

    where: str
    part: float
    permuted: Tensor = field(repr=False)
    p_value: float
    samples: int

    def __str__(self) -> str:
        count, mean, most = len(self.permuted), float(self.permuted.mean()), float(self.permuted.max())
        return (
            f"{self.where}: one direction explains {self.part:.3%} of what is left of the goals; of goals permuted "
            f"{count} times {mean:.3%} on average, {most:.3%} at most; p {self.p_value:.2g}"
        )


def permutation_test(growth: Growth, permutations: int = 99, *, seed: int = 0) -> PermutationTest:
    """Permutes a place's goals among samples, and compares the leading singular values. Changes nothing.

    An independent check of a growth's ``z``. It is exact where the noise of the goals is the same for all samples; z
    does not ask for that, but for many samples. All rows are held at once: ``n s (p + i + o)`` numbers in float64, p
    the new features (as often as the consumer's kernel has taps), i and o what the target reads and writes.

    Args:
        growth: proposed by :func:`dagrow.propose`, not applied yet. It tells the place; how many neurons it adds and
            with which weights makes no difference. Of a new layer random hidden units stand for all.
        permutations: how many; the smallest p-value is ``1 / (1 + permutations)``.
        seed: of the permutations.

    Raises:
        GrowthError: the growth is stale, or does not say what it regresses on what; or an argument does not fit.

    Source: Freedman and Lane 1983, for rows of several positions; the leading singular value in place of F.
    """
    check_whole("permutation_test", 1, permutations=permutations)
    check_whole("permutation_test", 0, SEEDS, seed=seed)
    if not isinstance(growth, Growth):
        raise GrowthError(f"permutation_test: a {type(growth).__name__} was given; give a growth of dagrow.propose.")
    growth.check_fresh()
    blocks, generator = growth.regressions(), torch.Generator().manual_seed(seed)
    if not blocks:
        raise GrowthError(
            f"permutation_test: the growth at {growth.where} does not say what features it regresses on what goals, or "
            "linear theory does not reach the consumers. Its p_value, if it has one, still holds."
        )
    features = {f for block in blocks for f in (block.features, block.goal, block.reads) if f is not None}
    rows = collect(growth.dag, growth.objective, features)
    targets = [_Target.of(block, rows) for block in blocks]
    white = torch.stack([target.gram for target in targets]).mean(0)
    unit = torch.stack([target.unit for target in targets]).mean(0)
    factor = whitening(white, RIDGE, None, unit).whiten(torch.eye(len(white)).to(white))
    samples = len(targets[0].left)
    orders = [torch.arange(samples), *(torch.randperm(samples, generator=generator) for _ in range(permutations))]
    parts = torch.stack([_part(targets, factor, order.to(white.device)) for order in orders]).cpu()
    part, permuted = float(parts[0]), parts[1:]
    as_large = int((permuted >= part * (1 - SLACK)).sum())
    return PermutationTest(growth.where, part, permuted, (1 + as_large) / (1 + permutations), samples)


@dataclass(frozen=True, eq=False)
class _Target:
    """What is left at one target once b is regressed out: features ``[n s, p, slots]`` and goals ``[n, s, o]``."""

    features: Tensor
    left: Tensor
    unit: Tensor  #: ``E p^2`` before, the mean over slots ``[p]``
    read: Tensor | None  #: orthonormal columns that span b ``[n s, rank]``

    @classmethod
    def of(cls, block: Block, rows: dict) -> "_Target":
        slots = block.features.arrival.index.shape[1] if isinstance(block.features, Sliding) else 1
        goals, new = rows[block.goal], rows[block.features].flatten(0, 1)
        samples, unit = len(goals), rearrange(new, "r (p e) -> r p e", e=slots).square().sum((0, 2)) / slots
        left, read = goals.flatten(0, 1), None
        if block.reads is not None:
            b = rows[block.reads].flatten(0, 1)
            read = whitening(b.T @ b).whiten(b.T).T
            new, left = new - read @ (read.T @ new), left - read @ (read.T @ left)
        return cls(rearrange(new, "r (p e) -> r p e", e=slots), left.view(samples, -1, left.shape[1]), unit, read)

    @property
    def gram(self) -> Tensor:
        """The mean over slots of sums of ``p' p'^T`` ``[p, p]``."""
        return torch.einsum("rpe, rqe -> pq", self.features, self.features) / self.features.shape[2]


def _part(targets: Sequence[_Target], factor: Tensor, order: Tensor) -> Tensor:
    """The part that the best direction explains of goals in another order of samples."""
    sides, size = [], factor.new_zeros(())
    for target in targets:
        goals = target.left[order].flatten(0, 1)
        sides.append(torch.einsum("rpe, ro -> peo", target.features, goals).flatten(1))
        size += goals.square().sum()
        if target.read is not None:
            size -= (target.read.T @ goals).square().sum()
    explained = torch.linalg.matrix_norm(factor @ torch.cat(sides, 1), 2).square()
    return explained / size if size > 0 else torch.zeros_like(size)
