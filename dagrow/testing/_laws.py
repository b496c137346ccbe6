"""The ten laws that every operator, layer rule and model must obey.

Every law takes an operator and a :class:`Case`, works on copies of the case's model, and raises AssertionError where it
does not hold. They are meant for float64.
"""

import copy
import dataclasses
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dagrow.growing import grow
from dagrow.operators import Needs, Operator
from dagrow.solvers import Moments, MomentView
from dagrow.statistics import Objective, measure
from dagrow.surgery import Growth, Receipt
from dagrow.testing._brute_force import Target, regressed, targets_of
from dagrow.testing._cases import Case, rescaled
from dagrow.testing._snapshots_and_slopes import (
    assert_close,
    derivative,
    full_state,
    is_picklable,
    kink,
    permute,
    same,
    sample,
)
from dagrow.tracing import bind


def preservation(operator: Operator, case: Case) -> None:
    """Law 1: at gamma = 0 nothing changes, in eval and in train mode, also after several growths.

    Args:
        operator: what is checked.
        case: what it is checked on.
    """
    dag = case.copy()
    before = {mode: case.outputs(dag.model, mode) for mode in ("eval", "train")}
    for _ in range(2):
        growths = case.propose(operator, dag)
        for mode, expected in before.items():
            for growth in growths:
                assert_close(case.grown(growth, 0.0, mode), expected, f"{growth} previewed in {mode} mode", atol=1e-10)
        for growth in growths[:1]:
            growth.apply(0.0)
            for mode, expected in before.items():
                assert_close(case.outputs(dag.model, mode), expected, f"{growth} applied in {mode} mode", atol=1e-10)
        for growth in case.propose(operator, dag)[:1]:
            growth.apply(0.01)
        before = {mode: case.outputs(dag.model, mode) for mode in before}


def slope(operator: Operator, case: Case) -> None:
    """Law 2: the loss of the grown model falls in gamma by the gain, ``dL/dgamma = -gain`` at 0.

    Where the loss has a kink there, as with a ReLU whose input is exactly 0, the gain lies between both slopes.

    Args:
        operator: what is checked.
        case: what it is checked on.
    """
    dag = case.copy()
    for growth in case.propose(operator, dag):
        check_slope(growth)


def check_slope(growth: Growth) -> None:
    """Law 2 for one growth.

    Args:
        growth: as it was proposed, on batches in float64.
    """
    noise = 1e-9 * abs(growth.loss(0.0))
    allowed = noise + kink(growth.loss)
    assert_close(-growth.gain, derivative(growth.loss), f"slope of {growth}", rtol=1e-4, atol=allowed)
    assert_close(
        sum(growth.gain_from.values()), growth.gain, f"parts of the gain of {growth}", rtol=1e-9, atol=1e-3 * noise
    )


def residual(operator: Operator, case: Case) -> None:
    """Law 3: ``E|t|^2 - E|t - Delta a|^2`` by brute force is the drop; t is v for a move, v_perp for new neurons.

    Operators with fields ``ridge`` and ``folds`` are checked with 0 and 1, where the law is exact.

    Args:
        operator: what is checked.
        case: what it is checked on.
    """
    for growth in case.propose(_exact(operator), case.copy()):
        check_drop(growth, case)


def check_drop(growth: Growth, case: Case) -> None:
    """Law 3 for one growth of an operator without ridge and folds.

    Goals may be zero but for rounding, as those before a norm of one unit: a millionth of a millionth of the loss.

    Args:
        growth: as it was proposed.
        case: what it was measured on.
    """
    targets = _targets(growth, case)
    if all(target.certain for target in targets) and (growth.drop or not growth.neurons):
        fall = sum(t.fall(t.written) for t in targets)
        noise = 1e-9 * sum(t.energy for t in targets) + (1e-12 * growth.loss(0.0)) ** 2
        assert_close(growth.drop, fall, f"drop of {growth}", rtol=1e-7, atol=noise)


def optimality(operator: Operator, case: Case, draws: int = 10) -> None:
    """Law 4: no other fan-out explains more; where linear theory chose the fan-in, no other fan-in does either.

    Args:
        operator: what is checked.
        case: what it is checked on.
        draws: how many random candidates of each size.
    """
    generator = torch.Generator().manual_seed(0)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    for growth in case.propose(_exact(operator), case.copy()):
        targets = _targets(growth, case)
        if not all(t.certain for t in targets) or not growth.drop or not (growth.neurons or growth.change.new_paths):
            continue
        for t in targets:
            for scale in (1.0, 1e-2, 1e-4) * draws:
                other = t.written + scale * t.new @ randn(t.new.shape[1], t.written.shape[1]) * t.written.std()
                _less(t.fall(other), t, f"{growth}: a random fan-out")
        if growth.singular_values is not None and len(targets) == 1 and targets[0].offered is not None:
            _fan_in_is_optimal(growth, targets[0], randn, draws)


