"""What is put back, and when. That an interrupt at any call leaves nothing changed is in test_interrupts.py."""

import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.nn.modules.module import _global_forward_pre_hooks

import dagrow
from dagrow import AddNeurons, MoveWeights
from dagrow._model_state import ModelState, all_or_nothing, preserve_state, restoring


def test_what_does_not_end_is_put_back_and_an_interrupted_restore_runs_again() -> None:
    restored: list[int] = []

    def restore() -> None:
        restored.append(1)
        if len(restored) == 1:
            raise KeyboardInterrupt

    with all_or_nothing(restore):
        pass
    assert not restored
    with pytest.raises(KeyboardInterrupt), all_or_nothing(restore):
        raise ValueError
    assert len(restored) == 2
    with restoring(restore):
        pass
    assert len(restored) == 3


def test_a_weight_that_is_written_past_its_version_is_noticed() -> None:
    model, seen = nn.Linear(2, 2), []
    found, before = ModelState(model, weights=True), model.weight.detach().clone()

    def work() -> int:
        with found.kept():
            model.weight.data.mul_(2)
        seen.append(model.weight.detach().clone())
        return len(seen)

    assert found.trusted(work) == 2
    assert torch.equal(seen[0], 2 * before)
    assert torch.equal(seen[1], before)
    assert torch.equal(model.weight, before)


class Metric(nn.Module):
    """Counts in a number, a list and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.total, self.seen = 0, list[int]()
        self.register_buffer("sum", torch.zeros(()))

    def forward(self, output: Tensor) -> Tensor:
        self.total += 1
        self.seen.append(self.total)
        self.sum += output.detach().sum()
        return output


class Beside:
    """A model, and what its steps run beside it."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
        self.heads = [nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2)).train() for _ in range(2)]
        self.teacher, self.metric = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2)), Metric()
        x = torch.randn(40, 4)
        self.batches = [(x[:20], x[:20, :2].sin(), 0), (x[20:], x[20:, :2].sin(), 1)]
        self.step(self.model, self.batches[0]).backward()
        self.dag = dagrow.trace(self.model, x[:2])

    def step(self, model: nn.Module, batch: Any) -> Tensor:
        """Each batch has a head of its own."""
        x, y, task = batch
        output = self.metric(self.heads[task](model(x)))
        return mse_loss(output, y) + mse_loss(output, self.teacher(x).detach())

    def state(self) -> list[Any]:
        modules = [self.model, *self.heads, self.teacher, self.metric]
        tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
        grads = [(p.grad, None if p.grad is None else p.grad.clone()) for m in modules for p in m.parameters()]
        modes = [part.training for module in modules for part in module.modules()]
        return [*(t.detach().clone() for t in tensors), grads, modes, self.metric.total, list(self.metric.seen)]


VERBS: dict[str, Callable[[Beside], Any]] = {
    "bottlenecks": lambda found: dagrow.bottlenecks(found.dag, found.batches, step=found.step),
    "propose": lambda found: dagrow.propose(found.dag, found.batches, step=found.step),
    "grow": lambda found: dagrow.grow(found.dag, found.batches, step=found.step, operators=[MoveWeights()]).undo(),
    "loss": lambda found: dagrow.propose(found.dag, found.batches, step=found.step, operators=[AddNeurons(k=2)])[
        0
    ].loss(0.1),
}


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("verb", VERBS)
def test_what_a_step_runs_beside_the_model_is_left_as_it_was_found(verb: str, mode: str) -> None:
    found = Beside()
    for head in found.heads:
        head.train(mode == "train")
    before = found.state()
    VERBS[verb](found)
    assert str(found.state()) == str(before)
    assert all(a[0] is b[0] for a, b in zip(found.state()[-4], before[-4], strict=True))
    assert not _global_forward_pre_hooks


def test_a_loss_that_is_a_module_is_left_as_it_was_found() -> None:
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("centre", torch.zeros(2))

        def forward(self, output: Tensor, target: Tensor) -> Tensor:
            self.centre.lerp_(output.detach().mean(0), 0.1)
            return mse_loss(output, target)

    found, loss = Beside(), Centred()
    dagrow.grow(found.dag, [batch[:2] for batch in found.batches], loss)
    assert not loss.centre.any()


def test_modules_of_other_threads_are_left_alone() -> None:
    model, other = nn.Linear(2, 2), nn.BatchNorm1d(2)
    with preserve_state(model):
        thread = threading.Thread(target=lambda: other(torch.randn(4, 2)))
        thread.start()
        thread.join()
    assert other.num_batches_tracked == 1


def test_a_model_that_was_compiled_in_place_grows_and_stays_compiled() -> None:
    torch._dynamo.reset()
    found = Beside()
    for model, operator in ((found.model, AddNeurons(k=2)), (found.model[0], dagrow.AddLayer(2, nn.Tanh()))):
        model.compile(backend="eager")
        compiled, batches = model._compiled_call_impl, [batch[:2] for batch in found.batches]
        found.model(batches[0][0])
        receipt = dagrow.propose(found.dag, batches, mse_loss, [operator])[0].apply(0.3)
        assert model._compiled_call_impl is compiled
        measured = sum(mse_loss(found.model(x), y).item() for x, y in batches) / 2
        assert measured == pytest.approx(receipt.loss_after)
    torch._dynamo.reset()


STRESS = """
import gc, sys, threading, torch
from dagrow._model_state import random_state, seed_everything

sys.setswitchinterval(1e-6)
gc.set_threshold(50)

class Cycle:
    def __init__(self):
        weight = torch.ones(3, 3, requires_grad=True)
        self.own, self.tensor = self, (weight @ weight).sum()  # which is freed while other threads run

def look():
    for _ in range(4000):
        Cycle(), random_state()

def seed():
    for number in range(4000):
        Cycle(), seed_everything(number, others=False)

threads = [threading.Thread(target=work, daemon=True) for work in (look, seed)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


def test_threads_that_seed_and_read_the_generator_do_not_wait_for_each_other() -> None:
    """In a process of its own, as nothing could stop it: without a lock it never ends."""
    subprocess.run([sys.executable, "-c", STRESS], timeout=60, check=True)
