"""Whole numbers of modules that forward computes with, and a process that tracing leaves alone."""

import math
from collections.abc import Callable
from math import log2 as binary_logarithm

import pytest
import torch
from torch import Tensor, nn

from dagrow.tracing import Program, record


def scale(width: int) -> float:
    return 1 / math.log(width)


def constant(self: nn.Module, x: Tensor) -> Tensor:
    return torch.log(x.exp()).view(-1, self.width).clamp(max=math.log(1 / 0.01))


def rooted(self: nn.Module, x: Tensor) -> Tensor:
    return x.view(-1, self.width) / math.isqrt(self.width)


def renamed(self: nn.Module, x: Tensor) -> Tensor:
    return x.view(-1, self.width) / binary_logarithm(self.width)


def helped(self: nn.Module, x: Tensor) -> Tensor:
    return x.view(-1, self.width) * scale(self.width)


def imported(self: nn.Module, x: Tensor) -> Tensor:
    import math as numbers

    width = self.width
    return x.view(-1, width) * numbers.log(width)


def nested(self: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([x.view(-1, self.width) * math.log(self.width) for _ in (0, 1)])


def divided(self: nn.Module, x: Tensor) -> Tensor:
    return x.view(-1, self.width) * (1 / self.width)


def traced(forward: Callable[[nn.Module, Tensor], Tensor], x: Tensor | None = None) -> Program:
    model = type("Model", (nn.Module,), {"forward": forward})()
    model.width = 4
    return record(model, torch.randn(3, 4) if x is None else x)


@pytest.mark.parametrize("forward", [rooted, renamed, helped, imported, nested, divided])
def test_a_number_that_forward_computes_with_is_marked(forward: Callable[[nn.Module, Tensor], Tensor]) -> None:
    program = traced(forward)
    assert program.computed_attributes == {("", "width", None)}
    assert type(program.model.width) is int


def test_a_number_that_is_a_size_alone_is_not_marked() -> None:
    program = traced(constant)
    assert not program.computed_attributes
    (node,) = program.attribute_uses["", "width", None]
    assert node.target == "view"


class Scale(nn.Module):
    def forward(self, x: Tensor, width: int) -> Tensor:
        return x * scale(width)


class Handed(nn.Module):
    """Numbers that reach ``math`` in another module, a method, and a function of a function."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.sub = 4, Scale()

    def scaled(self, width: int) -> float:
        return (lambda: scale(width))()

    def forward(self, x: Tensor) -> Tensor:
        x = self.sub(x.view(-1, self.width), self.width)
        return self.sub(x, x.shape[1]) * self.scaled(x.shape[1])


def test_numbers_are_told_wherever_math_reads_them() -> None:
    program = record(Handed(), torch.randn(3, 4))
    assert program.computed_attributes == {("", "width", None)}
    assert any("plain number" in note for note in program.specialisations)


def test_a_size_that_math_reads_is_noted() -> None:
    assert any("plain number" in note for note in traced(lambda self, x: x * math.log(x.shape[1])).specialisations)
    assert traced(lambda self, x: x * binary_logarithm(x.shape[1])).baked_size is not None
    assert not traced(lambda self, x: x.view(x.shape) * math.log(2)).specialisations
