"""One form for each call of torch: Python functions of torch are looked into, and one operation has one spelling."""

import operator
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode


def _opened(function: Any) -> Callable[..., Any]:
    """A copy that never hands itself to a function mode; what it calls still does."""
    names: Mapping[str, Any] = {**function.__globals__, "has_torch_function": lambda _tensors: False}
    copy = FunctionType(function.__code__, dict(names), function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


_OPENED: dict[Any, Callable[..., Any]] = {
    function: _opened(function) for function in (functional.multi_head_attention_forward,)
}


def run_opened(mode: TorchFunctionMode, function: Any, args: Any, kwargs: Any) -> tuple[Any] | None:
    """The result of a function that is looked into, under the mode; None for any other function."""
    if function not in _OPENED:
        return None
    TorchFunctionMode.__enter__(mode)
    try:
        return (_OPENED[function](*args, **kwargs),)
    finally:
        TorchFunctionMode.__exit__(mode, None, None, None)


_OPERATORS: dict[str, Callable[..., Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "matmul": operator.matmul,
    "pow": operator.pow,
    "neg": operator.neg,
}


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
