"""How parameters have grown is noted while somebody may need it, and not in copies."""

import copy
import pickle

import torch
from optimized import OPTIMIZERS, grow, step, trained

from dagrow.surgery._growth_log import log_of


def test_the_log_does_not_grow_with_growths_that_are_undone() -> None:
    model, _, dag = trained(OPTIMIZERS["sgd"])
    for k in (1, 2, 1, 2, 1, 2):
        grow(dag, k).undo()
    assert max(len(log.resizes) for log in map(log_of, model.parameters()) if log) <= 6


def test_copies_and_pickles_hold_nothing_of_the_growths_of_their_parameters() -> None:
    model, _, dag = trained(OPTIMIZERS["adam"])
    grow(dag).undo()
    grow(dag)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(log_of(parameter) is None for parameter in twin.parameters())
        step(twin, torch.optim.Adam(twin.parameters()))
    assert b"dagrow" not in pickle.dumps(model)
