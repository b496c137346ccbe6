"""Sizes that remember where in a graph they come from."""

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import fx

_ARITHMETIC = {"add": "+", "sub": "-", "mul": "*", "floordiv": "//", "mod": "%"}
_COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_BAKED = (
    "int float trunc round ceil floor abs truediv rtruediv divmod rdivmod pow rpow and or xor lshift rshift".split()
)
SIGNS = {f"__{name}__": sign for name, sign in _COMPARISONS.items()}
COMPARISONS = {sign: getattr(operator, name) for name, sign in _COMPARISONS.items()}


class Writer(Protocol):
    """What a size tells that it was used."""

    live: Callable[[], bool]  #: whether the user's code runs now
    trial: Mapping[str, Any]  #: node -> another size or shape, with which the user's code compares; empty for none

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


@dataclass(frozen=True, eq=False)
class Comparison:
    """A comparison of sizes in a forward. Both sides are nodes, numbers that modules state, or plain numbers."""

    left: Any
    sign: str
    right: Any
    holds: bool

    def comes_out_otherwise(self, value: Callable[[Any], Any]) -> bool:
        """Whether it does with other values of its sides."""
        sides = value(self.left), value(self.right)
        is_known = all(isinstance(side, (int, float)) for side in sides)
        return is_known and bool(COMPARISONS[self.sign](*sides)) is not self.holds

    @property
    def nodes(self) -> Iterator[fx.Node]:
        """Those of its sides that are nodes."""
        return (side for side in (self.left, self.right) if isinstance(side, fx.Node))


def guard(left: fx.Node, sign: str, right: object, holds: object) -> None:
    """The graph holds only where a comparison of sizes comes out as it did."""
    if not isinstance(holds, bool):
        return
    for size in (left, right):
        mark_baked(size)
    left.meta.setdefault("guards", {})[sign, int.__int__(right) if isinstance(right, int) else right] = holds
    left.meta.setdefault("comparisons", []).append(Comparison(left, sign, right, holds))


def _tried(node: fx.Node, trial: Mapping[str, Any], size: int) -> int:
    """A size where others are tried out, also where it is read again or computed anew."""
    if node.name in trial:
        return int(trial[node.name])
    source = node.args[0] if node.args else None
    if isinstance(source, fx.Node) and len(node.args) > 1 and isinstance(node.args[1], int):
        tensor = source.args[0] if node.target is operator.getitem and source.args else source
        shape = trial.get(tensor.name) if isinstance(tensor, fx.Node) else None
        if shape is not None and (tensor is not source or node.target == "size"):
            return int(shape[node.args[1]])
    return size


def tried(value: Any) -> Any:
    """A number as it is tried out, where one is."""
    return getattr(value, "tried", value)


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
        if self.writer.trial and self.writer.live():
            return getattr(int, name)(self.tried, *map(tried, others))
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

    @property
    def tried(self) -> int:
        """What it is where another size is tried out."""
        return _tried(self.node, self.writer.trial, int.__int__(self))

    def __repr__(self) -> str:
        return int.__repr__(self.tried)

    def __format__(self, spec: str) -> str:
        return int.__format__(self.tried, spec)

    def bake(self, *others: object) -> None:
        if self.writer.live() and all(isinstance(other, (int, float)) for other in others):
            guard(self.node, "==", int.__int__(self), True)
            self.writer.note(f"{formula(self.node)} = {int.__repr__(self)} is baked in as a plain number")

    __hash__ = object.__hash__
    __str__ = __repr__
    __neg__ = _arithmetic(operator.neg)
    __bool__ = _guarding("__bool__", "!=")


for _name in _ARITHMETIC:
    setattr(TracedInt, f"__{_name}__", _arithmetic(getattr(operator, _name)))
    setattr(TracedInt, f"__r{_name}__", _arithmetic(getattr(operator, _name), swapped=True))
for _name, _sign in _COMPARISONS.items():
    setattr(TracedInt, f"__{_name}__", _guarding(f"__{_name}__", _sign))
for _name in _BAKED:
    setattr(TracedInt, f"__{_name}__", _baking(f"__{_name}__"))
