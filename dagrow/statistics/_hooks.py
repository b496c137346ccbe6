"""Watching layers while a model runs."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from dagrow.layers import LayerSite
from dagrow.tracing import run_decomposed, tensor_at

#: what a watched layer was called with, and what it gave: to be kept, and possibly replaced
Catch = Callable[[str, Tensor, Tensor], Tensor | None]


class LayerHooks:
    """Inside, ``catch(name, inputs, output)`` sees every call of the layers; what it returns replaces the output."""

    def __init__(self, model: nn.Module, layers: Iterable[LayerSite], catch: Catch) -> None:
        self.catch, layers = catch, list(layers)
        self.modules = {layer.name: layer.module for layer in layers if not layer.paths}
        functions = [layer for layer in layers if layer.paths]
        self.mode = _FunctionHooks(model, functions, catch) if functions else None
        self.before = {name: set(module._forward_hooks) for name, module in self.modules.items()}

    def __enter__(self) -> "LayerHooks":
        for name, module in self.modules.items():
            module.register_forward_hook(
                lambda _m, args, kwargs, output, name=name: self.catch(name, [*args, *kwargs.values()][0], output),
                prepend=True,
                with_kwargs=True,  # before the user's
            )
        if self.mode is not None:
            self.mode.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        if self.mode is not None:
            self.mode.__exit__(None, None, None)
        try:
            self.remove()
        except BaseException:  # an interrupt while cleaning up: finish the cleaning first
            self.remove()
            raise

    def remove(self) -> None:
        for name, module in self.modules.items():
            for key in set(module._forward_hooks) - self.before[name]:
                del module._forward_hooks[key]
                module._forward_hooks_with_kwargs.pop(key, None)


class ForwardProbe:
    """Inside, ``ran`` tells whether the model's own forward has run, as ``model(x)`` or as ``model.forward(x)``."""

    def __init__(self, model: nn.Module) -> None:
        self.attributes, self.forward, self.ran = vars(model), model.forward, False
        self.own = self.attributes.get("forward")

    def __enter__(self) -> "ForwardProbe":
        @functools.wraps(self.forward)
        def noted(*args: Any, **kwargs: Any) -> Any:
            self.ran = True
            return self.forward(*args, **kwargs)

        self.attributes["forward"] = noted
        return self

    def __exit__(self, *_: object) -> None:
        if self.own is None:
            self.attributes.pop("forward", None)
        else:
            self.attributes["forward"] = self.own


class _FunctionHooks(TorchFunctionMode):
    """Sees functions that are called with a layer's own parameter."""

    def __init__(self, model: nn.Module, layers: Iterable[LayerSite], catch: Catch) -> None:
        super().__init__()
        self.model, self.layers, self.catch = model, list(layers), catch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        decomposed = run_decomposed(self, func, args, kwargs)
        if decomposed is not None:
            return decomposed[0]
        result = func(*args, **kwargs)
        if not isinstance(result, Tensor):
            return result
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        for layer in self.layers:
            held = {entry: tensor_at(self.model, path) for entry, path in layer.paths.items()}  # as they are now
            others = [tensor for tensor in given if not any(_is(tensor, own) for own in held.values())]
            if others and any(_is(tensor, held["weight"]) for tensor in given):
                replaced = self.catch(layer.name, others[0], result)
                return result if replaced is None else replaced
        return result


def _is(tensor: Tensor, parameter: Tensor) -> bool:
    """Whether a tensor is a parameter, or its transpose."""
    return tensor is parameter or tensor._base is parameter
