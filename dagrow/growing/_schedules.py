"""When to grow, and when to stop growing: small frozen values that read the records so far."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from dagrow.errors import check_real, check_whole
from dagrow.pictures import Record


@dataclass(frozen=True)
class Situation:
    """What a schedule decides on.

    Attributes:
        epoch: as it was given to ``Grower.step``.
        loss: now, on the batches for validation, or where there are none on those for training.
        past: the records of the steps before.
        measure: measures :attr:`share`.
    """

    epoch: int
    loss: float
    past: Sequence[Record]
    measure: Callable[[], float] = field(repr=False)

    @cached_property
    def share(self) -> float:
        """The part of all goals that no layer's own weights can follow, 0 to 1. It is measured when first read."""
        return self.measure()


class Schedule(ABC):
    """When to grow. Subclass it as a frozen dataclass."""

    @abstractmethod
    def due(self, now: Situation) -> bool:
        """Whether to look for growths now.

        Args:
            now: the epoch, its loss, and the records so far.

        Returns:
            True if it is time.
        """


@dataclass(frozen=True)
class EveryEpochs(Schedule):
    """In every epoch that ``every`` divides, from epoch ``first`` on.

    Attributes:
        every: how many epochs there are from one growth to the next.
        first: the first epoch in which it may grow.
    """

    every: int = 1
    first: int = 0

    def __post_init__(self) -> None:
        check_whole("EveryEpochs", 1, every=self.every)
        check_whole("EveryEpochs", first=self.first)

    def due(self, now: Situation) -> bool:
        return now.epoch >= self.first and now.epoch % self.every == 0


@dataclass(frozen=True)
class OnPlateau(Schedule):
    """When the loss has not fallen by ``tolerance``, relative to itself, within the last ``patience`` steps.

    Steps count from the last one in which growing was asked for, so that what was added is trained first.

    Attributes:
        patience: how many steps the loss is watched.
        tolerance: a relative fall of the loss that counts.
    """

    patience: int = 3
    tolerance: float = 1e-2

    def __post_init__(self) -> None:
        check_whole("OnPlateau", 1, patience=self.patience)
        check_real("OnPlateau", above=0, tolerance=self.tolerance)

    def due(self, now: Situation) -> bool:
        asked = max((index for index, record in enumerate(now.past) if record.asked), default=-1)
        losses = [*(record.loss for record in now.past[asked + 1 :]), now.loss]
        if len(losses) <= self.patience:
            return False
        before, after = min(losses[: -self.patience]), min(losses[-self.patience :])
        return after > before - self.tolerance * abs(before)


@dataclass(frozen=True)
class OnBottleneck(Schedule):
    """When at least ``share`` of all goals is out of reach of the layers' own weights: they have little left to learn.

    It is measured at every step, by one pass over the batches.

    Attributes:
        share: of all goals, from 0 to 1.
    """

    share: float = 0.9

    def __post_init__(self) -> None:
        check_real("OnBottleneck", above=0, most=1, share=self.share)

    def due(self, now: Situation) -> bool:
        return now.share >= self.share


class StopRule(ABC):
    """When growing is over for good. Training may go on. Subclass it as a frozen dataclass."""

    @abstractmethod
    def over(self, past: Sequence[Record]) -> str | None:
        """Why growing is over, after the step whose record is the last.

        Args:
            past: the records so far.

        Returns:
            The reason, or None if growing goes on.
        """


@dataclass(frozen=True)
class NothingToAdd(StopRule):
    """When nothing was worth adding, or fitted the budget, the last ``times`` times that growing was asked for.

    Attributes:
        times: how often in a row.
    """

    times: int = 2

    def __post_init__(self) -> None:
        check_whole("NothingToAdd", 1, times=self.times)

    def over(self, past: Sequence[Record]) -> str | None:
        asked = [record for record in past if record.asked][-self.times :]
        if len(asked) < self.times or any(record.added for record in asked):
            return None
        return f"nothing was worth adding {self.times} times in a row"


@dataclass(frozen=True)
class NoImprovement(StopRule):
    """When the last ``times`` steps that added something have brought no lower loss than the best before them.

    Attributes:
        times: how many steps that added something.
    """

    times: int = 3

    def __post_init__(self) -> None:
        check_whole("NoImprovement", 1, times=self.times)

    def over(self, past: Sequence[Record]) -> str | None:
        grew = [index for index, record in enumerate(past[:-1]) if record.added]
        if len(grew) < self.times:
            return None
        first = grew[-self.times] + 1  # the loss of a record is that before growing
        if min(record.loss for record in past[first:]) < min(record.loss for record in past[:first]):
            return None
        return f"{self.times} growths in a row brought no lower loss"


@dataclass(frozen=True)
class LossReached(StopRule):
    """When the loss is as low as asked.

    Attributes:
        loss: validation loss, or training loss where there is none.
    """

    loss: float

    def __post_init__(self) -> None:
        check_real("LossReached", loss=self.loss)

    def over(self, past: Sequence[Record]) -> str | None:
        return f"the loss reached {past[-1].loss:.4g}" if past and past[-1].loss <= self.loss else None


@dataclass(frozen=True)
class AfterEpoch(StopRule):
    """After an epoch, so that the epochs after it train what was added last.

    Attributes:
        epoch: the last in which it grows.
    """

    epoch: int

    def __post_init__(self) -> None:
        check_whole("AfterEpoch", epoch=self.epoch)

    def over(self, past: Sequence[Record]) -> str | None:
        return f"epoch {self.epoch} is over" if past and past[-1].epoch >= self.epoch else None
