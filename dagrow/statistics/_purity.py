"""Whether a loss is a function of a batch and the model, and changes neither."""

import torch
from torch import Tensor, nn

from dagrow.errors import LossError


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
