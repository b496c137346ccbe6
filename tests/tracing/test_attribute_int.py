"""Whole numbers of modules that forward computes with, and a process that tracing leaves alone."""

import logging
import math
import threading
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


def test_a_size_beside_a_logarithm_is_noted() -> None:
    program = traced(lambda self, x: x * math.log(x.shape[1]))
    assert program.baked_size == "x.shape is read next to math: a number computed from it is baked in"
    assert any("next to math" in note for note in program.specialisations)
    assert traced(lambda self, x: x.view(x.shape) * math.log(2)).baked_size is None


def process() -> tuple[object, ...]:
    """What of the process a trace might be tempted to replace."""
    functions = [getattr(math, name) for name in ("log", "log2", "log10", "isqrt")]
    stance = torch._dynamo.eval_frame._stance.stance
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    return *functions, torch.backends.mha.get_fastpath_enabled(), stance, logger.disabled, len(logger.filters)


def test_two_traces_at_once_leave_the_process_alone() -> None:
    """The first begins before the second and ends before it."""
    before, inside = process(), threading.Barrier(2, timeout=60)
    seen: list[tuple[object, ...]] = []
    programs: dict[str, Program] = {}
    first_is_done = threading.Event()

    def waiting(name: str) -> Callable[[nn.Module, Tensor], Tensor]:
        def forward(self: nn.Module, x: Tensor) -> Tensor:
            if not self.met:
                self.met.append(True)
                inside.wait()
                if name == "first":
                    inside.wait()
                else:
                    seen.append(process())
                    inside.wait()
                    assert first_is_done.wait(60)
            return x.view(-1, self.width) / math.log(self.width) + (1 if name == "first" else 2)

        return forward

    def trace(name: str) -> None:
        model = type("Model", (nn.Module,), {"forward": waiting(name)})()
        model.width, model.met = 4, []
        programs[name] = record(model, torch.randn(3, 4), verified=False)
        if name == "first":
            first_is_done.set()

    threads = [threading.Thread(target=trace, args=(name,)) for name in ("first", "second")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (during,) = seen
    assert during[:5] == before[:5]
    assert process() == before
    x = torch.randn(5, 4)
    for name, number in (("first", 1), ("second", 2)):
        assert programs[name].computed_attributes == {("", "width", None)}
        assert torch.equal(programs[name].run(x), x / math.log(4) + number)
