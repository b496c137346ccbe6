"""A graph is compared with its model at another batch size."""

import pytest
import torch
from forwards import made, mlp

from dagrow.errors import TraceError
from dagrow.tracing import record


def test_a_baked_batch_size_is_found_by_the_second_batch():
    with pytest.raises(TraceError, match=r"a batch of 2[\s\S]*__len__ bakes"):
        record(made(lambda self, x: x.view(len(x), 2, 2)), torch.randn(3, 4))
    with pytest.raises(TraceError, match="differs from the model at output"):
        record(made(lambda self, x: x / float(x.shape[0])), torch.randn(3, 4))


def test_a_model_that_refuses_another_batch_is_noted():
    program = record(made(lambda self, x: x.view(3, 4) + 1), torch.randn(3, 4))
    assert any("refuses a batch of 4" in note for note in program.specialisations)
    assert any("verified at one batch size only" in note for note in program.specialisations)


def test_a_forward_that_treats_a_batch_of_one_apart_is_noted():
    program = record(made(lambda self, x: x + 1 if x.shape[0] == 1 else x), torch.randn(2, 4))
    assert any("does not hold for a batch of 1" in note for note in program.specialisations)


def test_meta_inputs_are_recorded_but_not_verified():
    program = record(mlp(), torch.ones(2, 4, device="meta"))
    assert any("not verified" in note for note in program.specialisations)
    assert program.run(torch.ones(5, 4)).shape == (5, 3)
