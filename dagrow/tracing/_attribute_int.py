"""Whole numbers that modules state as attributes, alone or in lists, remembered while a forward pass is written down.

A size in a graph that came unchanged from such an attribute (a number of heads, a width) can be changed there, so
that the model's own forward goes on. An attribute that was computed with cannot: a scale may hang on it.
"""

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from dagrow._pytree import leaf_values
from dagrow.tracing._traced_int import TracedInt

AttributePath = tuple[str, str, int | None]  #: a module, its attribute, and where in it if it is a list or tuple


class AttributeUses:
    """What forward did with the numbers that modules state.

    Attributes:
        computed: places whose value was computed with or compared.
        live: whether the user's code runs now.
    """

    def __init__(self) -> None:
        self.computed: set[AttributePath] = set()
        self.live: Callable[[], bool] = lambda: True


class AttributeInt(int):
    """A number that remembers which attribute of which module it is, until something is computed with it."""

    place: AttributePath
    uses: AttributeUses

    def __new__(cls, value: int, place: AttributePath, uses: AttributeUses) -> "AttributeInt":
        self = super().__new__(cls, value)
        self.place, self.uses = place, uses
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return int, (int.__int__(self),)

    __hash__ = int.__hash__


def _noticed(name: str) -> Callable[..., Any]:
    def method(self: AttributeInt, *others: Any) -> Any:
        if any(isinstance(other, TracedInt) for other in others):
            return NotImplemented  # arithmetic on sizes is recorded, with this number in it
        if self.uses.live():
            self.uses.computed.add(self.place)
        return getattr(int, name)(self, *others)

    return method


for _name in (
    "add sub mul floordiv truediv mod divmod pow lshift rshift and or xor radd rsub rmul rfloordiv rtruediv rmod "
    "rdivmod rpow rlshift rrshift rand ror rxor neg pos abs invert bool int float trunc round ceil floor eq ne lt le "
    "gt ge str repr format"
).split():
    setattr(AttributeInt, f"__{_name}__", _noticed(f"__{_name}__"))


@contextlib.contextmanager
def attribute_ints(model: nn.Module) -> Iterator[AttributeUses]:
    """Inside, whole numbers among the attributes of modules are :class:`StatedInt`."""
    uses, found = AttributeUses(), []
    counted = {kind: _counted(kind) for kind in {type(module) for module in model.modules()}}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if type(value) not in (int, list, tuple):
                continue
            noted = _noted(value, path, name, uses)
            if noted is not None:
                if name in counted[type(module)]:
                    uses.computed |= {number.place for number in leaf_values(noted)}
                found.append((module, name, value, noted))
                vars(module)[name] = noted
    try:
        with _math_telling():
            yield uses
    finally:
        uses.live = lambda: False
        for module, name, value, noted in found:
            if vars(module).get(name) is noted:
                vars(module)[name] = value


@contextlib.contextmanager
def _math_telling() -> Iterator[None]:
    """Inside, functions of ``math`` that read whole numbers below Python tell that they did."""
    before = {name: getattr(math, name) for name in ("log", "log2", "log10", "isqrt")}

    def telling(function: Callable[..., Any]) -> Callable[..., Any]:
        def told(*given: Any) -> Any:
            return function(*(int(float(x)) if isinstance(x, (TracedInt, AttributeInt)) else x for x in given))

        return told

    for name, function in before.items():
        setattr(math, name, telling(function))
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(math, name, function)


def _counted(kind: type[nn.Module]) -> frozenset[str]:
    """Names that a class uses next to ``range``, which does not tell what it counts to."""
    codes = [
        function.__code__
        for base in kind.__mro__
        if not base.__module__.startswith("torch.")
        for name, function in vars(base).items()
        if inspect.isfunction(function) and name != "__init__"
    ]
    return frozenset(name for code in codes if "range" in code.co_names for name in code.co_names)


def _noted(value: Any, path: str, name: str, uses: AttributeUses) -> Any:
    """The attribute with its whole numbers noted, or None if it holds no such."""
    if type(value) is int:
        return AttributeInt(value, (path, name, None), uses)
    if type(value) in (list, tuple) and value and all(type(item) is int for item in value):
        return type(value)(AttributeInt(item, (path, name, i), uses) for i, item in enumerate(value))
    return None
