"""Law 11, of units that go: what is left is the model in which nothing reads them, and no other refit loses less."""

import torch

from dagrow.errors import GrowthError
from dagrow.operators import Operator
from dagrow.statistics import Objective
from dagrow.surgery import Growth, preview
from dagrow.testing._brute_force import rows_of
from dagrow.testing._cases import Case
from dagrow.testing._laws import exact
from dagrow.testing._snapshots_and_slopes import assert_close


def narrowing(operator: Operator, case: Case) -> None:
    """Law 11: at amplitude 1 units that go are gone, and the model computes what it does where nothing reads them.

    That holds in eval and in train mode, and there is no other amplitude to apply them at. Without folds and ridge the
    rise of the loss is predicted as it is measured, and what is lost of what a refitted consumer writes has nothing in
    common with what it still reads: no other refit loses less. Growths by which no unit goes are left out.

    Args:
        operator: what is checked.
        case: what it is checked on.
    """
    for growth in case.propose(operator, case.copy()):
        if growth.removes:
            _check_end(growth, case)
    case = case.supervised()
    for growth in case.propose(exact(operator), case.copy()):
        if growth.removes:
            _check_prediction(growth)
            _check_refit(growth, case)


def _check_end(growth: Growth, case: Case) -> None:
    """The narrower model computes what the faded one does; at another amplitude it is refused."""
    dag, final = growth.dag, growth.change.final
    for mode in ("eval", "train"):
        faded = case.grown(growth, 1.0, mode)
        with preview(dag, final):
            narrowed = case.outputs(dag.model, mode, final.tensors(dag.model, 1.0))
        assert_close(narrowed, faded, f"{growth} at its end in {mode} mode", atol=1e-10)
    for gamma in (0.0, 0.5):
        try:
            growth.apply(gamma)
        except GrowthError:
            continue
        raise AssertionError(f"{growth} was applied at amplitude {gamma}")


def _check_prediction(growth: Growth) -> None:
    before = growth.loss(0.0)
    assert growth.heldout_gain is not None, f"{growth} predicts nothing"
    rise = growth.loss(1.0) - before
    assert_close(-growth.heldout_gain, rise, f"predicted rise of {growth}", rtol=1e-9, atol=1e-12 * abs(before))


def _check_refit(growth: Growth, case: Case) -> None:
    """Orthogonal to what stays, by brute force."""
    dag, change, final = growth.dag, growth.change, growth.change.final
    moved = [edge for edge in dag.edges if edge.path("weight") in final.slope]
    objective = Objective(dag.model, case.batches, case.loss, mode=case.mode)
    rows = rows_of(objective, moved) if moved else {}
    for edge in moved:
        read, slope = rows[edge.name].read, edge.matrix(change.slope[edge.path("weight")]).flatten(1)
        bias = change.slope.get(edge.path("bias")) if edge.bias else None
        lost = read @ slope.T + (0 if bias is None else bias)
        at = next(at for at in final.index_maps[edge.path("weight")] if at.dim == edge.rule.dims["weight"][1])
        entries = torch.arange(slope.shape[1]).view(len(at.old), -1)[at.kept].flatten()
        stays = torch.cat([read[:, entries], read.new_ones(len(read), int(edge.bias))], 1)
        apart = float((stays.T @ lost).abs().max()) if stays.numel() else 0.0
        size = float(stays.norm()) * float(read.norm()) * float(slope.norm())
        assert apart <= 1e-8 * size, f"{growth}: what {edge.name} loses could be written by what it still reads"
