"""Runs of the demo that are over soon."""

from dagrow.reporting._demo import ARMS, Config

TINY = Config({arm: (0.01, 0.01) for arm in ARMS}, budgets=(0.1, 0.3), widths=(4, 5), factor=2.5, most=300)
