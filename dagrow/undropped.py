"""Models without dropout: it draws other random numbers where widths are others, so that nothing can be compared."""

from inspect import signature
from typing import Any

from torch.nn import functional
from torch.overrides import TorchFunctionMode

__all__ = ["Undropped"]


class Undropped(TorchFunctionMode):
    """Inside, dropout passes everything on, in attention too."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if "dropout" in getattr(func, "__name__", ""):
            return args[0] if args else kwargs["input"]
        if func is functional.scaled_dot_product_attention:
            args, kwargs = args[:4], {**dict(zip(("dropout_p", "is_causal"), args[4:], strict=False)), **kwargs}
            kwargs["dropout_p"] = 0.0
        if func is functional.multi_head_attention_forward:
            given = signature(func).bind(*args, **kwargs)
            given.arguments["dropout_p"] = 0.0
            args, kwargs = given.args, given.kwargs
        return func(*args, **kwargs)