def _fan_in_is_optimal(growth: Growth, t: Target, randn: Callable[..., Tensor], draws: int) -> None:
    """Neither the chosen features, moved a little, nor other ones explain more, each with its own best fan-out."""
    assert t.offered is not None
    rank = int(torch.linalg.matrix_rank(t.new))
    basis = t.new @ torch.linalg.svd(t.new, full_matrices=False)[2][:rank].T
    for scale in (1.0, 1e-2, 1e-4) * draws:
        for start in (basis, 0 * basis):
            other = start + scale * t.offered @ randn(t.offered.shape[1], rank) * t.new.std()
            _less(t.fall(regressed(other, t.wanted)), t, f"{growth}: a random fan-in")


def _less(fall: float, t: Target, what: str) -> None:
    reached = t.fall(t.written)
    assert fall <= reached + 1e-9 * t.energy, f"{what} explains {fall}, more than {reached}"


def additivity(operator: Operator, case: Case) -> None:
    """Law 5: moments of two sets of batches add up; order and size of batches do not matter.

    Args:
        operator: what is checked.
        case: what it is checked on.
    """
    dag = case.copy()
    objective = Objective(dag.model, case.batches, case.loss)
    steps = [candidate.steps(objective) for candidate in operator.candidates(dag)]
    pairs = [pair for step in steps for pair in next(step, Needs([])).pairs]

    def moments(batches: Sequence[Any], folds: int = 1) -> Moments:
        return measure(dag, Objective(dag.model, batches, case.loss, mode="eval"), pairs, folds=folds)

    def same_moments(actual: MomentView, expected: MomentView, what: str) -> None:
        assert actual.samples == expected.samples, f"{what}: {actual.samples} samples, not {expected.samples}"
        for x, y in pairs:
            assert_close(actual[x, y], expected[x, y], f"moment {x}, {y}: {what}", rtol=1e-10, atol=1e-12)

    single = [(sample(x, n), y[n : n + 1]) for x, y in case.batches for n in range(len(y))]
    whole = moments(case.batches)
    same_moments(moments(single), whole, "batches of one")
    same_moments(moments(single[1::2]) + moments(single[::2]), whole, "two parts, in another order")
    folds = [moments(batches, 2).split() for batches in (case.batches, single)]
    for fold, views in enumerate(zip(*folds, strict=True)):
        for expected, actual in zip(*views, strict=True):
            same_moments(actual, expected, f"fold {fold}, batches of one")


def invariance(operator: Operator, case: Case) -> None:
    """Law 6: the same growth for a scaled loss, permuted hidden units, and an input in another unit.

    Growths that do not claim it are left out: what is drawn at random, or depends on the units of features. So are
    those at targets whose features have a rank that moments in float64 cannot tell.

    Args:
        operator: what is checked.
        case: what it is checked on.
    """
    dag = case.copy()
    first = _by_place(case.propose(operator, dag))
    if not all(growth.invariant for growth in first.values()):
        return
    first = {place: growth for place, growth in first.items() if _certain(growth, case)}
    scaled = replace(case, loss=lambda output, target: 0.01 * case.loss(output, target))
    _same_growths(case, first, case, _by_place(scaled.propose(operator, dag)), "loss scaled by 0.01", 0.01)
    for axis in [axis.name for axis in dag.axes if axis.growable and axis.width > 1]:
        other = case.copy()
        permute(other, other.axis(axis), torch.arange(dag.axis(axis).width).roll(1))
        _same_growths(case, first, case, _by_place(case.propose(operator, other)), f"units of {axis} permuted")
    other_unit = rescaled(case)
    if other_unit is not None:
        growths = _by_place(other_unit.propose(operator, other_unit.copy()))
        _same_growths(case, first, other_unit, growths, "first input scaled by 1000")


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
        before = full_state(dag, optimizer)
        receipt = growth.apply(0.3, optimizer=optimizer)
        receipt.undo()
        same(before, full_state(dag, optimizer), f"undo of {growth}")


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
    receipt = growth.apply(gamma, optimizer=optimizer)
    loss = Objective(dag.model, case.batches, case.loss, mode=case.mode).mean()
    assert_close(loss, predicted, f"{growth} applied", rtol=1e-9, atol=1e-12)
    wider = {axis.name: axis.width - widths.get(axis.name, axis.width) for axis in dag.axes}
    wider = {name: more for name, more in wider.items() if more}
    expected = {growth.where: growth.neurons} if growth.neurons and not growth.change.new_paths else {}
    assert wider == expected, f"{growth} widened {wider}"
    new = bool(growth.neurons or growth.change.new_paths)
    assert bool(receipt.parameters) == new, f"{receipt} tells of {receipt.parameters}"


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


