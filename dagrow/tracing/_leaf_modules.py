"""Which modules are looked into while a model is recorded, and which become one node."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.MultiheadAttention)


def is_opaque(module: nn.Module) -> bool:
    """Whether a module is scripted or compiled, and so hides what it computes.

    Args:
        module: any module.

    Returns:
        True for a module that becomes one node.
    """
    return isinstance(module, torch.jit.ScriptModule) or hasattr(module, "_orig_mod")


def is_leaf(module: nn.Module) -> bool:
    """True for a class of `torch.nn` that is not a container, or a subclass that computes what it computes."""
    own = type(module)
    if is_opaque(module):
        return True
    base = next(c for c in own.__mro__ if c.__module__.startswith("torch.nn.modules."))
    walked = issubclass(base, _CONTAINERS) or base.__module__.endswith(".transformer")  # linear layers in there too
    if base is nn.Module or walked or "forward" in vars(module):
        return False
    return all(getattr(own, name, None) is getattr(base, name, None) for name in ("forward", "_conv_forward"))


class OpaqueModule(nn.Module):
    """Stands for a scripted or compiled module, which takes no hooks, while it is recorded."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._run = module.__call__  # no submodule: nothing in there is seen

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(*args, **kwargs)


def opaque_parts(model: nn.Module) -> Iterator[tuple[tuple[nn.Module, str], nn.Module]]:
    """Scripted and compiled modules in a model, by their parents and names; not those within them."""
    for name, child in model._modules.items():
        if child is not None and is_opaque(child):
            yield (model, name), child
        elif child is not None:
            yield from opaque_parts(child)
