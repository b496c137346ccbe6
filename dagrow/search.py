"""The amplitude of a growth, by line search on the loss."""

from collections.abc import Callable

__all__ = ["line_search"]

GOLDEN = (5**0.5 - 1) / 2
EVALUATIONS = 16  #: of the loss, at most
WORTH = 1e-9  #: a relative fall of the loss that is not worth a growth


def line_search(loss: Callable[[float], float], before: float) -> tuple[float, float]:
    """The amplitude with the lowest loss, and that loss. Never above ``before``; amplitude 0 if nothing is lower.

    Brackets a minimum by doubling or halving from 1, then narrows it by golden sections.
    """
    known = {0.0: before}

    def at(gamma: float) -> float:
        if gamma not in known:
            known[gamma] = loss(gamma)
        return known[gamma]

    best = 1.0
    if at(best) < before:
        while at(2 * best) < at(best) and len(known) < EVALUATIONS:
            best *= 2
    else:
        while at(best) >= before and len(known) < EVALUATIONS:
            best /= 2
        while at(best / 2) < at(best) and len(known) < EVALUATIONS:
            best /= 2
    low, high = best / 2, best * 2
    while len(known) < EVALUATIONS and high - low > 0.05 * best:
        left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
        low, high = (low, right) if at(left) < at(right) else (left, high)
    gamma = min(known, key=lambda g: (known[g], g))
    return (gamma, known[gamma]) if known[gamma] < before - WORTH * abs(before) else (0.0, before)
