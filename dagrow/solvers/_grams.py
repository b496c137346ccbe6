"""``X^T X`` by halves: the lower one is the upper one, transposed."""

from torch import Tensor

_BLOCKED = 256  #: Grams from this width on are computed by blocks, without the redundant one


def add_gram(total: Tensor, x: Tensor) -> None:
    """Adds ``x^T x`` by halves, without the lower one, which :func:`complete` fills in: fewer products.

    Args:
        total: ``[d, d]``, changed in place.
        x: ``[rows, d]``.
    """
    d = x.shape[1]
    if d < _BLOCKED:
        total += x.T @ x
        return
    left, right = slice(d // 2), slice(d // 2, d)
    add_gram(total[left, left], x[:, left])
    add_gram(total[right, right], x[:, right])
    total[left, right] += x[:, left].T @ x[:, right]


def complete(total: Tensor) -> None:
    """Fills in what :func:`add_gram` left out.

    Args:
        total: ``[..., d, d]``, changed in place.
    """
    d = total.shape[-1]
    if d >= _BLOCKED:
        left, right = slice(d // 2), slice(d // 2, d)
        complete(total[..., left, left])
        complete(total[..., right, right])
        total[..., right, left] = total[..., left, right].mT
