"""What users give as a loss: a function of output and target, or a step of model and batch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dagrow.errors import BatchError, LossError, NotFiniteError
from dagrow.statistics._batches import description, sample_count
from dagrow.tracing import bind

Loss = Callable[[Any, Any], Tensor]
Step = Callable[[nn.Module, Any], Tensor]


def check_callable(loss: object, step: object) -> None:
    """Refuses what cannot be called, and two where one belongs.

    Args:
        loss: what was given as ``loss``.
        step: what was given as ``step``.

    Raises:
        LossError: there is none, or two, or it is no function.
    """
    if (loss is None) == (step is None):
        raise LossError("give either loss=, called as loss(output, target), or step=, called as step(model, batch).")
    if not callable(loss if step is None else step):
        kind = type(loss if step is None else step).__name__
        raise LossError(
            f"the {'loss' if step is None else 'step'} is a {kind}, which cannot be called; give loss=, called as "
            "loss(output, target), such as torch.nn.functional.mse_loss, or step=, called as step(model, batch)."
        )


def supervised(loss: Loss | None, dim: int) -> Step:
    """The step of a loss, on batches of ``(inputs, target)``.

    Args:
        loss: of an output and a target.
        dim: along which samples lie.

    Returns:
        A step of a model and a batch; it raises BatchError for batches of another kind.
    """
    assert loss is not None

    def step(model: nn.Module, batch: object) -> Tensor:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise BatchError(
                f"a batch is {description(batch)}; it must be (inputs, target). One batch alone goes into a list, "
                "[(inputs, target)]; for other batches, give step=, called as step(model, batch)."
            )
        n, target = sample_count(batch, dim), batch[1]
        if isinstance(target, Tensor) and target.ndim and len(target) % n and dim == 0:
            raise BatchError(
                f"a batch has {n} inputs and {len(target)} targets: {description(batch)}. Give as many of each."
            )
        args, kwargs = bind(batch[0])
        return loss(model(*args, **kwargs), target)

    return step


def checked_scalar(value: object, batch: object) -> Tensor:
    """What a loss returned, as a tensor without dimensions.

    Args:
        value: what it returned.
        batch: for messages.

    Returns:
        The number.

    Raises:
        LossError: it is something else.
        NotFiniteError: it is not finite.
    """
    if not isinstance(value, Tensor) or value.numel() != 1:
        kind = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise LossError(
            f"the loss returned {kind}; it must return a tensor with one number, the mean or the sum over the samples "
            "of the batch."
        )
    if not torch.isfinite(value):
        raise NotFiniteError(
            f"the loss is {value.item()} on a batch of {description(batch)}; growth needs finite losses. Look for such "
            "values in the batch and in the model's parameters, or lower the learning rate."
        )
    return value.reshape(())
