"""What a model runs in while it is traced; nothing of it is left when the ``with`` ends, however many threads trace."""

import contextlib
import logging
import threading
from collections.abc import Iterator

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.overrides import BaseTorchFunctionMode

from dagrow.errors import TraceError
from dagrow.tracing._inputs import shapes_of
from dagrow.tracing._source_lines import refusal, source

DEVICES = ("cpu", "cuda")  #: that forward may cast for
VALUE_ERRORS = (DataDependentOutputException, DynamicOutputShapeException)
Autocast = tuple[tuple[bool, torch.dtype], ...]  #: for each device, whether it casts and to what


def autocast_state() -> Autocast:
    """Whether autocast is on in this thread."""
    return tuple((torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in DEVICES)


@contextlib.contextmanager
def modes_kept() -> Iterator[None]:
    """Leaves gradients and autocast switched as they were, also where a graph ends halfway."""
    grad, casting = torch.is_grad_enabled(), autocast_state()
    try:
        yield
    finally:
        torch.set_grad_enabled(grad)
        for device, (enabled, dtype) in zip(DEVICES, casting, strict=True):
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)


class _EagerStance:
    """Inside, compiled parts run as they were written.

    torch has one stance for all threads: the first that enters changes it, the last that leaves changes it back.
    """

    def __init__(self) -> None:
        self.lock, self.entered, self.stance = threading.Lock(), 0, contextlib.ExitStack()

    def __enter__(self) -> None:
        with self.lock:
            if not self.entered:
                self.stance.enter_context(torch.compiler.set_stance("force_eager"))
            self.entered += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.entered -= 1
            if not self.entered:
                self.stance.close()


_eager = _EagerStance()


@contextlib.contextmanager
def plainly() -> Iterator[None]:
    """Without the fused paths of torch's transformer layers, and with compiled parts as they were written."""
    with _eager, BaseTorchFunctionMode():  # under any mode those layers take none of them
        yield


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without what torch logs in this thread about operations that need values."""
    logger, thread = logging.getLogger("torch._subclasses.fake_tensor"), threading.get_ident()

    def is_of_others(record: logging.LogRecord) -> bool:
        return record.thread != thread

    logger.addFilter(is_of_others)
    try:
        yield
    finally:
        logger.removeFilter(is_of_others)


@contextlib.contextmanager
def explained(model: nn.Module, inputs: object) -> Iterator[None]:
    """Turns what a forward raises while it is traced into a TraceError with the user's line."""
    try:
        yield
    except TraceError:
        raise
    except VALUE_ERRORS as error:
        raise TraceError(refusal("this line", source(error))) from error
    except Exception as error:
        raise TraceError(
            f"{source(error)}: {type(model).__name__}.forward raised {type(error).__name__} on inputs "
            f"{shapes_of(inputs)}: {error} "
            "Check that the model runs on these inputs."
        ) from error
