"""The inputs of a model's forward: how users give them, and whether a graph can take them."""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from dagrow._pytree import leaves, tensors_in
from dagrow.errors import TraceError

Arguments = tuple[tuple[Any, ...], dict[str, Any]]  #: of a call, by position and by name


def bind(example_inputs: object) -> Arguments:
    """Positional and keyword arguments of forward.

    Args:
        example_inputs: a tensor, a tuple or list of positional arguments, or a dict of keyword arguments.

    Returns:
        The positional arguments and the keyword arguments.

    Raises:
        TraceError: for anything else.
    """
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    if isinstance(example_inputs, Mapping) and all(isinstance(key, str) for key in example_inputs):
        return (), dict(example_inputs)
    raise TraceError(
        f"Example inputs are a {type(example_inputs).__name__}. Give a tensor, a tuple or list of positional "
        "arguments of forward, or a dict of its keyword arguments; a dict that is itself one argument goes "
        "into a tuple: (d,)."
    )


def bind_to_forward(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> inspect.BoundArguments:
    """Arguments by the names of forward's parameters. Raises TraceError where they do not fit."""
    try:
        return inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise TraceError(
            f"{type(model).__name__}.forward{inspect.signature(model.forward)} cannot be called with these "
            f"inputs ({shapes_of((args, kwargs))}): {error}. Give a tuple of positional or a dict of keyword "
            "arguments."
        ) from error


def shapes_of(inputs: object) -> str:
    """Inputs as messages show them: tensors by type and shape."""
    shown = [f"{str(v.dtype)[6:]}{list(v.shape)}" if isinstance(v, Tensor) else repr(v) for _, v in leaves(inputs)]
    return ", ".join(shown) or "nothing"


def fits(traced: object, value: object) -> bool:
    """Whether a graph made for one argument can take another: only tensors may differ."""
    if traced is value or isinstance(traced, Tensor):
        return traced is value or isinstance(value, Tensor)
    old, new = dict(leaves(traced)), dict(leaves(value))
    return old.keys() == new.keys() and all(_is_alike(old[path], new[path]) for path in old)


def _is_alike(a: object, b: object) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor)
    return a is b or (type(a) is type(b) and bool(a == b))


def hold_values(model: nn.Module, inputs: object) -> bool:
    """Whether no tensor of a model and of a nest of inputs is a stand-in without values.

    Args:
        model: whose parameters and buffers are looked at.
        inputs: a nest of containers.

    Returns:
        False if any tensor is fake or on the meta device.
    """
    tensors = (*tensors_in(inputs), *model.parameters(), *model.buffers())
    return not any(isinstance(tensor, FakeTensor) or tensor.is_meta for tensor in tensors)
