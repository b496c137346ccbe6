"""Nests of containers: what pytree knows, and dataclasses that it does not know."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from copy import copy
from functools import partial
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor
from torch.fx.node import map_aggregate
from torch.nn import Parameter

_LEAVES = frozenset((Tensor, Parameter, bool, int, float, str))  #: which most are


def opened(value: Any) -> tuple[list[tuple[Any, Any]], Callable[[list[Any]], Any]] | None:
    """One level of a container: its (key, child) pairs and how to build it from others; None for a leaf.

    Containers are what pytree knows, and dataclasses that it does not know (rebuilt as shallow copies).
    """
    if type(value) in _LEAVES:
        return None
    if dataclasses.is_dataclass(value) and not isinstance(value, type) and type(value) not in pytree.SUPPORTED_NODES:
        names = [f.name for f in dataclasses.fields(value) if hasattr(value, f.name)]
        pairs = [(pytree.GetAttrKey(name), getattr(value, name)) for name in names]
        return pairs, partial(_refilled, value, names)
    flat, spec = pytree.tree_flatten(value, is_leaf=lambda v: v is not value)
    if spec.is_leaf():
        return None
    try:
        keys = [path[0] for path, _ in pytree.tree_flatten_with_path(value, is_leaf=lambda v: v is not value)[0]]
    except ValueError:
        keys = [pytree.SequenceKey(i) for i in range(len(flat))]
    return list(zip(keys, flat, strict=True)), lambda children: pytree.tree_unflatten(children, spec)


def _refilled(value: Any, names: list[str], children: list[Any]) -> Any:
    twin = copy(value)
    for name, child in zip(names, children, strict=True):
        object.__setattr__(twin, name, child)
    return twin


def mapped(function: Callable[[Any], Any], tree: Any) -> Any:
    """The same nest of containers with `function` applied to every leaf, in the order of `leaves`."""
    level = opened(tree)
    if level is None:
        return function(tree)
    return level[1]([mapped(function, child) for _, child in level[0]])


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, leaf) for every leaf of a nest of containers; paths read like Python: `['logits'][0]`."""
    level = opened(tree)
    if level is None:
        yield path, tree
        return
    for key, child in level[0]:
        yield from leaves(child, f"{path}{key}")


def tensors(tree: Any) -> Iterator[Tensor]:
    """Every tensor in lists, tuples, dicts and slices."""
    found: list[Tensor] = []
    map_aggregate(tree, lambda v: found.append(v) if isinstance(v, Tensor) else None)
    return iter(found)


def is_plain(value: Any) -> bool:
    """Whether a nest has no other containers than tuples, lists and dicts."""
    level = opened(value)
    return level is None or (type(value) in (tuple, list, dict) and all(is_plain(child) for _, child in level[0]))


def arguments_of(value: Any) -> Iterator[Any]:
    """What a nest of a node's arguments holds, slices included."""
    if isinstance(value, slice):
        value = (value.start, value.stop, value.step)
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)):
        for part in value:
            yield from arguments_of(part)
    else:
        yield value
