"""Laws 7, 8 and 10: what a growth leaves in model, dag and optimizer, once it is undone, grown upon or interrupted."""

import copy
import pickle

import torch
from torch import Tensor, nn

from dagrow.growing import grow
from dagrow.operators import Operator
from dagrow.surgery import Growth, Receipt
from dagrow.testing._cases import Case
from dagrow.testing._snapshots_and_slopes import amplitude, assert_close, is_picklable, same, snapshot
from dagrow.tracing import bind


def undoing(operator: Operator, case: Case) -> None:
    """Law 7: undo restores every bit of parameters, buffers, gradients, dag and optimizer.

    Args:
        operator: what is checked.
        case: what it is checked on.
    """
    dag = case.copy()
    optimizer = torch.optim.Adam(dag.model.parameters(), lr=1e-3)
    _step(case, dag.model, optimizer)
    for growth in case.propose(operator, dag):
        before = snapshot(dag, optimizer)
        receipt = growth.apply(amplitude(growth, 0.3), optimizer=optimizer)
        receipt.undo()
        same(before, snapshot(dag, optimizer), f"undo of {growth}")


def regrowth(operator: Operator, case: Case) -> None:
    """Law 8: the same place grows twice and its neighbours after it; copies, pickles and states of the result agree.

    Parameters keep their identity, and keys of the ``state_dict`` are only ever added.

    Args:
        operator: what is checked.
        case: what it is checked on.
    """
    dag = case.copy()
    identities = {name: id(p) for name, p in dag.model.named_parameters(remove_duplicate=False)}
    keys, optimizer = set(dag.model.state_dict()), torch.optim.Adam(dag.model.parameters(), lr=1e-4)
    _step(case, dag.model, optimizer)
    growths = case.propose(operator, dag)
    places = [g.where for g in growths if not g.change.new_paths] + [g.where for g in growths if g.change.new_paths][:2]
    for where in [where for where in places for _ in range(2)]:
        for growth in [g for g in case.propose(operator, dag) if g.where == where][:1]:
            _grows_as_predicted(growth, case, optimizer)
            _step(case, dag.model, optimizer)
    now = {name: id(p) for name, p in dag.model.named_parameters(remove_duplicate=False)}
    assert {name: now.get(name) for name in identities} == identities, "a parameter has lost its identity"
    assert keys <= set(dag.model.state_dict()), f"keys {keys - set(dag.model.state_dict())} have vanished"
    _copies_agree(dag.model, case)


def _grows_as_predicted(growth: Growth, case: Case, optimizer: torch.optim.Optimizer) -> None:
    """The loss is the one that was foretold, the axis is as much wider as the growth tells, and no other one is."""
    dag, gamma = growth.dag, gentle(growth)
    widths, predicted = {axis.name: axis.width for axis in dag.axes}, growth.loss(gamma)
    sizes = {name: parameter.shape for name, parameter in dag.model.named_parameters()}
    receipt = growth.apply(gamma, optimizer=optimizer)
    loss = growth.objective.mean()
    assert_close(loss, predicted, f"{growth} applied", rtol=1e-9, atol=1e-12)
    if growth.change.new_paths:  # which may read in the middle of an axis, so that it counts in other units
        resized = [name for name, p in dag.model.named_parameters() if p.shape != sizes.get(name, p.shape)]
        assert not resized, f"{growth} resized {resized}"
    else:
        wider = {axis.name: axis.width - widths.get(axis.name, axis.width) for axis in dag.axes}
        wider = {name: more for name, more in wider.items() if more}
        assert wider == ({growth.where: growth.neurons} if growth.neurons else {}), f"{growth} widened {wider}"
    new = bool(growth.neurons or growth.change.new_paths)
    assert bool(receipt.parameters) == new, f"{receipt} tells of {receipt.parameters}"


def gentle(growth: Growth, gamma: float = 1e-2) -> float:
    """An amplitude at which the loss at most doubles: goals without a ridge may ask for large weights.

    Args:
        growth: as it was proposed.
        gamma: what is wanted.

    Returns:
        ``gamma``, or so much less; 1 of units that go.
    """
    if growth.removes:
        return 1.0
    most = 2 * abs(growth.loss(0.0)) + 1e-6
    return next((gamma * less for less in (1, 1e-2, 1e-4, 1e-6) if growth.loss(gamma * less) <= most), 0.0)


def _copies_agree(model: nn.Module, case: Case) -> None:
    """A copy, a copy that gets its weights from a ``state_dict``, and a pickle give the same outputs."""
    outputs, twin = case.outputs(model), copy.deepcopy(model)
    assert_close(case.outputs(twin), outputs, "deepcopy", atol=0)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    twin.load_state_dict(model.state_dict())
    assert_close(case.outputs(twin), outputs, "state_dict", atol=0)
    if is_picklable(case.model):
        assert_close(case.outputs(pickle.loads(pickle.dumps(model))), outputs, "pickle", atol=0)


class Interruption(BaseException):
    """What :func:`atomicity` raises in the middle of a growth."""


def atomicity(operator: Operator, case: Case) -> None:
    """Law 10: a loss that raises half-way through a growth leaves nothing changed.

    Args:
        operator: what is checked.
        case: what it is checked on.

    Raises:
        AssertionError: something has changed, or the interruption did not come through.
    """
    dag = case.copy()
    optimizer, calls = torch.optim.Adam(dag.model.parameters(), lr=1e-3), [0, -1]
    _step(case, dag.model, optimizer)

    def loss(output: object, target: object) -> Tensor:
        calls[0] += 1
        if calls[0] == calls[1]:
            raise Interruption
        return case.loss(output, target)

    def attempt() -> Receipt:
        return grow(dag, case.batches, loss, [operator, operator], optimizer=optimizer, mode=case.mode)

    before = snapshot(dag, optimizer)
    attempt().undo()
    same(before, snapshot(dag, optimizer), "undo of grow")
    total = calls[0]
    for at in sorted({1, 2, total // 4, total // 2, 3 * total // 4, total - 1, total} - {0}):
        calls[:] = [0, at]
        try:
            attempt()
        except Interruption:
            same(before, snapshot(dag, optimizer), f"loss call {at} of {total} interrupted")
        else:
            raise AssertionError(f"the interruption of loss call {at} of {total} was swallowed")


def _step(case: Case, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """A step of training, so that there are gradients and optimizer state."""
    optimizer.zero_grad()
    model.eval()
    args, kwargs = bind(case.batches[0][0])
    case.loss(model(*args, **kwargs), case.batches[0][1]).backward()
    optimizer.step()
