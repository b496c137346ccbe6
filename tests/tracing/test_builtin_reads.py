"""Built-in functions that read a whole number without a method of it being called."""

import math
import threading
from collections.abc import Callable
from math import log2 as binary_logarithm
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dagrow.tracing._builtin_reads import MathTells, attributes_read, names_math


class Told(int):
    """A number that notes that a float was made of it."""

    def __float__(self) -> float:
        told.append(int.__int__(self))
        return float(int.__int__(self))


told: list[int] = []


def by_another_name(width: int) -> float:
    return binary_logarithm(width)


def in_a_lambda(width: int) -> Callable[[], float]:
    return lambda: binary_logarithm(width)


def by_attribute(width: int) -> float:
    return math.isqrt(width)


def of_torch(width: Tensor) -> Tensor:
    return torch.log(width)


@pytest.mark.parametrize("name", ["log", "log2", "log10", "isqrt", "factorial", "gcd", "lcm", "comb", "perm"])
def test_functions_of_math_tell_and_compute_the_same(name: str) -> None:
    original, others = getattr(math, name), (2,) if name in ("comb", "gcd", "lcm", "perm", "log") else ()
    told.clear()
    with MathTells(Told):
        assert getattr(math, name)(Told(6), *others) == original(6, *others)
        assert told == [6]
        assert getattr(math, name)(6, *others) == original(6, *others)
        assert told == [6]
    assert getattr(math, name) is original


def test_the_last_that_ends_puts_back_what_was_there() -> None:
    tells, original, inside, failed = MathTells(Told), math.log, threading.Barrier(2, timeout=60), list[object]()

    def run(first: bool) -> None:
        with tells:
            inside.wait()
            if first:
                return
            other.join(60)
            told.clear()
            if math.log(Told(3)) != original(3) or told != [3]:
                failed.append("the first that ended put it back")

    other = threading.Thread(target=run, args=(True,))
    last = threading.Thread(target=run, args=(False,))
    for thread in (other, last):
        thread.start()
    for thread in (other, last):
        thread.join(60)
    assert not failed
    assert math.log is original


@pytest.mark.parametrize("function", [by_another_name, in_a_lambda], ids=lambda f: f.__name__)
def test_functions_under_a_name_of_their_own_are_seen_in_the_code(function: Any) -> None:
    assert names_math(function.__code__, function.__globals__)


@pytest.mark.parametrize("function", [by_attribute, of_torch], ids=lambda f: f.__name__)
def test_functions_that_tell_are_not(function: Any) -> None:
    assert not names_math(function.__code__, function.__globals__)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.width, self.depth, self.size, self.made = 4, 3, 2, math.log(7)

    def scale(self) -> float:
        return 1 / binary_logarithm(self.width)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.depth):
            x = x * self.scale()
        return x

    def reshaped(self, x: Tensor) -> Tensor:
        return x.view(-1, self.size)


def test_attributes_beside_functions_that_read_untold() -> None:
    names = attributes_read(Net)
    assert {"width", "depth"} <= names
    assert not {"size", "made"} & names
