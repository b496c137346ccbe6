"""What is more than chance where many places are looked at, and the best of them are taken."""

from collections.abc import Sequence
from dataclasses import replace

from dagrow.growth import Growth
from dagrow.scores import LEVEL

__all__ = ["corrected"]


def corrected(growths: Sequence[Growth], tests: int, families: int = 1) -> list[Growth]:
    """Growths with p-values for all places together: the probability that chance alone came to as much at any of them.

    With ``p_(1) <= p_(2) <= ...`` of m tests the adjusted p-value is ``max over j <= i of (m - j + 1) p_(j)``, at most
    1. Those at most 5 % are more than chance; the probability that one of these is chance nevertheless is at most 5 %,
    however the tests depend on each other. Source: Holm 1979.

    Args:
        growths: with p-values for one test each, or None where chance was not asked about.
        tests: how many places were looked at, those where nothing was found among them.
        families: how many such calls share the 5 % (Bonferroni).
    """
    order = sorted((g for g in growths if g.p_value is not None), key=_p_value)
    count, largest, found = max(tests, len(order)), 0.0, dict[Growth, Growth]()
    for rank, growth in enumerate(order):
        largest = max(largest, min(1.0, families * (count - rank) * _p_value(growth)))
        found[growth] = replace(growth, p_value=largest, significant=growth.significant and largest <= LEVEL)
    return [found.get(growth, growth) for growth in growths]


def _p_value(growth: Growth) -> float:
    assert growth.p_value is not None
    return growth.p_value
