"""Products of two activations that sum over shared dimensions: matmul and its kin, einsum, attention."""

from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_letters
from typing import Any

from torch import Tensor

ATTENTION = "scaled_dot_product_attention"
ATTENTION_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale")
_PRODUCTS = {"matmul", "bmm", "mm", "sparse_mm", "spmm", "smm", "hspmm"}
_MOST = 10  #: dimensions that an ellipsis may stand for


@dataclass(frozen=True)
class Contraction:
    """``out = sum left right`` in the letters of einsum, one for each dimension.

    Attributes:
        left, right, out: letters of the operands' and the result's dimensions.
    """

    left: str
    right: str
    out: str

    @property
    def summed(self) -> str:
        """Letters of the dimensions that are summed over."""
        return "".join(letter for letter in self.left if letter in self.right and letter not in self.out)

    @staticmethod
    def over(equation: str, left: int, right: int) -> "Contraction":
        """Of an equation with an ellipsis.

        Args:
            equation: as einsum takes it.
            left: dimensions of the first operand.
            right: dimensions of the second.

        Returns:
            The contraction with a letter for each dimension.
        """
        contraction = _einsum(equation, left, right)
        assert contraction is not None
        return contraction

    def aligned(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Both operands over all letters, those of the result first; one that an operand lacks has size 1.

        Args:
            left: with the dimensions :attr:`left`.
            right: with the dimensions :attr:`right`.

        Returns:
            Both, with the dimensions of :attr:`out` and then :attr:`summed`.
        """
        return self._over(self.left, left), self._over(self.right, right)

    def _over(self, letters: str, operand: Tensor) -> Tensor:
        all_letters = self.out + self.summed
        operand = operand.permute([letters.index(letter) for letter in all_letters if letter in letters])
        for dim, letter in enumerate(all_letters):
            operand = operand if letter in letters else operand.unsqueeze(dim)
        return operand


def contraction(name: str | None, args: Sequence[Any]) -> Contraction | None:
    """What a call sums over.

    Args:
        name: of the operation.
        args: of the call.

    Returns:
        None if it is no product of two tensors, or sums over dimensions of one alone.
    """
    if name in _PRODUCTS and len(args) == 2 and all(isinstance(arg, Tensor) for arg in args):
        return _product(args[0].ndim, args[1].ndim)
    if name == "einsum" and len(args) == 3 and isinstance(args[0], str):
        return _einsum(args[0], args[1].ndim, args[2].ndim)
    return None


def _product(left: int, right: int) -> Contraction:
    """Of tensors with so many dimensions."""
    batch = ascii_letters[3 : 3 + max(left, right) - 2]
    rows, columns = "i" * (left > 1), "k" * (right > 1)
    return Contraction(
        batch[len(batch) - max(0, left - 2) :] + rows + "j",
        batch[len(batch) - max(0, right - 2) :] + "j" + columns,
        batch + rows + columns,
    )


def _einsum(equation: str, left: int, right: int) -> Contraction | None:
    equation = equation.replace(" ", "")
    sides = equation.partition("->")[0].split(",")
    if len(sides) != 2:
        return None
    free = "".join(letter for letter in ascii_letters if letter not in equation)[:_MOST]
    rests = [ndim - len(side.replace("...", "")) for side, ndim in zip(sides, (left, right), strict=True)]
    first, second = (side.replace("...", free[_MOST - rest :]) for side, rest in zip(sides, rests, strict=True))
    named = "".join(sides).replace(".", "")
    implicit = "..." * ("." in equation) + "".join(x for x in sorted(named) if named.count(x) == 1)
    out = equation.partition("->")[2] if "->" in equation else implicit
    out = out.replace("...", free[_MOST - max(rests) :])
    no_diagonals = all(len(set(letters)) == len(letters) for letters in (first, second, out))
    of_one_alone = set(first) ^ set(second)
    is_product = no_diagonals and of_one_alone <= set(out) <= set(first + second)
    return Contraction(first, second, out) if is_product else None
