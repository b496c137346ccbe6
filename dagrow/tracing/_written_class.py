"""A class like the user's own, for one object alone, whose forward is what was written from graphs.

There is one forward for each example that the model was traced with. A call goes to the one that was made for calls of
its form; where it leaves the sizes that this holds for, the user's own forward says what it says to such a call.
"""

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn

from dagrow._model_state import preserve_state
from dagrow._pytree import is_plain, leaves, mapped
from dagrow.errors import TraceError
from dagrow.tracing._source_lines import is_raised_by_user

PREFIX = "_dagrow_"
Written = tuple[str, Mapping[str, Any]]  #: the source of a forward, and what the names in it are
PathRecord = tuple[str, str, str]  #: a new path's name, and the layers that it reads with and writes to
Shapes = Mapping[str, torch.Size]  #: of parameters and buffers, by their names
Forward = Callable[..., Any]


class OtherSizesError(TraceError):
    """A call has sizes for which a written forward does not hold."""


def own_class(model: nn.Module) -> type[nn.Module]:
    """The user's class, below any that we made."""
    return next(kind for kind in type(model).__mro__ if f"{PREFIX}forwards" not in vars(kind))


def own_shapes(model: nn.Module) -> Shapes:
    """The shapes of parameters and buffers for which the user's own forward ran last."""
    tensors = (*model.named_parameters(), *model.named_buffers())
    return getattr(type(model), f"{PREFIX}shapes", None) or {name: tensor.shape for name, tensor in tensors}


def subclass(
    base: type[nn.Module], forwards: Sequence[Written], branches: Sequence[PathRecord], shapes: Shapes
) -> type[nn.Module]:
    """A class like the user's own with other forwards.

    Args:
        base: the user's class.
        forwards: one for each form of calls.
        branches: records of the new paths in them.
        shapes: of parameters and buffers, with which the user's own forward ran last.

    Returns:
        The class.
    """
    body = {
        "forward": _called(base, shapes, [_compiled(base, *written) for written in forwards]),
        "__reduce_ex__": _reduce,
        **{name: getattr(base, name) for name in ("__module__", "__doc__", "__qualname__")},
        f"{PREFIX}forwards": tuple((source, dict(names)) for source, names in forwards),
        f"{PREFIX}branches": tuple(branches),
        f"{PREFIX}shapes": dict(shapes),
    }
    return type(base.__name__, (base,), body)


def _compiled(base: type[nn.Module], source: str, names: Mapping[str, Any]) -> tuple[Forward, Forward]:
    """A forward, and the function that tells whether a call is of its form."""
    scope = dict(names)
    exec(compile(source, f"<forward of {base.__name__}, written by dagrow>", "exec"), scope)
    forward = _structured(scope["forward"], names[f"{PREFIX}structure"])
    return _graded(forward) if names[f"{PREFIX}switches"] else forward, scope[f"{PREFIX}fits"]


def _called(base: type[nn.Module], shapes: Shapes, forwards: Sequence[tuple[Forward, Forward]]) -> Forward:
    """Takes each call to the forward that was made for its form and its sizes."""
    first, _ = forwards[0]

    @functools.wraps(first)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> object:
        fitting = [run for run, fits in forwards if fits(self, *args, **kwargs)] if len(forwards) > 1 else [first]
        refused: OtherSizesError | None = None
        for run in fitting or [first]:  # the first says which argument does not fit
            try:
                return run(self, *args, **kwargs)
            except OtherSizesError as error:
                refused = error
        assert refused is not None
        _say_what_the_user_says(base, shapes, self, args, kwargs)
        raise refused

    return forward


def _say_what_the_user_says(
    base: type[nn.Module], shapes: Shapes, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    """Raises what the user's own forward raises by itself on a call, if it does.

    It runs on zeros of the sizes that are written into it.
    """
    with preserve_state(model), torch.no_grad():
        for name, shape in shapes.items():
            path, _, leaf = name.rpartition(".")
            module = model.get_submodule(path)
            for holder in (module._parameters, module._buffers):
                tensor = holder.get(leaf)
                if tensor is not None and tensor.shape != shape:
                    holder[leaf] = tensor.new_zeros(shape)  # type: ignore[assignment]
        try:
            base.forward(model, *args, **kwargs)
        except Exception as error:
            if is_raised_by_user(error):
                raise


def _structured(forward: Callable[..., Any], structure: object) -> Callable[..., Any]:
    """Puts outputs back into the containers that the user's forward returns, where they are no plain ones."""
    if is_plain(structure):
        return forward

    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> object:
        values = [value for _, value in leaves(forward(*args, **kwargs))]
        return mapped(lambda index: values[index], structure)

    return wrapped


def _graded(forward: Callable[..., object]) -> Callable[..., object]:
    """Leaves gradients switched as they were found, also when the forward fails."""

    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> object:
        with torch.set_grad_enabled(torch.is_grad_enabled()):
            return forward(*args, **kwargs)

    return wrapped


def _reduce(self: Any, protocol: object) -> tuple[object, ...]:
    forwards = [
        (source, {k: _ModuleName(v.__name__) if isinstance(v, ModuleType) else v for k, v in names.items()})
        for source, names in self._dagrow_forwards
    ]
    kind = own_class(self), forwards, self._dagrow_branches, self._dagrow_shapes
    return _rebuild, kind, self.__getstate__()


class _ModuleName(NamedTuple):
    """A Python module by its name, as it is pickled."""

    name: str


def _rebuild(
    base: type[nn.Module], forwards: Sequence[Written], branches: Sequence[PathRecord], shapes: Shapes
) -> nn.Module:
    imported = [
        (source, {k: importlib.import_module(v.name) if isinstance(v, _ModuleName) else v for k, v in names.items()})
        for source, names in forwards
    ]
    kind = subclass(base, imported, branches, shapes)
    return kind.__new__(kind)
