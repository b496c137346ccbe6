"""Whether learning rates are as high as they were, while a network grows."""

import warnings
from collections.abc import Sequence

from torch.optim import Optimizer


class HeldRates:
    """Warns, once, where one grows although learning rates have fallen, so that what is new hardly learns.

    Args:
        optimizers: of the training.
    """

    FALLEN = 0.5  #: of the largest rate: below it new weights go a small part of the way that the others had

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self.optimizers, self.largest, self.warned = optimizers, 0.0, False
        self.look()

    def look(self, grown: bool = False) -> None:
        """Compares the largest rate now with the largest so far.

        Args:
            grown: whether something was added just now.
        """
        rates = [float(group["lr"]) for each in self.optimizers for group in each.param_groups if "lr" in group]
        now = max(rates, default=0.0)
        self.largest = max(self.largest, now)
        if grown and not self.warned and now < self.FALLEN * self.largest:
            self.warned = True
            warnings.warn(
                f"the model grows while its learning rate falls: it is {now:.3g}, and was {self.largest:.3g}. What is "
                "new has little time to learn. Hold the rate until growing is over, and lower it then: "
                "dagrow.AnnealAfterGrowing(optimizer, grower, steps), or dagrow.fit(..., scheduler='anneal').",
                stacklevel=4,
            )
