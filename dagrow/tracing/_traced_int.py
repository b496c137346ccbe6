"""Sizes that remember where in a graph they come from."""

import operator
from collections.abc import Callable
from typing import Any, Protocol

from torch import fx

_ARITHMETIC = {"add": "+", "sub": "-", "mul": "*", "floordiv": "//", "mod": "%"}
_COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_BAKED = (
    "int float trunc round ceil floor abs truediv rtruediv divmod rdivmod pow rpow and or xor lshift rshift".split()
)
COMPARISONS = {sign: getattr(operator, name) for name, sign in _COMPARISONS.items()}


class Writer(Protocol):
    """What a size tells that it was used."""

    live: Callable[[], bool]  #: whether the user's code runs now

    def note(self, text: str) -> None:
        """Something that the graph cannot follow."""

    def computed(self, function: Callable[..., int], operands: tuple[Any, ...], value: int) -> "TracedInt":
        """Arithmetic on sizes."""


def formula(node: object, depth: int = 4) -> str:
    """A size as it was computed, for messages; of long computations the last steps."""
    if not isinstance(node, fx.Node):
        return int.__repr__(node) if isinstance(node, int) else str(node)
    if not depth:
        return node.name
    operands = [formula(arg, depth - 1) for arg in node.args]
    if node.target is operator.getitem:
        return f"{operands[0]}[{operands[1]}]"
    if node.target is getattr:
        return f"{operands[0]}.{operands[1]}"
    if node.op == "call_method":
        return f"{operands[0]}.{node.target}({', '.join(operands[1:])})"
    sign = _ARITHMETIC.get(getattr(node.target, "__name__", ""))
    return f"({operands[0]} {sign} {operands[1]})" if sign and len(operands) == 2 else node.name


def mark_baked(size: object) -> None:
    """Something was read from a size that the graph does not follow."""
    if isinstance(size, fx.Node):
        size.meta["baked"] = True


def guard(left: fx.Node, sign: str, right: object, holds: object) -> None:
    """The graph holds only where a comparison of sizes comes out as it did."""
    if not isinstance(holds, bool):
        return
    for size in (left, right):
        mark_baked(size)
    left.meta.setdefault("guards", {})[sign, int.__int__(right) if isinstance(right, int) else right] = holds


def _arithmetic(function: Callable[..., int], swapped: bool = False) -> Callable[..., Any]:
    def method(self: "TracedInt", *others: Any) -> Any:
        if not all(isinstance(other, int) for other in others):
            self.bake(*others)
            return NotImplemented
        operands = (*others, self) if swapped else (self, *others)
        value = function(*(int.__int__(o) for o in operands))
        return self.writer.computed(function, operands, value) if self.writer.live() else value

    return method


def _guarding(name: str, sign: str) -> Callable[..., Any]:
    def method(self: "TracedInt", *others: Any) -> Any:
        result = getattr(int, name)(self, *others)
        other = others[0] if others else 0
        if isinstance(other, (int, float)) and self.writer.live():
            right = other.node if isinstance(other, TracedInt) else other
            if right is not self.node:
                guard(self.node, sign, right, result)
                self.writer.note(f"{formula(self.node)} {sign} {formula(right)} is {result}")
        return result

    return method


def _baking(name: str) -> Callable[..., Any]:
    def method(self: "TracedInt", *others: Any) -> Any:
        self.bake(*others)
        return getattr(int, name)(self, *others)

    return method


class TracedInt(int):
    """A size that remembers its node: whole-number arithmetic on it is recorded, comparisons become guards.

    What leaves the whole numbers (`int(n)`, `float(n)`, `n / 2`, `n ** 2`) is baked in and noted. It hashes
    by identity, not by value: a cache keyed by size must miss, or numbers of an earlier call would get in.
    """

    node: fx.Node
    writer: Writer

    def __new__(cls, value: int, node: fx.Node, writer: Writer) -> "TracedInt":
        self = super().__new__(cls, value)
        self.node, self.writer = node, writer
        return self

    def bake(self, *others: object) -> None:
        if self.writer.live() and all(isinstance(other, (int, float)) for other in others):
            guard(self.node, "==", int.__int__(self), True)
            self.writer.note(f"{formula(self.node)} = {int.__repr__(self)} is baked in as a plain number")

    __hash__ = object.__hash__
    __neg__ = _arithmetic(operator.neg)
    __bool__ = _guarding("__bool__", "!=")


for _name in _ARITHMETIC:
    setattr(TracedInt, f"__{_name}__", _arithmetic(getattr(operator, _name)))
    setattr(TracedInt, f"__r{_name}__", _arithmetic(getattr(operator, _name), swapped=True))
for _name, _sign in _COMPARISONS.items():
    setattr(TracedInt, f"__{_name}__", _guarding(f"__{_name}__", _sign))
for _name in _BAKED:
    setattr(TracedInt, f"__{_name}__", _baking(f"__{_name}__"))
