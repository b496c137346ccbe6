"""Names that the code of a model mentions. What no code of a model mentions, no call of it runs."""

import contextlib
import inspect
from collections.abc import Iterator
from functools import cached_property, partialmethod
from types import CodeType, FunctionType

from torch import nn

#: with one of these code reaches parts of a module without their names
_BY_OTHER_NAMES = frozenset(
    "getattr __getattr__ children named_children get_submodule get_parameter _modules _parameters __dict__ vars".split()
)
_BUILDING = frozenset("__init__ __repr__ extra_repr reset_parameters".split())


def mentioned(model: nn.Module) -> frozenset[str]:
    """What the code of a model's classes may call parts of it by.

    Args:
        model: any module.

    Returns:
        The names in methods of its classes and of the classes of its submodules, in functions that these have as
        attributes or call, but not in what builds them; all parts of modules whose code looks parts up otherwise.
    """
    names: set[str] = set()
    of_class = {kind: _names_in(_methods(kind)) for kind in {type(module) for module in model.modules()}}
    for module in model.modules():
        own = of_class[type(module)] | _names_in(value for value in vars(module).values() if inspect.isfunction(value))
        names |= own
        if own & _BY_OTHER_NAMES:
            names.update(module._modules, module._parameters, module._buffers)
    return frozenset(names)


def _methods(kind: type[nn.Module]) -> Iterator[FunctionType]:
    """The user's own methods of a class that its objects call; also those that are overridden, where some call them."""
    bases = [base for base in kind.__mro__ if not f"{base.__module__}.".startswith(("torch.", "builtins."))]
    found = [(name, value) for base in bases for name, value in vars(base).items() if name not in _BUILDING]
    functions = [(name, function) for name, value in found for function in _functions_of(value)]
    calls_super = any("super" in function.__code__.co_names for _, function in functions)
    for name, function in functions:
        if calls_super or function in _functions_of(inspect.getattr_static(kind, name)):
            yield function


def _functions_of(value: object) -> list[FunctionType]:
    """The functions of a method or a property."""
    function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
    function = function.func if isinstance(function, (cached_property, partialmethod)) else function
    function = inspect.unwrap(function) if callable(function) else function
    return [function] if isinstance(function, FunctionType) else []


def _names_in(functions: Iterator[FunctionType]) -> set[str]:
    """The names in functions, and in those of the user's that they call."""
    names: set[str] = set()
    seen: set[FunctionType] = set()
    waiting = list(functions)
    while waiting:
        function = waiting.pop()
        if function in seen:
            continue
        seen.add(function)
        own = set(_names(function.__code__))
        names |= own
        called = [function.__globals__.get(name) for name in own]
        called += _enclosed(function)
        waiting += [
            each
            for each in called
            if isinstance(each, FunctionType) and not f"{each.__module__}.".startswith(("torch.", "dagrow."))
        ]
    return names


def _enclosed(function: FunctionType) -> Iterator[object]:
    """What a function finds in those that it was written in."""
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # nothing was put there yet
            yield cell.cell_contents


def _names(code: CodeType) -> Iterator[str]:
    """Also of lambdas, comprehensions and functions written inside."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
