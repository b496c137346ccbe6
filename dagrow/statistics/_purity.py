"""Whether a loss is a function of a batch and the model, and changes neither."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dagrow.errors import LossError
from dagrow.statistics._batches import mark_of


class Untouched:
    """Remembers a model before a loss is evaluated on it.

    Args:
        model: its gradients are None.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.versions = self._versions()

    def check(self) -> None:
        """After the evaluation.

        Raises:
            LossError: it trains the model.
        """
        way_out = (
            "give a loss or a step that computes the loss and leaves backward() and optimizer.step() to the training "
            "loop."
        )
        if self.versions != self._versions():
            raise LossError(f"evaluating the loss changes the model's weights; {way_out}")
        if any(parameter.grad is not None for parameter in self.model.parameters()):
            raise LossError(f"evaluating the loss runs backward(), which leaves gradients at the weights; {way_out}")

    def _versions(self) -> list[int]:
        return [parameter._version for parameter in self.model.parameters()]


def check_same(first: Tensor, again: Tensor) -> None:
    """A loss that is evaluated again gives the same.

    Args:
        first: of a batch.
        again: of the same batch, after that of another one, if there is one.

    Raises:
        LossError: they differ.
    """
    allowed = torch.finfo(first.dtype).eps ** 0.5 if first.is_floating_point() else 0.0
    a, b = float(first.detach()), float(again.detach())
    if abs(b - a) > allowed * abs(a):
        raise LossError(
            f"the loss of the same batch is {a:.9g} and then {b:.9g}, with the global random generators of torch, "
            "numpy and Python at the same seed. It draws from a generator of its own, or depends on how often it was "
            "called, and on what, as a running mean does; such numbers cannot be held while a growth is measured. Draw "
            "from the global generators; keep counters out of the loss, and running means in buffers of a module."
        )


class FirstLoss:
    """The loss of a batch without gradients, to be compared when it is measured with them.

    Args:
        value: the loss.
        batch: of which it is.
    """

    def __init__(self, value: Tensor, batch: object) -> None:
        self.value, self.mark = value, mark_of(batch)

    def check(self, batch: object, loss: Tensor, again: Callable[[], Tensor]) -> None:
        """The loss is the same, or evaluated without gradients it is.

        Args:
            batch: that was measured; nothing is compared if it is another one, or was overwritten.
            loss: its own.
            again: evaluates it once more as at first, as a loss may ask whether gradients are computed.

        Raises:
            LossError: it differs.
        """
        if mark_of(batch) != self.mark:
            return
        try:
            check_same(self.value, loss)
        except LossError:
            for _ in range(2):  # or one that comes and goes would seem to stay
                check_same(self.value, again())
