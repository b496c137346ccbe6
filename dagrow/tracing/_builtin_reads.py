"""Built-in functions that read a whole number without calling a method of it.

No subclass of int is told by ``range(n)`` or ``math.log(n)`` that it was read. While a forward is written down, the
functions of ``math`` that read so are others, which tell a traced number and compute the same, for all threads; the
last trace that ends puts back what was there. Functions that code has under a name of its own, ``range`` or
``from math import log``, cannot be told: code that names them is looked at instead.
"""

import dis
import inspect
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from types import CodeType
from typing import Any

from torch import nn

_LOADS = ("LOAD_GLOBAL", "LOAD_NAME")
_MATH = ("comb", "factorial", "gcd", "isqrt", "lcm", "log", "log10", "log2", "perm")


class MathTells:
    """Inside, functions of ``math`` tell the numbers of some types that they are read. For many traces at once.

    Args:
        types: subclasses of int that note when a float is made of them.
    """

    def __init__(self, *types: type[int]) -> None:
        self.types = types
        self._lock, self._traces = threading.Lock(), 0

    def __enter__(self) -> None:
        with self._lock:
            self._traces += 1
            if self._traces == 1:
                for name, function in _FUNCTIONS.items():
                    setattr(math, name, self._telling(function))

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._traces -= 1
            if not self._traces:
                for name, function in _FUNCTIONS.items():
                    setattr(math, name, function)

    def _telling(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def telling(*numbers: Any) -> Any:
            return function(*(int(float(n)) if isinstance(n, self.types) else n for n in numbers))

        return telling


def attributes_read(kind: type[nn.Module]) -> frozenset[str]:
    """Names in the methods of a class that name a function which reads numbers untold."""
    bases = [base for base in kind.__mro__ if not base.__module__.startswith("torch.")]
    functions = (value for base in bases for name, value in vars(base).items() if name != "__init__")
    methods = [function for function in functions if inspect.isfunction(function)]
    names = {method: _names(method.__code__) for method in methods}
    reading = (m for m in methods if "range" in names[m] or names_math(m.__code__, m.__globals__))
    return frozenset().union(*map(names.__getitem__, reading))


def names_math(code: CodeType, scope: Mapping[str, object]) -> bool:
    """Whether code has a function of ``math`` under a name of its own.

    Args:
        code: of a function.
        scope: its globals.

    Returns:
        Whether it may hand numbers to ``math`` untold.
    """
    known = {name for name in code.co_names if id(scope.get(name)) in _IDS}  # perhaps as an attribute of another thing
    loads = (step.argval for step in (dis.get_instructions(code) if known else ()) if step.opname in _LOADS)
    return not known.isdisjoint(loads) or any(names_math(inner, scope) for inner in _inner(code))


def _names(code: CodeType) -> frozenset[str]:
    """Also of lambdas, comprehensions and functions written inside."""
    return frozenset(code.co_names).union(*map(_names, _inner(code)))


def _inner(code: CodeType) -> Iterator[CodeType]:
    return (constant for constant in code.co_consts if isinstance(constant, CodeType))


_FUNCTIONS: Mapping[str, Callable[..., Any]] = {name: getattr(math, name) for name in _MATH}
_IDS = {id(function) for function in _FUNCTIONS.values()}
