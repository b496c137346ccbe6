"""Python functions of torch that are looked into: what they are made of is seen, not they themselves."""

from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

from torch.nn import functional
from torch.overrides import TorchFunctionMode

__all__ = ["run_opened"]


def _opened(function: Any) -> Callable[..., Any]:
    """A copy that never hands itself to a function mode; what it calls still does."""
    names: Mapping[str, Any] = {**function.__globals__, "has_torch_function": lambda _tensors: False}
    copy = FunctionType(function.__code__, dict(names), function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


_OPENED: dict[Any, Callable[..., Any]] = {
    function: _opened(function) for function in (functional.multi_head_attention_forward,)
}  # fmt: skip


def run_opened(mode: TorchFunctionMode, function: Any, args: Any, kwargs: Any) -> tuple[Any] | None:
    """The result of a function that is looked into, under the mode; None for any other function."""
    if function not in _OPENED:
        return None
    TorchFunctionMode.__enter__(mode)
    try:
        return (_OPENED[function](*args, **kwargs),)
    finally:
        TorchFunctionMode.__exit__(mode, None, None, None)