def gentle(growth: Growth, gamma: float = 1e-2) -> float:
    """An amplitude at which the loss at most doubles: goals without a ridge may ask for large weights.

    Args:
        growth: as it was proposed.
        gamma: what is wanted.

    Returns:
        ``gamma``, or so much less.
    """
    most = 2 * abs(growth.loss(0.0)) + 1e-6
    return next((gamma * less for less in (1, 1e-2, 1e-4, 1e-6) if growth.loss(gamma * less) <= most), 0.0)


def descent(operator: Operator, case: Case) -> None:
    """Law 9: a small step along any growth with a gain lowers the loss.

    Args:
        operator: what is checked.
        case: what it is checked on.
    """
    dag = case.copy()
    for growth in case.propose(operator, dag):
        check_descent(growth)


def check_descent(growth: Growth) -> None:
    """Law 9 for one growth.

    Args:
        growth: as it was proposed, on batches in float64.
    """
    before = growth.loss(0.0)
    if growth.gain > 1e-9 * abs(before):
        after = [growth.loss(part * abs(before) / growth.gain) for part in (1e-6, 1e-8, 1e-10)]
        assert min(after) < before, f"{growth}: small steps raise the loss from {before} to {after}"


class Interruption(BaseException):
    """What :func:`atomicity` raises in the middle of a growth."""


def atomicity(operator: Operator, case: Case) -> None:
    """Law 10: a loss that raises half-way through a growth leaves nothing changed.

    Args:
        operator: what is checked.
        case: what it is checked on.
    """
    dag = case.copy()
    optimizer, calls = torch.optim.Adam(dag.model.parameters(), lr=1e-3), [0, -1]
    _step(case, dag.model, optimizer)

    def loss(output: Any, target: Any) -> Tensor:
        calls[0] += 1
        if calls[0] == calls[1]:
            raise Interruption
        return case.loss(output, target)

    def attempt() -> Receipt:
        return grow(dag, case.batches, loss, [operator, operator], optimizer=optimizer, mode=case.mode)

    before = full_state(dag, optimizer)
    attempt().undo()
    same(before, full_state(dag, optimizer), "undo of grow")
    total = calls[0]
    for at in sorted({1, 2, total // 4, total // 2, 3 * total // 4, total - 1, total} - {0}):
        calls[:] = [0, at]
        try:
            attempt()
        except Interruption:
            same(before, full_state(dag, optimizer), f"loss call {at} of {total} interrupted")
        else:
            raise AssertionError(f"the interruption of loss call {at} of {total} was swallowed")


def _exact(operator: Operator) -> Operator:
    """The operator without ridge and cross-validation, where it has them."""
    if not dataclasses.is_dataclass(operator):
        return operator
    names = {f.name for f in dataclasses.fields(operator) if f.init}
    wanted = {"ridge": 0.0, "folds": 1, "k": getattr(operator, "k", None) or 2}
    return dataclasses.replace(operator, **{name: value for name, value in wanted.items() if name in names})


def _certain(growth: Growth, case: Case) -> bool:
    return all(target.certain for target in targets_of(growth, case.batches, case.loss, case.mode))


def _targets(growth: Growth, case: Case) -> list[Target]:
    paired, solver = getattr(growth.operator, "paired", False), getattr(growth.operator, "solver", "")
    project = (growth.neurons > 0 or bool(growth.change.new_paths)) and solver != "unprojected"
    return targets_of(growth, case.batches, case.loss, case.mode, project=project, paired=paired)


def _step(case: Case, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """A step of training, so that there are gradients and optimizer state."""
    optimizer.zero_grad()
    model.eval()
    args, kwargs = bind(case.batches[0][0])
    case.loss(model(*args, **kwargs), case.batches[0][1]).backward()
    optimizer.step()


def _by_place(growths: Sequence[Growth]) -> dict[tuple[str, int], Growth]:
    """Growths by their place, several of a place numbered from the best."""
    places = [growth.where for growth in growths]
    return {(growth.where, places[:i].count(growth.where)): growth for i, growth in enumerate(growths)}


def _same_growths(
    case: Case, first: Mapping[Any, Growth], other: Case, second: Mapping[Any, Growth], what: str, scale: float = 1.0
) -> None:
    """The same gains and the same new functions, where goals are ``scale`` times what they were."""
    assert first.keys() <= second.keys(), f"{what}: growths at {list(second)}, not {list(first)}"
    for place, growth in first.items():
        twin = second[place]
        noise = 1e-9 * abs(growth.loss(0.0))
        assert twin.neurons == growth.neurons, f"{what}: {twin.neurons} neurons at {place}, not {growth.neurons}"
        assert_close(twin.gain / scale**2, growth.gain, f"{what}: gain at {place}", rtol=1e-6, atol=noise)
        outputs = other.grown(twin, 0.01 / scale)
        assert_close(outputs, case.grown(growth, 0.01), f"{what}: outputs of {growth}", rtol=1e-6, atol=1e-9)
