"""Code that reads a whole number without a method of it being called."""

import math
from collections.abc import Callable
from math import log2 as binary_logarithm
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dagrow.tracing._builtin_reads import attributes_read, calls_math


def scaled(width: int) -> float:
    return 1 / math.log(width)


def by_attribute(width: int) -> float:
    return math.isqrt(width)


def by_another_name(width: int) -> float:
    return binary_logarithm(width)


def by_a_helper(width: int) -> float:
    return scaled(width)


def by_an_import(width: int) -> float:
    import math as numbers

    return numbers.log(width)


def in_a_lambda(width: int) -> Callable[[], float]:
    return lambda: math.comb(width, 2)


def of_a_constant(width: int) -> float:
    return width * math.log(2)


def of_a_float(width: int) -> float:
    return width * math.pi + math.sin(width)


def of_torch(width: Tensor) -> Tensor:
    return torch.log(width)


@pytest.mark.parametrize(
    "function",
    [by_attribute, by_another_name, by_a_helper, by_an_import, in_a_lambda, scaled],
    ids=lambda f: f.__name__,
)
def test_variables_that_are_handed_to_math(function: Any) -> None:
    assert calls_math(function.__code__, function.__globals__)


@pytest.mark.parametrize("function", [of_a_constant, of_a_float, of_torch], ids=lambda f: f.__name__)
def test_numbers_that_are_no_variables_and_functions_that_tell_are_left_out(function: Any) -> None:
    assert not calls_math(function.__code__, function.__globals__)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.width, self.depth, self.heads, self.size, self.made = 4, 3, 2, 2, math.log(7)

    def scale(self) -> float:
        return 1 / math.log(self.width)

    def by_head(self) -> float:
        return self.scale() / self.heads

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.depth):
            x = x * self.scale()
        return x

    def reshaped(self, x: Tensor) -> Tensor:
        return x.view(-1, self.size)


def test_attributes_of_methods_that_count_or_call_math_or_one_that_does() -> None:
    names = attributes_read(Net)
    assert {"width", "depth", "heads"} <= names
    assert not {"size", "made"} & names
