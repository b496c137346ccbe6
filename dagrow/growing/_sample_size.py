"""How many samples are measured, where that is left open: enough to know the best gain to a tenth.

The standard error of a held-out gain falls with the root of the number of samples, so that a few tell how many it
takes, see :meth:`dagrow.Growth.samples_for`. Where these few hold no more than chance, that is not known yet, and more
are drawn step by step. What is not seen in some thousands is worth little, and no data set is too large to be asked.
"""

from collections.abc import Sequence

from dagrow.errors import GrowthError
from dagrow.growing._policies import expected_gain
from dagrow.operators import Operator
from dagrow.statistics import DrawnSamples, MeasureOptions, Objective
from dagrow.surgery import Growth

WANTED = 0.1  #: the standard error of the best gain, relative to it
MOST = 4096  #: samples, about, whatever is found
NEARLY = 1.5  #: times more samples than there are is not worth a further pass
AT_ONCE = 4  #: times more samples are drawn, at most


def check_folds(options: MeasureOptions, operators: Sequence[Operator]) -> None:
    """Refuses operators that know no error of their gains where the number of samples is left open.

    Args:
        options: how batches are measured.
        operators: asked.

    Raises:
        GrowthError: there is one.
    """
    without = [operator for operator in operators if operator.folds == 1]
    if without and options.get("samples") == "auto":
        raise GrowthError(
            f"samples='auto' takes as many as the error of a held-out gain asks for, and {without[0]!r} has no folds. "
            "Give folds of at least 2, or a number of samples."
        )


def enlarged(objective: Objective, growths: Sequence[Growth]) -> bool:
    """Draws more samples, if those that were measured are too few.

    Args:
        objective: what was measured.
        growths: what was found.

    Returns:
        Whether there are more, so that all is to be measured again; not where that would take too long.
    """
    batches, limits = objective.batches, objective.limits
    held_out = [growth for growth in growths if growth.heldout_gain is not None]
    if not isinstance(batches, DrawnSamples) or not batches.auto or (growths and not held_out):
        return False
    factor = float(AT_ONCE)
    if held_out:
        best = max(held_out, key=expected_gain)
        assert best.heldout_gain is not None
        factor = best.samples_for(WANTED) / best.samples if best.heldout_gain > 0 else factor
    factor = min(factor, AT_ONCE, MOST / batches.count)
    if (
        factor <= NEARLY
        or not limits.allow(factor * limits.spent)
        or not batches.enlarge(round(factor * batches.count))
    ):
        return False
    limits.taken.clear()  # with more samples places take longer
    return True


def judge_of(objective: Objective) -> Objective:
    """The loss by which amplitudes are chosen where no batches were given for that.

    Args:
        objective: what is measured.

    Returns:
        Where samples are drawn, the same loss on others.
    """
    batches = objective.batches
    return objective.with_batches(batches.others) if isinstance(batches, DrawnSamples) else objective
