"""Letters of products are those of einsum."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dagrow.layers import Contraction, contraction

EQUATIONS = ["ij,jk->ik", "bij, bkj -> bik", "...td,...sd->...ts", "i,j->ij", "ij,jk", "bhst,bhtd->bshd", "...i,...i"]


def agrees(product: Contraction | None, left: Tensor, right: Tensor, expected: Tensor) -> None:
    assert product is not None
    torch.testing.assert_close(torch.einsum(f"{product.left},{product.right}->{product.out}", left, right), expected)
    aligned = torch.mul(*product.aligned(left, right))
    torch.testing.assert_close(aligned.flatten(expected.ndim).sum(-1) if product.summed else aligned, expected)


@pytest.mark.parametrize(
    ("left", "right"),
    [((3, 4), (4, 5)), ((2, 3, 4), (4, 5)), ((2, 3, 4), (2, 4, 5)), ((4,), (4, 5)), ((2, 3, 4), (4,)), ((4,), (4,))],
)
def test_products_of_matrices(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    a, b = torch.rand(left), torch.rand(right)
    agrees(contraction("matmul", (a, b)), a, b, a @ b)


@pytest.mark.parametrize("equation", EQUATIONS)
def test_equations_of_two_operands(equation: str) -> None:
    sizes = {"b": 2, "h": 3, "i": 4, "j": 5, "k": 6, "s": 7, "t": 8, "d": 9}
    sides = equation.partition("->")[0].replace(" ", "").replace("...", "bh").split(",")
    a, b = (torch.rand([sizes[letter] for letter in side]) for side in sides)
    agrees(contraction("einsum", (equation, a, b)), a, b, torch.einsum(equation, a, b))


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("einsum", ("ii,ij->ij", torch.rand(3, 3), torch.rand(3, 4))),  # a diagonal
        ("einsum", ("ij,jk->i", torch.rand(3, 4), torch.rand(4, 5))),  # sums over what one operand has alone
        ("einsum", ("ij->ji", torch.rand(3, 4))),
        ("matmul", (torch.rand(3, 4), 2.0)),
        ("add", (torch.rand(3, 4), torch.rand(3, 4))),
    ],
)
def test_what_is_no_product_of_two_tensors(name: str, args: tuple[Any, ...]) -> None:
    assert contraction(name, args) is None


def test_equations_that_are_known_have_a_letter_for_each_dimension() -> None:
    product = Contraction.over("...td,...sd->...ts", 4, 3)
    assert (len(product.left), len(product.right), len(product.out)) == (4, 3, 4)
    assert product.summed == "d"
