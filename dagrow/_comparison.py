"""One notion of "the same up to rounding".

Two values are the same where they differ by no more than their type tells apart, relative to the largest entry. Where
large terms cancel, as behind inputs with heavy tails, rounding shows more: matrix products of other widths add in
another order. How much more, weights show that are off in their last digit: they meet the same cancellation.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

DRAWS = 4
FACTOR = 10.0  #: differences within so many times those that jittered weights make are rounding
_TOLERANCE = {torch.float64: 1e-9, torch.complex128: 1e-9, torch.float16: 2e-2, torch.bfloat16: 5e-2}


def largest(values: Tensor) -> float:
    """The largest magnitude of finite entries; 0 if there are none."""
    finite = values[torch.isfinite(values)]
    finite = finite.abs() if finite.dtype is not torch.bool else finite
    return float(finite.max()) if finite.numel() else 0.0


def alike(expected: object, actual: object) -> bool:
    """Whether two values have the same type and, of tensors, the same shape."""
    return type(expected) is type(actual) and getattr(expected, "shape", None) == getattr(actual, "shape", None)


def close(expected: object, actual: object, allowed: float | None = None) -> bool:
    """Whether two values are the same, floating point tensors up to rounding.

    Args:
        expected: a tensor, or anything else that ``==`` compares.
        actual: what is to be the same.
        allowed: how far apart entries may be; by default what their type tells apart of the largest expected one.

    Returns:
        Whether they are, of tensors also the shape, dtype, device and layout.
    """
    if not (isinstance(expected, Tensor) and isinstance(actual, Tensor)):
        return expected is actual or bool(np.all(expected == actual))
    if any(getattr(expected, fact) != getattr(actual, fact) for fact in ("shape", "dtype", "device", "layout")):
        return False
    if expected.layout is not torch.strided:
        expected, actual = expected.to_dense(), actual.to_dense()
    if not (expected.is_floating_point() or expected.is_complex()):
        return torch.equal(expected, actual)
    if allowed is None:
        allowed = _TOLERANCE.get(expected.dtype, 1e-4) * largest(expected)
    return bool(torch.isclose(expected, actual, rtol=0.0, atol=allowed, equal_nan=True).all())


def jittered(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """A few times all parameters, every entry off by up to the relative precision of its type. Always the same."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(DRAWS):
        yield {
            name: _off(parameter.detach(), generator)
            for name, parameter in model.named_parameters()
            if parameter.is_floating_point()
        }


def _off(parameter: Tensor, generator: torch.Generator) -> Tensor:
    noise = 2 * torch.rand(parameter.shape, generator=generator, dtype=torch.float64) - 1
    scale = 1 + torch.finfo(parameter.dtype).eps * noise
    return (parameter.cpu().double() * scale).to(parameter)


def rounding_between(expected: object, others: Iterable[Any]) -> float:
    """How far apart rounding may bring values that jittered weights change to others."""
    if not (isinstance(expected, Tensor) and expected.is_floating_point()):
        return 0.0
    changes = (largest(other - expected) for other in others if alike(expected, other))
    return FACTOR * max(changes, default=0.0)
