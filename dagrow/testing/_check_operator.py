"""All laws for one operator, over models of one's own or a small built-in set."""

from collections.abc import Callable, Sequence

from torch import nn

from dagrow.operators import Operator
from dagrow.testing._cases import Case, built_in, case_of
from dagrow.testing._laws import additivity, descent, invariance, optimality, preservation, residual, slope
from dagrow.testing._laws_of_removal import narrowing
from dagrow.testing._laws_of_state import atomicity, regrowth, undoing

Law = Callable[[Operator, Case], None]
LAWS: tuple[Law, ...] = (
    preservation,
    slope,
    residual,
    optimality,
    additivity,
    invariance,
    undoing,
    regrowth,
    descent,
    atomicity,
    narrowing,
)


def check_operator(
    operator: Operator, models: Sequence[nn.Module | Case] | None = None, laws: Sequence[Law] = LAWS
) -> None:
    """Puts an operator through the laws.

    Args:
        operator: what is checked.
        models: what it is checked on; a model without a case gets random numbers that fit its first layer. By default
            a small built-in set.
        laws: those that are to hold.

    Raises:
        AssertionError: a law does not hold, or the operator proposes nothing on any of the models.
    """
    models = built_in() if models is None else models
    cases = [model if isinstance(model, Case) else case_of(model) for model in models]
    assert any(case.propose(operator, case.copy()) for case in cases), f"{operator!r} proposes nothing"
    for case in cases:
        for law in laws:
            try:
                law(operator, case)
            except AssertionError as error:
                where = case.name or type(case.model).__name__
                raise AssertionError(f"{law.__name__} of {operator!r} on {where}: {error}") from error
