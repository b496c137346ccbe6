"""Nests of containers: what torch's pytree knows, slices, and dataclasses that it does not know."""

import dataclasses
from collections.abc import Callable, Iterator
from copy import copy
from functools import partial
from typing import Any, TypeVar

import torch.utils._pytree as pytree
from torch import Tensor
from torch.nn import Parameter

T = TypeVar("T")
_LEAVES = frozenset((Tensor, Parameter, bool, int, float, str, type(None)))  #: which most are
_PLAIN = (tuple, list, dict, slice)
_SLICE = ("start", "stop", "step")


def container_level(value: Any) -> tuple[list[tuple[Any, Any]], Callable[[list[Any]], Any]] | None:
    """One level of a container: its (key, child) pairs and how to build it from others; None for a leaf."""
    kind = type(value)
    if kind in _LEAVES:
        return None
    if kind is tuple or kind is list:
        return [(pytree.SequenceKey(i), child) for i, child in enumerate(value)], kind
    if kind is dict:
        return [(pytree.MappingKey(key), child) for key, child in value.items()], partial(_rekeyed, list(value))
    if kind is slice:
        return [(pytree.GetAttrKey(name), getattr(value, name)) for name in _SLICE], lambda children: slice(*children)
    if kind not in pytree.SUPPORTED_NODES and not isinstance(value, tuple):
        if not dataclasses.is_dataclass(value) or isinstance(value, type):
            return None
        names = [f.name for f in dataclasses.fields(value) if hasattr(value, f.name)]
        return [(pytree.GetAttrKey(name), getattr(value, name)) for name in names], partial(_refilled, value, names)
    flat, spec = pytree.tree_flatten(value, is_leaf=lambda v: v is not value)
    if spec.is_leaf():
        return None
    try:
        keys = [path[0] for path, _ in pytree.tree_flatten_with_path(value, is_leaf=lambda v: v is not value)[0]]
    except ValueError:
        keys = [pytree.SequenceKey(i) for i in range(len(flat))]
    return list(zip(keys, flat, strict=True)), lambda children: pytree.tree_unflatten(children, spec)


def _rekeyed(keys: list[Any], children: list[Any]) -> dict[Any, Any]:
    return dict(zip(keys, children, strict=True))


def _refilled(value: T, names: list[str], children: list[Any]) -> T:
    twin = copy(value)
    for name, child in zip(names, children, strict=True):
        object.__setattr__(twin, name, child)
    return twin


def mapped(function: Callable[[Any], Any], tree: Any) -> Any:
    """The same nest of containers with `function` applied to every leaf, in the order of `leaves`."""
    level = container_level(tree)
    if level is None:
        return function(tree)
    return level[1]([mapped(function, child) for _, child in level[0]])


def leaves(tree: object, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, leaf) for every leaf of a nest of containers; paths read like Python: `['logits'][0]`."""
    level = container_level(tree)
    if level is None:
        yield path, tree
        return
    for key, child in level[0]:
        yield from leaves(child, f"{path}{key}")


def leaf_values(tree: object) -> Iterator[Any]:
    """Every leaf of a nest of containers."""
    if isinstance(tree, (tuple, list)):  # what nests are, mostly
        children = iter(tree)
    elif isinstance(tree, dict):
        children = iter(tree.values())
    elif (level := container_level(tree)) is not None:
        children = (child for _, child in level[0])
    else:
        yield tree
        return
    for child in children:
        yield from leaf_values(child)


def tensors_in(tree: object) -> list[Tensor]:
    """Every tensor in a nest of containers."""
    return [value for value in leaf_values(tree) if isinstance(value, Tensor)]


def is_plain(value: object) -> bool:
    """Whether a nest has no other containers than tuples, lists, dicts and slices."""
    level = container_level(value)
    return level is None or (type(value) in _PLAIN and all(is_plain(child) for _, child in level[0]))
