"""What is put back, and when. That an interrupt at any call leaves nothing changed is in test_interrupts.py."""

import pytest
import torch
from torch import nn

from dagrow._model_state import ModelState, all_or_nothing, restoring


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
