"""Laws 1 to 6 and 9: what a growth does to the function and the loss, and whether nothing does better.

Where units go, the way there is held to them: at gamma = 0 the model is as it was. Of its end speaks another law.

Every law takes an operator and a :class:`Case`, works on copies of the case's model, and raises AssertionError where it
does not hold. They are meant for float64.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dagrow.operators import Needs, Operator
from dagrow.solvers import Moments, MomentView
from dagrow.statistics import Objective, measure
from dagrow.surgery import Growth
from dagrow.testing._brute_force import Target, regressed, targets_of
from dagrow.testing._cases import Case, rescaled
from dagrow.testing._snapshots_and_slopes import amplitude, assert_close, derivative, kink, permute, sample

ROUNDING = 1e-30  #: squares of what should be 0, among numbers of order 1


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
        for growth in [growth for growth in growths if not growth.removes][:1]:
            growth.apply(0.0)
            for mode, expected in before.items():
                assert_close(case.outputs(dag.model, mode), expected, f"{growth} applied in {mode} mode", atol=1e-10)
        for growth in case.propose(operator, dag)[:1]:
            growth.apply(amplitude(growth, 0.01))
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
        if not _is_rounding(growth):
            check_slope(growth)


def check_slope(growth: Growth) -> None:
    """Law 2 for one growth.

    Args:
        growth: as it was proposed, on batches in float64.
    """
    loss = functools.cache(growth.losses())
    noise = 1e-9 * abs(loss(0.0))
    allowed = noise + kink(loss)
    assert_close(-growth.gain, derivative(loss), f"slope of {growth}", rtol=1e-4, atol=allowed)
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
    case = case.supervised()
    for growth in case.propose(exact(operator), case.copy()):
        if not _is_rounding(growth):
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
    case = case.supervised()
    generator = torch.Generator().manual_seed(0)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    for growth in case.propose(exact(operator), case.copy()):
        targets = _targets(growth, case)
        if not all(t.certain for t in targets) or not growth.drop or not (growth.neurons or growth.change.new_paths):
            continue
        if _is_rounding(growth):
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
    assert fall <= reached + 1e-9 * t.energy + ROUNDING, f"{what} explains {fall}, more than {reached}"


def additivity(operator: Operator, case: Case) -> None:
    """Law 5: moments of two sets of batches add up; order and size of batches do not matter.

    Args:
        operator: what is checked.
        case: what it is checked on.
    """
    case = case.supervised()
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
    those whose features, read or new, have a rank that moments in float64 cannot tell.

    Args:
        operator: what is checked.
        case: what it is checked on.
    """
    case = case.supervised()
    dag = case.copy()
    first = _by_place(case.propose(operator, dag))
    if not all(growth.invariant for growth in first.values()):
        return
    # growths of one place are told apart by their order, which an uncertain one may change
    uncertain = {growth.where for growth in first.values() if not _certain(growth, case)}
    first = {place: growth for place, growth in first.items() if growth.where not in uncertain}
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


def exact(operator: Operator) -> Operator:
    """The operator without ridge and cross-validation, where it has them.

    Args:
        operator: any.

    Returns:
        One with other settings, or the same.
    """
    if not dataclasses.is_dataclass(operator):
        return operator
    names = {f.name for f in dataclasses.fields(operator) if f.init}
    exact = {"ridge": 0.0, "folds": 1, "k": getattr(operator, "k", None) or 2}
    return dataclasses.replace(operator, **{name: value for name, value in exact.items() if name in names})


def _is_rounding(growth: Growth) -> bool:
    """Whether a growth itself says that it is about numbers of the size of rounding."""
    return any("of the size of rounding" in note for note in growth.notes)


def _certain(growth: Growth, case: Case) -> bool:
    """Whether ranks are beyond doubt: of what targets read, and of what a growth itself says that it had to cut."""
    targets = targets_of(growth, case.batches, case.loss, case.mode)
    return all(target.certain for target in targets) and not any("rank cut" in note for note in growth.notes)


def _targets(growth: Growth, case: Case) -> list[Target]:
    paired, solver = getattr(growth.operator, "paired", False), getattr(growth.operator, "solver", "")
    project = (growth.neurons > 0 or bool(growth.change.new_paths)) and solver != "unprojected"
    return targets_of(growth, case.batches, case.loss, case.mode, project=project, paired=paired)


Growths = dict[tuple[str, int], Growth]  #: by their place, several of a place numbered from the best


def _by_place(growths: Sequence[Growth]) -> Growths:
    places = [growth.where for growth in growths]
    return {(growth.where, places[:i].count(growth.where)): growth for i, growth in enumerate(growths)}


def _same_growths(case: Case, first: Growths, other: Case, second: Growths, what: str, scale: float = 1.0) -> None:
    """The same gains and the same new functions, where goals are ``scale`` times what they were.

    What goes from a layer does not follow the goals, as what is added does.
    """
    assert first.keys() <= second.keys(), f"{what}: growths at {list(second)}, not {list(first)}"
    for place, growth in first.items():
        twin = second[place]
        noise = 1e-9 * abs(growth.loss(0.0))
        assert twin.neurons == growth.neurons, f"{what}: {twin.neurons} neurons at {place}, not {growth.neurons}"
        powers = (1, 0) if growth.removes else (2, 1)
        assert_close(twin.gain / scale ** powers[0], growth.gain, f"{what}: gain at {place}", rtol=1e-6, atol=noise)
        outputs = other.grown(twin, 0.01 / scale ** powers[1])
        assert_close(outputs, case.grown(growth, 0.01), f"{what}: outputs of {growth}", rtol=1e-6, atol=1e-9)
