"""The amplitude of a growth, by line search on the loss; the receipt of several growths in a row."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, isfinite

from dagrow._log import LOG
from dagrow.errors import NotFiniteError, OptimizerError
from dagrow.growing._left_out import LeftOut, is_of_place
from dagrow.statistics import Objective
from dagrow.surgery import Growth, Optimizers, Receipt, where_new

EVALUATIONS = 8  #: of the loss, at most, but for those that bound an amplitude where the loss levels out
START = 1 / 16  #: of the amplitude at which the loss would have fallen to 0, if it fell on as it begins to
MOST = 16  #: times that amplitude, at most
FLAT = 0.9  #: the part of a fall that a quarter of the amplitude brings where it levels out; a parabola gives 0.44
NEAR = 0.1  #: a relative distance to the minimum that is near enough: of a parabola's fall it takes a hundredth
REACH = 8  #: times the largest amplitude known, or the smallest, is how far the next one is sought
SMALLEST = 1e-9  #: of the amplitude that was tried first
WORTH = 1e-9  #: a relative fall of the loss that is not worth a growth


@dataclass(frozen=True)
class Amplitude:
    """What a line search found.

    Attributes:
        gamma: the amplitude, 0 if none lowers the loss.
        loss: at it.
        note: why it is not the lowest, if it is not.
    """

    gamma: float
    loss: float
    note: str = ""


def line_search(
    loss: Callable[[float], float], before: float, start: float = 1.0, most: float | None = None, gain: float = 0.0
) -> Amplitude:
    """Follows parabolas, safeguarded: with the slope at 0, then, once a minimum is bracketed, through three losses.

    Where the loss falls further and further, the amplitude is bounded: by ``most``, and where it only levels out, as
    behind a norm or a softmax, by the smallest of its powers of 4 that brings most of the fall.

    Args:
        loss: of an amplitude.
        before: the loss at amplitude 0.
        start: the amplitude that is tried first.
        most: the largest amplitude; by default 256 times ``start``.
        gain: minus the slope at 0; 0 if it is not known.

    Returns:
        The amplitude with the lowest loss, and that loss: never above ``before``; amplitude 0 if nothing is lower.
    """
    losses, most = {0.0: before}, 256 * start if most is None else most

    def at(gamma: float) -> float:
        if gamma not in losses:
            losses[gamma] = loss(gamma)
        return losses[gamma]

    trial: float | None = start
    while trial is not None and trial not in losses and len(losses) <= EVALUATIONS:
        at(trial)
        trial = _next(losses, gain, most)
    best = _lowest(losses)
    note = "the loss falls on and on with the amplitude, which is bounded" if best > start and best == most else ""
    if best and _levels_out(at, losses, best, most):
        note = "the loss levels out; the amplitude is bounded where it has fallen"
    if note:
        while before - at(best / 4) >= FLAT * (before - min(losses.values())) and best > SMALLEST * start:
            best /= 4
    else:
        best = _lowest(losses)
    return _worth(before, best, at(best), note)


def _lowest(losses: Mapping[float, float]) -> float:
    return min(losses, key=lambda gamma: (losses[gamma], gamma))


def _next(losses: Mapping[float, float], gain: float, most: float) -> float | None:
    """The amplitude to try next; None if the best one is known well enough."""
    best, known = _lowest(losses), sorted(losses)
    if not best:  # none is lower yet
        return min(max(_vertex(losses, gain, known[1]), known[1] / REACH), known[1] / 2)
    place = known.index(best)
    low, guess = known[place - 1], _vertex(losses, gain, best) if gain > 0 else inf
    if best == known[-1]:  # nothing beyond is known; losses that level out are lowest beyond the parabola
        if not low and guess < best * (1 - NEAR):
            return guess
        return None if best >= most else min(max(guess, 2 * best), REACH * best, most)
    high = known[place + 1]
    through = _vertex_of_three(losses, low, best, high)
    guess = through if low or not guess < high else (guess + through) / 2  # one is too near, the other too far
    if abs(guess - best) < NEAR * best:
        return None
    return min(max(guess, low + NEAR * (best - low)), high - NEAR * (high - best))


def _vertex(losses: Mapping[float, float], gain: float, gamma: float) -> float:
    """Where the parabola is lowest that has the slope at 0 and goes through the loss at an amplitude."""
    rise = losses[gamma] - losses[0.0] + gain * gamma
    if not isfinite(rise):
        return 0.0
    return gain * gamma**2 / (2 * rise) if rise > 0 else inf


def _vertex_of_three(losses: Mapping[float, float], low: float, best: float, high: float) -> float:
    """Where the parabola through three losses is lowest; half-way to an amplitude where it is infinite."""
    left, right = (losses[low] - losses[best]) / (best - low), (losses[high] - losses[best]) / (high - best)
    if not isfinite(left + right) or not left + right > 0:
        return best if isfinite(left + right) else (best + high) / 2 if isfinite(left) else (low + best) / 2
    return (left * (best + high) + right * (low + best)) / (2 * (left + right))


def _levels_out(at: Callable[[float], float], losses: Mapping[float, float], best: float, most: float) -> bool:
    """Whether a quarter of an amplitude brings nearly the same fall, and twice the amplitude takes little of it."""
    before = losses[0.0]
    fall = before - at(best)
    if any(best / 4 <= gamma < best and before - value < FLAT * fall for gamma, value in losses.items()):
        return False  # nor would a quarter, as the loss falls up to there
    if not before - at(best / 4) >= FLAT * fall > 0:
        return False
    return 2 * best > most or at(2 * best) - at(best) <= (1 - FLAT) * fall


def _worth(before: float, gamma: float, loss: float, note: str = "") -> Amplitude:
    return Amplitude(gamma, loss, note) if loss < before - WORTH * abs(before) else Amplitude(0.0, before)


def best_amplitude(growth: Growth, judge: Objective, before: float) -> tuple[float, float]:
    """The amplitude of a growth with the lowest loss of the judge, and that loss; see :func:`line_search`.

    The loss cannot fall to 0 before ``|loss| / gain`` if it is convex; the search starts at a part of that, so that the
    scale of the loss makes no difference. Amplitudes at which the loss is not finite count as the worst.

    Args:
        growth: fresh, not applied.
        judge: the loss on the batches that choose.
        before: its value without the growth.

    Returns:
        The amplitude, 0 if none lowers the loss, and the loss at it.
    """
    found = _searched(growth, judge, before)
    return found.gamma, found.loss


def _searched(growth: Growth, judge: Objective, before: float) -> Amplitude:
    loss_at = growth.losses(judge)

    def loss(gamma: float) -> float:
        try:
            return loss_at(gamma)
        except NotFiniteError:
            return inf

    reach = abs(before) / growth.gain if growth.gain > 0 else 0.0
    found = line_search(loss, before, START * reach or 1.0, MOST * reach or MOST, growth.gain)
    if found.note:
        LOG.warning("%r at %s: %s, to gamma %.3g.", growth.operator, growth.where, found.note, found.gamma)
    return found


def apply_best(growth: Growth, judge: Objective, before: float, optimizer: Optimizers) -> Receipt | None:
    """Applies a growth at its best amplitude; None, with nothing changed, if no amplitude lowers the loss."""
    whole = growth.is_whole
    found = Amplitude(1.0, growth.loss(1.0, judge)) if whole else _searched(growth, judge, before)
    if not found.gamma > 0:
        return None
    return growth.commit(found.gamma, judge.reported(before), judge.reported(found.loss), optimizer, found.note)


def tried(growth: Growth, judge: Objective, before: float, optimizer: Optimizers, left_out: LeftOut) -> Receipt | None:
    """:func:`apply_best`; None also where the growth fails, which is left out."""
    try:
        return apply_best(growth, judge, before, optimizer)
    except Exception as error:
        if isinstance(error, OptimizerError) or not is_of_place(error, growth.dag, judge, grown=True):
            raise
        left_out.add(growth.where, error)
        return None


def combined(parts: Sequence[Receipt], before: float, left_out: tuple[str, ...] = ()) -> Receipt:
    """One receipt of growths in a row, perhaps none, that began at a loss, and of places that were left out."""
    if len(parts) == 1:
        return replace(parts[0], left_out=left_out) if left_out else parts[0]
    if not parts:
        return Receipt("", 0, 0.0, before, before, 0.0, {}, left_out=left_out)
    where = where_new([part.growth.change for part in parts if part.growth is not None])
    return Receipt(
        ", ".join(part.where for part in parts),
        sum(part.neurons for part in parts),
        parts[-1].gamma,
        before,
        parts[-1].loss_after,
        sum(part.gain for part in parts),
        where,
        left_out=left_out,
        _parts=tuple(parts),
    )
