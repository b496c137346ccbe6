"""Whole numbers that modules have as attributes, alone or in lists, remembered while a forward pass is written down.

A size in a graph that came unchanged from such an attribute (a number of heads, a width) can be changed there, so
that the model's own forward goes on. An attribute that was computed with cannot: a scale may hang on it.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from dagrow._pytree import leaf_values
from dagrow.tracing._builtin_reads import MathTells, attributes_read
from dagrow.tracing._traced_int import SIGNS, Comparison, TracedInt, tried

AttributePath = tuple[str, str, int | None]  #: a module, its attribute, and where in it if it is a list or tuple


@dataclass(frozen=True)
class Trial:
    """Numbers that a forward compares as if they were others.

    Attributes:
        sizes: node of the graph -> its number, or its shape, in a wider network.
        attributes: of modules, and what they are there.
    """

    sizes: Mapping[str, Any] = field(default_factory=dict)
    attributes: Mapping[AttributePath, int] = field(default_factory=dict)


UNTRIED = Trial()


class AttributeUses:
    """What forward did with the whole numbers among the attributes of modules.

    Attributes:
        computed: attributes whose value was computed with or compared.
        live: whether the user's code runs now.
        comparisons: those of attributes with plain numbers.
        trial: what attributes are where others are tried out, with which the user's code compares.
    """

    def __init__(self, trial: Trial = UNTRIED) -> None:
        self.computed: set[AttributePath] = set()
        self.comparisons: list[Comparison] = []
        self.trial = trial.attributes
        self.live: Callable[[], bool] = lambda: True


class AttributeInt(int):
    """A number that remembers which attribute of which module it is, until something is computed with it."""

    path: AttributePath
    uses: AttributeUses

    def __new__(cls, value: int, path: AttributePath, uses: AttributeUses) -> "AttributeInt":
        self = super().__new__(cls, value)
        self.path, self.uses = path, uses
        return self

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        return int, (int.__int__(self),)

    @property
    def tried(self) -> int:
        """What it is where another number is tried out."""
        return self.uses.trial.get(self.path, int.__int__(self))

    __hash__ = int.__hash__


def _marking(name: str) -> Callable[..., Any]:
    """A method of whole numbers that marks the attribute as computed with."""

    def method(self: AttributeInt, *others: Any) -> Any:
        if any(isinstance(other, TracedInt) for other in others):
            return NotImplemented  # arithmetic on sizes is recorded, with this number in it
        if not self.uses.live():
            return getattr(int, name)(self, *others)
        self.uses.computed.add(self.path)
        result = getattr(int, name)(self.tried, *map(tried, others))
        if name in SIGNS and isinstance(result, bool):
            self.uses.comparisons.append(Comparison(self, SIGNS[name], others[0], result))
        return result

    return method


for _name in (
    "add sub mul floordiv truediv mod divmod pow lshift rshift and or xor radd rsub rmul rfloordiv rtruediv rmod "
    "rdivmod rpow rlshift rrshift rand ror rxor neg pos abs invert bool int float trunc round ceil floor eq ne lt le "
    "gt ge str repr format"
).split():
    setattr(AttributeInt, f"__{_name}__", _marking(f"__{_name}__"))


_MATH_TELLS = MathTells(TracedInt, AttributeInt)


@contextlib.contextmanager
def attribute_ints(model: nn.Module, trial: Trial = UNTRIED) -> Iterator[AttributeUses]:
    """Inside, whole numbers among the attributes of modules are :class:`AttributeInt`.

    Those that the code of a module may give to what reads them untold, such as ``range``, count as computed with.

    Args:
        model: whose modules have such attributes until the end.
        trial: what some of them are tried out as.

    Yields:
        What forward does with them.
    """
    uses, replaced = AttributeUses(trial), []
    read = {kind: attributes_read(kind) for kind in {type(module) for module in model.modules()}}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            remembering = _remembering(value, path, name, uses)
            if remembering is not None:
                if name in read[type(module)]:
                    uses.computed |= {number.path for number in leaf_values(remembering)}
                replaced.append((module, name, value, remembering))
                vars(module)[name] = remembering
    try:
        with _MATH_TELLS:
            yield uses
    finally:
        uses.live = lambda: False
        for module, name, value, remembering in replaced:
            if vars(module).get(name) is remembering:
                vars(module)[name] = value


def _remembering(value: Any, path: str, name: str, uses: AttributeUses) -> object:
    """The attribute with its whole numbers as AttributeInt, or None if it holds no such."""
    if type(value) is int:
        return AttributeInt(value, (path, name, None), uses)
    if type(value) in (list, tuple) and value and all(type(item) is int for item in value):
        return type(value)(AttributeInt(item, (path, name, i), uses) for i, item in enumerate(value))
    return None
