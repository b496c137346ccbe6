"""Nests of containers are walked in one order, and built again as they were."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch

from dagrow._pytree import is_plain, leaf_values, leaves, mapped, tensors_in


class Pair(NamedTuple):
    left: Any
    right: Any


@dataclass
class Output:
    logits: Any
    hidden: Any = None


TREE = {"a": [1, (2, Pair(3, slice(4, None, 5)))], "b": Output((), [torch.ones(2)])}
PATHS = ["['a'][0]", "['a'][1][0]", "['a'][1][1].left", "['a'][1][1].right.start", "['a'][1][1].right.stop"]
PATHS += ["['a'][1][1].right.step", "['b'].hidden[0]"]


def test_paths_read_like_python() -> None:
    assert [path for path, _ in leaves(TREE)] == PATHS


def test_leaves_come_in_one_order() -> None:
    assert [id(value) for value in leaf_values(TREE)] == [id(value) for _, value in leaves(TREE)]
    assert list(leaf_values(TREE))[:6] == [1, 2, 3, 4, None, 5]
    assert len(tensors_in(TREE)) == 1


def test_a_nest_is_built_again() -> None:
    twin = mapped(lambda leaf: leaf if leaf is None else leaf + 1, TREE)
    assert twin["a"] == [2, (3, Pair(4, slice(5, None, 6)))]
    assert isinstance(twin["b"], Output)
    assert twin["b"].logits == ()
    assert torch.equal(twin["b"].hidden[0], torch.full((2,), 2.0))


@pytest.mark.parametrize(("tree", "plain"), [([{"a": slice(1, 2)}], True), ([Pair(1, 2)], False), (Output(1), False)])
def test_plain_nests(tree: Any, plain: bool) -> None:
    assert is_plain(tree) is plain
