"""Names that the code of a model mentions."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dagrow
from dagrow.graph._mentions import mentioned


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 8), nn.Linear(8, 2)
        self.idle = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        return self.two(self.one(x))


class Encoding(Base):
    def encode(self, x: Tensor) -> Any:
        return self.idle(self.one(x))


class Lazy(Base):
    @property
    def codes(self) -> Any:
        return self.idle.weight


class Looping(Base):
    def parts(self) -> Any:
        return [getattr(self, name) for name in self.__dict__]


def _apply(m: Any, x: Tensor) -> Any:
    return m.idle(m.one(x))


class Calling(Base):
    def other(self, x: Tensor) -> Any:
        return _apply(self, x)


class Overriding(Encoding):
    def encode(self, x: Tensor) -> Any:
        return self.one(x)


class Super(Overriding):
    def encode(self, x: Tensor) -> Any:
        return super().encode(x)


class Inside(Base):
    def other(self, x: Tensor) -> Any:
        return [part for part in (lambda: self.idle(self.one(x)),)]


@pytest.mark.parametrize(
    ("kind", "is_mentioned"),
    [
        (Base, False),
        (Encoding, True),
        (Lazy, True),
        (Looping, True),
        (Calling, True),
        (Overriding, False),
        (Super, True),
        (Inside, True),
    ],
)
def test_what_a_model_may_run_by_another_method_freezes_the_axis(kind: type[Base], is_mentioned: bool) -> None:
    model = kind()
    assert ("idle" in mentioned(model)) is is_mentioned
    assert dagrow.trace(model, torch.randn(2, 3)).axis("one").growable is not is_mentioned
