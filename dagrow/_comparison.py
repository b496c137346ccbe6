"""What rounding can do to what a model computes: about as much as weights that are off in their last digit."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

DRAWS = 4
FACTOR = 10.0  #: differences within so many times those that jittered weights make are rounding


def jittered(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """A few times all parameters, every entry off by up to the relative precision of its type. Always the same.

    Where large terms cancel, as behind inputs with heavy tails, other widths come to visibly other sums: matrix
    products add in another order. Jitter of the weights meets the same cancellation.
    """
    generator = torch.Generator().manual_seed(0)
    for _ in range(DRAWS):
        yield {
            name: _off(parameter.detach(), generator)
            for name, parameter in model.named_parameters()
            if parameter.is_floating_point()
        }


def _off(parameter: Tensor, generator: torch.Generator) -> Tensor:
    noise = 2 * torch.rand(parameter.shape, generator=generator, dtype=torch.float64) - 1
    scale = 1 + torch.finfo(parameter.dtype).eps * noise
    return (parameter.cpu().double() * scale).to(parameter)
