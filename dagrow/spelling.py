"""One spelling for one operation, however a model calls it."""

import operator
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["spelled"]

_OPERATORS: dict[str, Callable[..., Any]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv,
    "matmul": operator.matmul, "pow": operator.pow, "neg": operator.neg,
}  # fmt: skip


def spelled(func: Any, attribute: str, args: Any, kwargs: Any) -> tuple[str, Any, Any, Any]:
    """One spelling for one operation: attributes as getattr, dunders and `x.add(y)` as `operator`."""
    name = func.__name__
    if attribute:
        return (
            "call_function",
            getattr if name == "__get__" else setattr,
            (args[0], attribute, *args[1:2]),
            {},
        )
    method = getattr(torch.Tensor, name, None) is func
    if method and not kwargs and name.startswith("__"):
        if hasattr(operator, name):
            return "call_function", getattr(operator, name), args, {}
        plain = f"__{name[3:]}".replace("__div__", "__truediv__")
        if name.startswith("__r") and hasattr(operator, plain):
            return "call_function", getattr(operator, plain), args[::-1], {}
    if method and not kwargs and name in _OPERATORS:
        return "call_function", _OPERATORS[name], args, {}
    return ("call_method", name, args, kwargs) if method else ("call_function", func, args, kwargs)
