"""One model on samples of several rows, and steps that hand it these rows in another order, or in several calls."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokens import N, Tokens, data, loss
from torch import Tensor, nn
from torch.nn import functional

import dagrow

ROWS = 3
SIZES = (7, 3, 20, 60)  #: of batches; one has as many samples as rows
Batch = tuple[Tensor, Tensor]


def batches() -> list[Batch]:
    return list(zip(*(tensor.split(SIZES) for tensor in data(ROWS)), strict=True))


def found(
    step: Callable[[nn.Module, Any], Tensor],
    given: list[Any] | None = None,
    operator: dagrow.Operator | None = None,
    **options: Any,
) -> dagrow.Growth:
    """The growth of the first axis."""
    model, operator = Tokens(), operator or dagrow.AddNeurons(k=2)
    dag = dagrow.trace(model, options.pop("example", data(ROWS)[0][:2]))
    growths = dagrow.propose(dag, given or batches(), step=step, operators=[operator], **options)
    return next(growth for growth in growths if growth.where in ("one", "two"))


def plain(model: nn.Module, batch: Batch) -> Tensor:
    return loss(model(batch[0]), batch[1])


def agree(growth: dagrow.Growth, expected: dagrow.Growth, scale: float = 1.0) -> None:
    """The same gain, per sample or per row, the same error, and as much more than chance."""
    for name in ("gain", "heldout_gain", "heldout_error"):
        assert getattr(growth, name) * scale == pytest.approx(getattr(expected, name), rel=1e-7)
    assert growth.z == pytest.approx(expected.z, rel=1e-7)
    assert growth.samples == expected.samples


def check_slope(growth: dagrow.Growth, h: float = 1e-4) -> None:
    """Minus the gain, by a difference that is exact to the fourth order."""
    first, second = ((growth.loss(g) - growth.loss(-g)) / (2 * g) for g in (h, 2 * h))
    assert (4 * first - second) / 3 == pytest.approx(-growth.gain, rel=1e-5)


def together(model: nn.Module, batch: Batch) -> Tensor:
    """Rows of a sample one after another."""
    x, y = batch
    return loss(model(x.flatten(0, 1)).view_as(y), y)


def one_after_another(model: nn.Module, batch: Batch) -> Tensor:
    """The first rows of all samples, then the second ones."""
    x, y = batch
    return loss(torch.stack(model(torch.cat(x.unbind(1))).chunk(ROWS), 1), y)


def in_calls(model: nn.Module, batch: Batch) -> Tensor:
    x, y = batch
    return loss(torch.stack([model(row) for row in x.unbind(1)], 1), y)


def in_parts(model: nn.Module, batch: Batch) -> Tensor:
    x, y = batch
    return loss(torch.cat([model(part) for part in x.split(8)]), y)


def turned(model: nn.Module, batch: Batch) -> Tensor:
    x, y = batch
    return loss(model(x.transpose(0, 1)).transpose(0, 1), y)


def of_sizes(model: nn.Module, batch: Batch) -> Tensor:
    """Two rows in one call, one in another."""
    x, y = batch
    return loss(torch.cat([model(x[:, :2]), model(x[:, 2:])], 1), y)


def beside_a_target(model: nn.Module, batch: Batch) -> Tensor:
    """A call that the loss does not look through, although its output enters it."""
    with torch.no_grad():
        target = model(-batch[0])
    return plain(model, batch) + 0 * functional.mse_loss(target, batch[1])


def beside_a_detached_target(model: nn.Module, batch: Batch) -> Tensor:
    return plain(model, batch) + 0 * functional.mse_loss(model(-batch[0]).detach(), batch[1])


STEPS = [
    together,
    one_after_another,
    in_calls,
    in_parts,
    turned,
    of_sizes,
    beside_a_target,
    beside_a_detached_target,
]
assert sum(SIZES) == N
