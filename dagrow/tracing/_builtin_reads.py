"""Built-in functions that read a whole number without calling a method of it, and the code that calls them.

No subclass of int is told by ``range(n)`` or ``math.log(n)`` that it was read. So the code is looked at instead.
"""

import dis
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from types import CodeType, FunctionType

from torch import nn

_MATH = ("comb", "factorial", "gcd", "isqrt", "lcm", "log", "log10", "log2", "perm")
_FUNCTIONS = {id(getattr(math, name)) for name in _MATH}
_NOWHERE = (-1, -1)


def attributes_read(kind: type[nn.Module]) -> frozenset[str]:
    """Names in the methods of a class that count with ``range``, or that hand something to ``math``."""
    bases = [base for base in kind.__mro__ if not base.__module__.startswith("torch.")]
    functions = ((name, value) for base in bases for name, value in vars(base).items() if inspect.isfunction(value))
    unwrapped = ((name, inspect.unwrap(function)) for name, function in functions if name != "__init__")
    methods = [(name, method) for name, method in unwrapped if inspect.isfunction(method)]
    names = {method: _names(method.__code__) for _, method in methods}
    readers = {name for name, method in methods if calls_math(method.__code__, method.__globals__)}
    while callers := {name for name, method in methods if names[method] & readers} - readers:
        readers |= callers
    reading = (names[method] for name, method in methods if name in readers or "range" in names[method])
    return frozenset().union(*reading)


def calls_math(code: CodeType, scope: Mapping[str, object]) -> bool:
    """Whether code, or a function that it names, hands variables to ``math``.

    Args:
        code: of a function.
        scope: its globals.

    Returns:
        Whether numbers that it has may be read unseen.
    """
    values = (scope.get(name) for name in _names(code))
    helpers = [value for value in values if isinstance(value, FunctionType)]
    return _calls_math(code, scope) or any(_calls_math(helper.__code__, helper.__globals__) for helper in helpers)


def _calls_math(code: CodeType, scope: Mapping[str, object]) -> bool:
    if any(name in _MATH or id(scope.get(name)) in _FUNCTIONS for name in code.co_names):
        instructions = [step for step in dis.get_instructions(code) if step.opname != "LOAD_CONST"]
        if any(_hands_variables(load, instructions) for load in _loads(instructions, scope)):
            return True
    return any(_calls_math(inner, scope) for inner in _inner(code))


def _loads(instructions: Sequence[dis.Instruction], scope: Mapping[str, object]) -> Iterator[dis.Instruction]:
    """Instructions that load one of the functions."""
    for before, load in pairwise(instructions):
        if load.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            reads = load.argval in _MATH and scope.get(str(before.argval)) is math
        elif load.opname == "IMPORT_NAME":
            reads = load.argval == "math"
        else:
            reads = load.opname in ("LOAD_GLOBAL", "LOAD_NAME") and id(scope.get(load.argval)) in _FUNCTIONS
        if reads:
            yield load


def _hands_variables(load: dis.Instruction, instructions: Sequence[dis.Instruction]) -> bool:
    """Whether a function is called with variables, by what is loaded within the text of its call."""
    start, end = _text(load)
    calls = [_text(step) for step in instructions if step.opname.startswith("CALL")]
    stops = [stop for begin, stop in calls if begin == start and stop > end]
    loads = (_text(step) for step in instructions if step.opname.startswith("LOAD_"))
    return not stops or start == _NOWHERE or any(end < begin and stop <= min(stops) for begin, stop in loads)


def _text(instruction: dis.Instruction) -> tuple[tuple[int, int], tuple[int, int]]:
    """Where the text of an instruction begins and ends."""
    line, end_line, column, end_column = instruction.positions or (None,) * 4
    if line is None or end_line is None or column is None or end_column is None:
        return _NOWHERE, _NOWHERE
    return (line, column), (end_line, end_column)


def _inner(code: CodeType) -> Iterator[CodeType]:
    """Lambdas, comprehensions and functions written inside of code."""
    return (constant for constant in code.co_consts if isinstance(constant, CodeType))


def _names(code: CodeType) -> frozenset[str]:
    return frozenset(code.co_names).union(*map(_names, _inner(code)))
