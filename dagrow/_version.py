"""The version of the package that is installed."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("dagrow")
except PackageNotFoundError:  # run from its sources
    __version__ = "0+unknown"
