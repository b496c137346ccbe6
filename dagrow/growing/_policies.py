"""Which growth first: a policy gives every growth a value, from what was measured or by training copies."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import count, islice
from math import inf, isnan
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from dagrow._log import LOG
from dagrow._model_state import preserve_state
from dagrow._progress import progress_bar
from dagrow.errors import SEEDS, GrowthError, NotFiniteError, check_real, check_whole, first_line
from dagrow.growing._left_out import is_of_place
from dagrow.growing._line_search import best_amplitude
from dagrow.statistics import Objective
from dagrow.surgery import Growth, check_steps, grown


def expected_gain(growth: Growth) -> float:
    """What a growth is expected to bring: its held-out gain, or its gain where there are no folds."""
    return growth.gain if growth.heldout_gain is None else growth.heldout_gain


class Policy(ABC):
    """How growths compare. Subclass it as a frozen dataclass and hand it to ``dagrow.plan`` or ``dagrow.Grower``."""

    @abstractmethod
    def values(self, growths: Sequence[Growth], judge: Objective, past: Sequence[str]) -> Sequence[float]:
        """One number for each growth: the largest is taken first, one below 0 never, but for units that go, which cost.

        It must not change the model.

        Args:
            growths: of one dag, all measured on the model as it is.
            judge: the loss on the batches that choose: those for validation, if there are any.
            past: where was grown before, oldest first.

        Returns:
            The values, in the order of the growths.
        """


def with_values(
    growths: Sequence[Growth], policy: Policy, judge: Objective, past: Sequence[str]
) -> dict[Growth, float]:
    """Each growth with its value; a GrowthError if the policy does not give one number for each."""
    numbers = policy.values(growths, judge, past)
    try:
        values = [float(number) for number in numbers]
    except (TypeError, ValueError):
        values = []
    if len(values) != len(growths) or any(map(isnan, values)):
        raise GrowthError(f"{policy!r} gave the values {numbers} for {len(growths)} growths; give one number for each.")
    return dict(zip(growths, values, strict=True))


@dataclass(frozen=True)
class ByGain(Policy):
    """The largest gain first."""

    def values(self, growths: Sequence[Growth], judge: Objective, past: Sequence[str]) -> list[float]:
        return [expected_gain(growth) for growth in growths]


@dataclass(frozen=True)
class ByGainPerParameter(Policy):
    """The largest gain per parameter first, or the smallest loss per parameter that goes. No parameters are free."""

    def values(self, growths: Sequence[Growth], judge: Objective, past: Sequence[str]) -> list[float]:
        return [_per(expected_gain(growth), growth.cost.parameters) for growth in growths]


@dataclass(frozen=True)
class ByGainPerFlop(Policy):
    """The largest gain per floating point operation first, or the smallest loss per one that goes. None is free."""

    def values(self, growths: Sequence[Growth], judge: Objective, past: Sequence[str]) -> list[float]:
        return [_per(expected_gain(growth), growth.cost.flops) for growth in growths]


def _per(gain: float, cost: int) -> float:
    if cost:
        return gain / abs(cost)
    return inf if gain > 0 else gain


@dataclass(frozen=True)
class RoundRobin(Policy):
    """The place first that was grown longest ago; among places that never grew, the one with the largest gain."""

    def values(self, growths: Sequence[Growth], judge: Objective, past: Sequence[str]) -> list[float]:
        last = {where: turn for turn, where in enumerate(past)}
        return [float(len(past) - last.get(growth.where, -1)) for growth in growths]


@dataclass(frozen=True)
class ByLineSearch(Policy):
    """What lowers the loss most at once, at the amplitude that a line search finds, first.

    A gain is a slope, by how much the loss falls per unit of amplitude, and units differ between places: where the loss
    depends little on an activation, the best amplitude is large. The fall of the loss at that amplitude has one unit
    everywhere. It costs up to 16 evaluations of the loss for each growth on the batches that choose.

    What lowers it at no amplitude is never chosen. What leaves the function as it is comes last, and then units that
    go, those first without which the loss is lowest.
    """

    def values(self, growths: Sequence[Growth], judge: Objective, past: Sequence[str]) -> list[float]:
        with progress_bar(judge.progress):
            before = judge.mean()
            return [0.0 if growth.preserving else self._fall(growth, judge, before) for growth in growths]

    @staticmethod
    def _fall(growth: Growth, judge: Objective, before: float) -> float:
        try:
            gamma, after = (1.0, growth.loss(1.0, judge)) if growth.removes else best_amplitude(growth, judge, before)
        except Exception as error:
            if not is_of_place(error, growth.dag, judge, grown=True):
                raise
            LOG.info("left out %s: %s", growth.where, first_line(error))
            return -inf
        return before - after if gamma else -inf


EXPECTED = "give a class of torch.optim, or a function that is called as optimizer(parameters, lr=lr) and returns one"


@dataclass(frozen=True)
class ShortTraining(Policy):
    """Trains a copy of the model with each of the most promising growths, and one without any, for some steps.

    The value of a growth is by how much the loss on the batches that choose is lower with it than without, after equal
    training on the measured batches in the same order. Other growths are never chosen. The user's model and random
    numbers stay as they are. It costs ``(top + 1) * steps`` steps, and what ``first`` costs, for each plan, of which
    :class:`dagrow.Grower` makes one per growth.

    Args:
        steps: of training, for each copy.
        top: how many growths are tried.
        first: the policy by which those come first.
        optimizer: made anew for each copy, as ``optimizer(parameters, lr=lr)``.
        lr: its learning rate.
        seed: of what training draws at random, from torch, numpy and Python; for each pass over the batches the same
            for all copies.

    Raises:
        GrowthError: an argument does not fit; from ``values``: the model cannot be copied, or the optimizer not made.
        OptimizerError: from ``values``: the optimizer cannot take a step.
    """

    steps: int = 50
    top: int = 3
    optimizer: Callable[..., Optimizer] = torch.optim.Adam
    lr: float = 1e-3
    seed: int = 0
    first: Policy = ByLineSearch()

    def __post_init__(self) -> None:
        check_whole("ShortTraining", 1, steps=self.steps, top=self.top)
        check_whole("ShortTraining", 0, SEEDS, seed=self.seed)
        check_real("ShortTraining", 0, lr=self.lr)
        if not callable(self.optimizer):
            raise GrowthError(f"ShortTraining(optimizer=...): a {type(self.optimizer).__name__} was given; {EXPECTED}.")
        if not isinstance(self.first, Policy):
            raise GrowthError(f"ShortTraining(first={self.first!r}): give a policy, such as dagrow.ByGain().")

    def values(self, growths: Sequence[Growth], judge: Objective, past: Sequence[str]) -> list[float]:
        if not growths:
            return []
        values = with_values(growths, self.first, judge, past)
        best = sorted((growth for growth in growths if values[growth] >= 0), key=values.__getitem__, reverse=True)
        with progress_bar(judge.progress), preserve_state(growths[0].dag.model):
            without = self._trained(growths[0], None, judge)
            losses = {g: self._trained(g, self._amplitude(g, judge), judge) for g in best[: self.top]}
        return [_fall(without, losses.get(growth, inf)) for growth in growths]

    @staticmethod
    def _amplitude(growth: Growth, judge: Objective) -> float:
        return 1.0 if growth.is_whole else best_amplitude(growth, judge, judge.mean())[0]

    def _trained(self, growth: Growth, gamma: float | None, judge: Objective) -> float:
        """The loss of a trained copy, with the growth at an amplitude or without it; inf if training fails."""
        if gamma == 0:
            return inf
        dag = growth.dag
        with nullcontext() if gamma is None else grown(dag, growth.change, gamma):
            model = _copy(dag.model)
        try:
            self._train(growth.objective.with_model(model))
            return judge.with_model(model).mean()
        except NotFiniteError:  # it diverged
            return inf

    def _train(self, objective: Objective) -> None:
        parameters = [parameter for parameter in objective.model.parameters() if parameter.requires_grad]
        optimizer = self._new_optimizer(parameters)
        objective.model.train()
        with torch.enable_grad():
            for batch, _ in islice(self._passes(objective), self.steps):
                optimizer.zero_grad()
                objective.drawn_value(batch).backward()
                optimizer.step()

    def _passes(self, objective: Objective) -> Iterator[tuple[Any, int]]:
        """All batches again and again, in an order that does not depend on what the model drew before."""
        for turn in count(self.seed):
            yield from objective.read(turn, objective.max_batches)

    def _new_optimizer(self, parameters: Sequence[nn.Parameter]) -> Optimizer:
        try:
            optimizer = self.optimizer(parameters, lr=self.lr)
        except Exception as error:  # the user's optimizer may raise anything
            raise GrowthError(f"{self!r} cannot make its optimizer ({first_line(error)}); {EXPECTED}.") from error
        if not isinstance(optimizer, Optimizer):
            raise GrowthError(f"{self!r}: its optimizer comes out as a {type(optimizer).__name__}; {EXPECTED}.")
        check_steps(optimizer)
        return optimizer


def _copy(model: nn.Module) -> nn.Module:
    try:
        twin = copy.deepcopy(model)
    except Exception as error:  # whatever the model holds
        raise GrowthError(
            f"the {type(model).__name__} cannot be copied ({first_line(error)}), which short training needs; use "
            "another policy."
        ) from error
    twin.zero_grad()
    return twin


def _fall(without: float, loss: float) -> float:
    """By how much the loss is lower; a copy that diverged is worth nothing."""
    return -inf if loss == inf else without - loss
