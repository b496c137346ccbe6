"""What is more than chance: a gain on samples that the fit has not seen, at one place or at the best of many."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import erfc, sqrt

from torch import Tensor

LEVEL = 0.05  #: of all tests of a call together


@dataclass(frozen=True)
class Verdict:
    """What the scores of samples say of a fit that has not seen them (equation 7).

    Attributes:
        samples: how many.
        gain: the held-out gain, the mean of ``d``.
        error: its standard error, ``sd(d) / sqrt(n)``.
        z: ``sum c / sqrt(2 sum c^2)``, of mean 0 and variance 1 where goals are independent of the features. Each
            fold's fit is on the others: of what one fold has in common with another, which is what sums up, each
            appears twice, and the variance is twice that of independent scores.
    """

    samples: int
    gain: float
    error: float
    z: float

    @classmethod
    def of(cls, sums: Tensor) -> "Verdict":
        """From sums of scores.

        Args:
            sums: over samples, of products of ``(d, c, 1)`` ``[3, 3]``.

        Returns:
            The gain with its error, and z.
        """
        n = float(sums[2, 2])
        gain = float(sums[0, 2]) / n
        variance = max(float(sums[0, 0]) / n - gain**2, 0.0)
        deviation = sqrt(2 * float(sums[1, 1]))
        error = sqrt(variance / (n - 1)) if n > 1 else float("inf")
        return cls(int(n), gain, error, float(sums[1, 2]) / deviation if deviation else 0.0)


def upper_tail(z: float) -> float:
    """One minus the distribution function of a standard normal variable.

    Args:
        z: the threshold.

    Returns:
        The probability of at least z.
    """
    return erfc(z / sqrt(2)) / 2


def holm(p_values: Sequence[float], tests: int, families: int = 1) -> list[float]:
    """P-values for all tests together: the probability that chance alone came to as much at any of them.

    With ``p_(1) <= p_(2) <= ...`` of m tests the adjusted p-value is ``max over j <= i of (m - j + 1) p_(j)``, at most
    1. Those at most 5 % are more than chance; the probability that one of these is chance nevertheless is at most 5 %,
    however the tests depend on each other. Source: Holm 1979.

    Args:
        p_values: of one test each.
        tests: how many there were, those that gave no p-value among them.
        families: how many such calls share the 5 % (Bonferroni).

    Returns:
        Adjusted p-values, in the order of ``p_values``.
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    count, largest, adjusted = max(tests, len(order)), 0.0, [0.0] * len(order)
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, families * (count - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
