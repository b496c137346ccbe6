"""A process that tracing leaves alone."""

import logging
import math
import threading
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dagrow.tracing import Program, record


def process() -> tuple[object, ...]:
    """What of the process a trace might be tempted to replace."""
    functions = [getattr(math, name)(9) for name in ("log", "log2", "log10", "isqrt")]
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
