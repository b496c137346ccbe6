"""Learning rates of a training that grows: held while it grows, and lowered once growing is over."""

import warnings
from math import cos, pi
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dagrow.errors import check_whole
from dagrow.growing._grower import Grower


class AnnealAfterGrowing(LRScheduler):
    """Holds learning rates while a grower grows; once growing is over they fall to zero along half a cosine.

    In step t of T, where growing was over before step t0, a rate is ``lr (1 + cos(pi (t - t0) / (T - t0))) / 2``. The
    cosine is that of Loshchilov and Hutter 2017, without restarts.

    Args:
        optimizer: whose rates it sets. ``lr`` is that of each group now, or, where another scheduler has set it before,
            its ``initial_lr``.
        grower: that it follows. Give it a budget or a stop rule: where growing is never over, rates never fall, and a
            warning says so.
        steps: T, how often it is going to step: the epochs of a training, or its batches.

    Raises:
        GrowthError: steps is no positive number.

    >>> import torch
    >>> import dagrow
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1), torch.nn.Tanh(), torch.nn.Linear(1, 1))
    >>> adam, dag = torch.optim.Adam(model.parameters(), lr=0.1), dagrow.trace(model, torch.zeros(2, 2))
    >>> x = torch.rand(40, 2)
    >>> grower = dagrow.Grower(dag, torch.nn.functional.mse_loss, stop=[dagrow.AfterEpoch(1)], optimizer=adam)
    >>> scheduler, rates = dagrow.AnnealAfterGrowing(adam, grower, 6), []
    >>> for epoch in range(6):
    ...     rates.append(round(adam.param_groups[0]["lr"], 3))
    ...     _ = grower.step(epoch, [(x, x[:, :1])])
    ...     adam.step()
    ...     scheduler.step()
    >>> rates
    [0.1, 0.1, 0.1, 0.085, 0.05, 0.015]
    """

    def __init__(self, optimizer: Optimizer, grower: Grower, steps: int) -> None:
        check_whole("AnnealAfterGrowing", 1, steps=steps)
        self.grower, self.steps = grower, steps
        self.begun: int | None = None  #: the first step after growing was over
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        """The rates of the step that begins, one for each group of parameters."""
        step = self.last_epoch
        if self.begun is None and self.grower.over is not None:
            self.begun = step
        if self.begun is None:
            if step == self.steps:
                warnings.warn(
                    f"all {self.steps} steps are over, and the grower is still growing, so that learning rates were "
                    "never lowered. Give it a budget, or a stop rule such as dagrow.AfterEpoch.",
                    stacklevel=3,
                )
            return list(self.base_lrs)
        left = max(self.steps - self.begun, 1)
        part = min((step - self.begun) / left, 1.0)
        return [rate * (1 + cos(pi * part)) / 2 for rate in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """All but the optimizer and the grower."""
        return {key: value for key, value in super().state_dict().items() if key != "grower"}
