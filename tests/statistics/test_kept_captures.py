"""What passes leave is kept while it is small, and nothing else comes of it than of running the model again."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

import dagrow
from dagrow import AddNeurons, MoveWeights
from dagrow.operators import Operator
from dagrow.statistics import _kept_captures
from dagrow.statistics._batches import mark_of
from dagrow.statistics._kept_captures import KeptCaptures


class Counted(nn.Module):
    """Convolutions behind a norm, and a head; it counts its calls, and whether gradients were on."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.second, self.head = nn.Conv2d(3, 4, 3, stride=2), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        CALLS.append(torch.is_grad_enabled())
        return self.head(self.second(self.norm(self.first(x)).relu()).tanh().mean((2, 3)))


CALLS: list[bool] = []
OPERATORS = [AddNeurons(k=2), AddNeurons(k=2, solver="als"), AddNeurons(k=1, init="random"), MoveWeights()]


def setting() -> tuple[dagrow.Dag, list[Any]]:
    torch.manual_seed(0)
    model = Counted().double().eval()
    batches = [(torch.randn(10, 2, 6, 6).double(), torch.randint(3, (10,))) for _ in range(3)]
    return dagrow.trace(model, batches[0][0]), batches


def proposed(operator: Operator, monkeypatch: pytest.MonkeyPatch, kept: bool) -> tuple[list[Any], list[bool]]:
    dag, batches = setting()
    with monkeypatch.context() as patch:
        if not kept:
            patch.setattr(KeptCaptures, "__init__", lambda self, model=None: _nothing(self))
        CALLS.clear()
        growths = dagrow.propose(dag, batches, cross_entropy, [operator])
    return growths, list(CALLS)


def _nothing(kept: KeptCaptures) -> None:
    kept.most, kept.plain, kept.preview = 0, None, None


@pytest.mark.parametrize("operator", OPERATORS, ids=repr)
def test_growths_are_the_same_and_the_model_runs_less_often(
    operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    growths, calls = proposed(operator, monkeypatch, kept=True)
    others, more = proposed(operator, monkeypatch, kept=False)
    assert len(calls) < len(more)
    assert [g.where for g in growths] == [g.where for g in others]
    for growth, other in zip(growths, others, strict=True):
        assert growth.gain == pytest.approx(other.gain, rel=1e-9, abs=1e-15)
        assert growth.heldout_gain == pytest.approx(other.heldout_gain, rel=1e-9, abs=1e-15)
        assert growth.z == pytest.approx(other.z, rel=1e-7, abs=1e-9)


def test_a_preview_runs_forward_only(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = proposed(AddNeurons(k=2, axes=("first",)), monkeypatch, kept=True)[1]
    backward = proposed(AddNeurons(k=2, axes=("first",)), monkeypatch, kept=False)[1]
    assert sum(calls) < sum(backward)
    assert calls[-3:] == [False, False, False]


def test_nothing_is_kept_that_is_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    with_none = proposed(AddNeurons(k=2), monkeypatch, kept=False)[1]
    monkeypatch.setattr(_kept_captures, "LEAST", 10)
    assert proposed(AddNeurons(k=2), monkeypatch, kept=True)[1] == with_none


def test_a_loader_that_gives_other_batches_is_read_again() -> None:
    """What layers read in one pass does not belong to the goals of another."""
    torch.manual_seed(0)
    model, teacher = (nn.Sequential(nn.Linear(5, h), nn.Tanh(), nn.Linear(h, 3)).double() for h in (2, 8))
    x = torch.randn(3, 200, 5).double()
    batches = [*zip(x, 3 * teacher(2 * x).detach(), strict=True)]
    dag, operators = dagrow.trace(model, x[0]), [AddNeurons(k=1)]

    class Moving:
        turn = 0

        def __iter__(self) -> Iterator[Any]:
            Moving.turn += 1
            generator = torch.Generator().manual_seed(Moving.turn)
            for inputs, targets in batches:
                order = torch.randperm(len(inputs), generator=generator)
                yield inputs[order], targets[order]

    (fixed,) = dagrow.propose(dag, batches, mse_loss, operators)
    (growth,) = dagrow.propose(dag, Moving(), mse_loss, operators)
    assert fixed.z is not None
    assert fixed.z > 5
    assert growth.gain == pytest.approx(fixed.gain, rel=0.1)


class Reusing:
    """A loader that writes every batch into the same memory, past autograd."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches, self.inputs = batches, torch.empty_like(batches[0][0])

    def __iter__(self) -> Iterator[Any]:
        for inputs, target in self.batches:
            self.inputs.numpy()[:] = inputs.numpy()
            yield self.inputs, target


def test_memory_that_is_written_anew_for_each_batch_is_not_kept() -> None:
    dag, batches = setting()
    operators = [AddNeurons(k=1, axes=("first",))]
    (growth,) = dagrow.propose(dag, Reusing(batches), cross_entropy, operators)
    (expected,) = dagrow.propose(dag, batches, cross_entropy, operators)
    assert growth.gain == pytest.approx(expected.gain, rel=1e-9)
    assert growth.heldout_gain == pytest.approx(expected.heldout_gain, rel=1e-9)


def test_batches_are_known_by_all_kinds_of_tensors() -> None:
    empty, several = torch.zeros(0, 4), {"a": [torch.ones(2, 3), torch.tensor(4)], "b": "text"}
    assert mark_of(empty) is not None
    assert mark_of(several) == mark_of({"a": [torch.ones(2, 3), torch.tensor(4)], "b": "other"})
    assert mark_of(several) != mark_of({"a": [torch.ones(2, 3), torch.tensor(5)]})
    order, waves = torch.tensor([1, 0]), torch.rand(2, 1, 2, dtype=torch.complex64)
    for tensor in (torch.rand(2, 3), torch.rand(2), waves.conj(), torch.rand(2, 3) > torch.tensor([[-1.0], [2.0]])):
        assert mark_of(tensor) == mark_of(tensor.clone()) != mark_of(tensor[order])
    assert mark_of([None, "text", torch.eye(3).to_sparse()]) is None
