"""Runs of the demo that are over soon."""

from dagrow.reporting._demo import Config

TINY = Config(epochs=3, growing=2, batch=32)
