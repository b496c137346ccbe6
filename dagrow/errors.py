"""The errors that users meet. Each message says what was given, why it does not work, and what to do instead."""

__all__ = [
    "BatchError", "DagrowError", "GrowthError", "LossError", "OptimizerError", "StoreError", "TraceError", "first_line",
]  # fmt: skip


class DagrowError(Exception):
    """Base class of everything that dagrow raises on purpose. The model is as it was before the call."""


class TraceError(DagrowError):
    """The model cannot be turned into a graph, or the graph does not compute what the model computes."""


class BatchError(DagrowError):
    """The batches are empty, exhausted, or do not fit the model (shape, dtype, device)."""


class LossError(DagrowError):
    """The loss is not a finite scalar that depends on the model, or is neither a mean nor a sum over samples."""


class GrowthError(DagrowError):
    """A growth cannot be proposed, applied or undone as asked."""


class OptimizerError(DagrowError):
    """The optimizer holds state that cannot follow a parameter that grew."""


class StoreError(DagrowError):
    """A file cannot be written or read, or what it holds does not fit the model."""


def first_line(error: Exception) -> str:
    """An error of others in one line, for messages of ours."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
