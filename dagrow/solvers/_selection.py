"""Which of many measured features to take: what each explains alone, and one after the other.

Orthogonal matching pursuit in closed form, on moments alone: features and goals are only known by ``P'`` and ``N``.
"""

import torch
from einops import rearrange
from torch import Tensor

from dagrow.solvers._moments import MomentView
from dagrow.solvers._residual import CANCELLATION, Regression, Residual
from dagrow.solvers._row_products import dense


def marginal_drops(m: MomentView, regression: Regression, slots: int, ridge: float = 0.0) -> Tensor:
    """What each unit would explain alone: ``n^T (p + ridge)^-1 n``.

    Args:
        m: moments of the samples that it is fitted on.
        regression: the features and their target.
        slots: neighbouring features of a unit.
        ridge: relative to each feature's second moment.

    Returns:
        By how much the bottleneck would fall ``[units]``.
    """
    residual = Residual.of(m, regression)
    p = rearrange(dense(residual.gram), "(u s) (w t) -> u w s t", s=slots, t=slots).diagonal().permute(2, 0, 1)
    n = rearrange(residual.cross, "(u s) o -> u s o", s=slots)
    damping = max(ridge, CANCELLATION * m.resolution) * rearrange(residual.unit, "(u s) -> u s", s=slots)
    inverse = torch.linalg.pinv(p + torch.diag_embed(damping), hermitian=True)
    return torch.einsum("uso, ust, uto -> u", n, inverse, n)


def forward_selection(
    m: MomentView, regression: Regression, k: int, ridge: float = 0.0, offered: Tensor | None = None
) -> Tensor:
    """The feature that explains most beside those taken before, k times.

    Each step takes the feature out of all others: ``P' <- P' - P'_j P'_j^T / P'_jj``, ``N <- N - P'_j N_j / P'_jj``.

    Args:
        m: moments of the samples that it is fitted on.
        regression: the features and their target.
        k: how many features, at most.
        ridge: relative to each feature's second moment.
        offered: indices of the features that may be taken; all by default.

    Returns:
        Their indices ``[k]``, in the order in which they were taken; fewer where no feature is left that explains more.
    """
    residual = Residual.of(m, regression)
    P, N = dense(residual.gram), residual.cross
    damping = (ridge + len(P) * residual.resolution) * residual.unit
    indices = torch.arange(len(P))
    allowed = torch.isin(indices, indices if offered is None else offered).to(P.device)
    taken: list[int] = []
    for _ in range(min(k, len(P))):
        free = P.diagonal() > damping * 1e-3
        free[taken] = False
        free &= allowed
        drops = torch.where(free, N.square().sum(1) / (P.diagonal() + damping).clamp_min(1e-300), -1)
        j = int(drops.argmax())
        if drops[j] <= 0:
            break
        taken.append(j)
        column = P[:, j] / (P[j, j] + damping[j])
        P, N = P - torch.outer(column, P[j]), N - torch.outer(column, N[j])
    return torch.tensor(taken, device=P.device, dtype=torch.long)
