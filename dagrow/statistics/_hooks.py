"""Hooks that see what layers read and write while a model runs."""

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from dagrow.layers import LayerSite
from dagrow.tracing import run_decomposed

#: is called with a layer's name, its input and its output; what it returns, if anything, replaces the output
Observer = Callable[[str, Tensor, Tensor], Tensor | None]


class LayerHooks:
    """A context in which an observer sees every call of some layers.

    Args:
        model: the model that the layers are part of.
        layers: modules, or functions called with a parameter of the model.
        observer: is called as ``observer(name, inputs, output)``; what it returns, if anything, replaces the output.
    """

    def __init__(self, model: nn.Module, layers: Iterable[LayerSite], observer: Observer) -> None:
        self.observer, layers = observer, list(layers)
        self.modules = {layer.name: layer.module for layer in layers if not layer.paths}
        functions = [layer for layer in layers if layer.paths]
        self.mode = _FunctionHooks(model, functions, observer) if functions else None
        self.others = {name: set(module._forward_hooks) for name, module in self.modules.items()}

    def __enter__(self) -> "LayerHooks":
        for name, module in self.modules.items():
            module.register_forward_hook(
                lambda _m, args, kwargs, output, name=name: self.observer(name, [*args, *kwargs.values()][0], output),
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
        """Removes all hooks but those that others registered before."""
        for name, module in self.modules.items():
            for key in set(module._forward_hooks) - self.others[name]:
                del module._forward_hooks[key]
                module._forward_hooks_with_kwargs.pop(key, None)


class ForwardProbe:
    """Inside, ``ran`` tells whether the model's own forward has run, as ``model(x)`` or as ``model.forward(x)``.

    Args:
        model: whose forward is looked at.
        instead: is called in its place, with it and its arguments; by default it runs.
    """

    def __init__(self, model: nn.Module, instead: Callable[..., object] | None = None) -> None:
        self.attributes, self.forward, self.ran, self.instead = vars(model), model.forward, False, instead
        self.own_forward = self.attributes.get("forward")  # of this very object, beside that of its class

    def __enter__(self) -> "ForwardProbe":
        @functools.wraps(self.forward)
        def probed(*args: object, **kwargs: object) -> object:
            self.ran = True
            return (
                self.forward(*args, **kwargs) if self.instead is None else self.instead(self.forward, *args, **kwargs)
            )

        self.attributes["forward"] = probed
        return self

    def __exit__(self, *_: object) -> None:
        if self.own_forward is None:
            self.attributes.pop("forward", None)
        else:
            self.attributes["forward"] = self.own_forward


class _FunctionHooks(TorchFunctionMode):
    """Sees functions that are called with a layer's own parameter."""

    def __init__(self, model: nn.Module, layers: Iterable[LayerSite], observer: Observer) -> None:
        super().__init__()
        self.observer = observer
        self.layers = [
            (layer.name, {entry: _Holder.of(model, path) for entry, path in layer.paths.items()}) for layer in layers
        ]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        decomposed = run_decomposed(self, func, args, kwargs)
        if decomposed is not None:
            return decomposed[0]
        output = func(*args, **kwargs)
        if not isinstance(output, Tensor):
            return output
        arguments = {id(tensor): tensor for tensor in _tensors((*args, *kwargs.values()))}
        if len(arguments) < 2:  # an input and a weight
            return output
        bases = {key: id(tensor if tensor._base is None else tensor._base) for key, tensor in arguments.items()}
        seen = {*bases, *bases.values()}  # of a transpose the parameter
        for name, holders in self.layers:
            if id(holders["weight"]()) not in seen:  # what is there now
                continue
            own = {id(holder()) for holder in holders.values()}
            inputs = [tensor for key, tensor in arguments.items() if key not in own and bases[key] not in own]
            if inputs:
                replacement = self.observer(name, inputs[0], output)
                return output if replacement is None else replacement
        return output


def _tensors(arguments: Iterable[Any]) -> Iterator[Tensor]:
    """Those among arguments, and in nests there."""
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, (list, tuple, dict)):
            yield from (leaf for leaf in tree_leaves(argument) if isinstance(leaf, Tensor))


@dataclass(frozen=True)
class _Holder:
    """Where a parameter is found, fast: all layers are looked up at every call of a function."""

    module: nn.Module
    table: str | None
    leaf: str

    @classmethod
    def of(cls, model: nn.Module, path: str) -> "_Holder":
        owner, _, leaf = path.removeprefix(".").rpartition(".")
        module = model.get_submodule(owner)
        table = next((table for table in ("_parameters", "_buffers") if leaf in vars(module)[table]), None)
        return cls(module, table, leaf)

    def __call__(self) -> object:
        attributes = vars(self.module)
        return (attributes if self.table is None else attributes[self.table])[self.leaf]
