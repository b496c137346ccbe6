"""One form for each call of torch, however the user's code writes it.

Python functions of torch that hide layers are decomposed into the calls that they make, and an operation that has
several spellings (``x + y``, ``x.add(y)``, ``x.__radd__(y)``) gets one.
"""

import operator
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_NAMES = ("add", "sub", "mul", "matmul", "pow", "neg")  #: of tensors' methods and of operators alike
_OPERATORS = {name: getattr(operator, name) for name in _NAMES} | {"div": operator.truediv}


def canonical_call(func: Any, attribute: str, args: Any, kwargs: Any) -> tuple[str, Any, Any, Any]:
    """A call as a node has it: attributes as getattr, dunders and `x.add(y)` as functions of `operator`.

    Args:
        func: what is called.
        attribute: that it gets or sets, if it does.
        args: its positional arguments.
        kwargs: its keyword arguments.

    Returns:
        The operation of the node, its target and its arguments.
    """
    name = func.__name__
    if attribute:
        access = getattr if name == "__get__" else setattr
        return "call_function", access, (args[0], attribute, *args[1:2]), {}
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


def run_decomposed(mode: TorchFunctionMode, function: Any, args: Any, kwargs: Any) -> tuple[Any] | None:
    """Runs a Python function of torch so that a mode sees what it calls.

    Args:
        mode: the mode that was asked to run the function, and is off meanwhile.
        function: what was called.
        args: its positional arguments.
        kwargs: its keyword arguments.

    Returns:
        The result, in a tuple; None for a function that is not decomposed.
    """
    if function is not functional.multi_head_attention_forward:
        return None
    TorchFunctionMode.__enter__(mode)
    try:
        return (_ATTENTION(*args, **kwargs),)
    finally:
        TorchFunctionMode.__exit__(mode, None, None, None)


def _decomposed(function: Any) -> Callable[..., Any]:
    """A copy that never hands itself to a function mode; what it calls still does."""
    names = {**function.__globals__, "has_torch_function": lambda _tensors: False}
    copy = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


_ATTENTION = _decomposed(functional.multi_head_attention_forward)
