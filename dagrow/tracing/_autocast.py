"""Autocast: what a graph that was recorded without it would be with it, and a forward that follows.

A type that forward reads of a tensor, ``h.dtype``, is written into a graph as what it was. Under autocast it is another
one; so the graph is recorded with autocast as well, and where the two differ in types only, these follow.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from dagrow.tracing._program import Program

CAST = torch.bfloat16  #: the type of the recording with autocast
Casts = Mapping[int, tuple[Any, Any]]  #: place among a node's arguments -> what is there without autocast, and with it
_FACTS = ("min", "max", "eps", "tiny", "smallest_normal", "resolution")  #: of a type, that a forward may read


def device_of(model: nn.Module) -> str:
    """The type of the device for which autocast would be on."""
    return next((parameter.device.type for parameter in model.parameters()), "cpu")


def autocast_obstacle(program: Program, other: Program | str) -> str | None:
    """Why no forward can follow autocast; marks the nodes whose arguments do.

    Args:
        program: the graph.
        other: recorded with autocast if the graph was recorded without it, and without it otherwise; or why it is not.

    Returns:
        A clause about the model's own forward, or None if one can, or if that one fails there as well.
    """
    is_cast = torch.is_autocast_enabled(device_of(program.model))
    if isinstance(other, str):
        program.graph.output_node().meta["autocast"] = is_cast
        return None
    here, there = list(program.graph.nodes), list(other.graph.nodes)
    partner = dict(zip(there, here, strict=False))
    for b, a in partner.items():
        pairs = _differing(a, b, partner)
        if pairs is None:
            return f"which does other things under autocast {a.meta.get('source', '')}".strip()
        a.meta["casts"] = {i: (y, x) if is_cast else (x, y) for i, (x, y) in pairs.items()}
    return None if len(here) == len(there) else "which does other things under autocast"


def _differing(a: fx.Node, b: fx.Node, partner: Mapping[fx.Node, fx.Node]) -> Casts | None:
    """The types, and facts of types, in which two nodes differ; None if they differ in anything else."""
    ours, nest = tree_flatten((a.args, dict(a.kwargs)))
    theirs, other_nest = tree_flatten((fx.map_arg(b.args, partner.get), dict(fx.map_arg(b.kwargs, partner.get))))
    if a.op != b.op or not (a.target is b.target or a.target == b.target) or nest != other_nest:
        return None
    pairs = {i: pair for i, pair in enumerate(zip(ours, theirs, strict=True)) if repr(pair[0]) != repr(pair[1])}
    return pairs if all(isinstance(side, (torch.dtype, float)) for pair in pairs.values() for side in pair) else None


def follow_casts(graph: fx.Graph, node: fx.Node, casts: Casts, device: str) -> None:
    """Types that were fixed while recording follow autocast again: (without it, with it)."""
    values, nest = tree_flatten((node.args, dict(node.kwargs)))
    with graph.inserting_before(node):
        for index, (plain, cast) in casts.items():
            values[index] = graph.call_function(cast_value, (plain, cast, device))
    node.args, node.kwargs = tree_unflatten(values, nest)


def cast_value(plain: object, cast: object, device: str) -> object:
    """What holds without autocast, or with it, whatever type it casts to."""
    if not torch.is_autocast_enabled(device):
        return plain
    dtype = torch.get_autocast_dtype(device)
    if isinstance(cast, torch.dtype):
        return dtype if cast is CAST else cast
    for name in _FACTS:
        if cast == getattr(torch.finfo(CAST), name):
            return getattr(torch.finfo(dtype), name)
    return cast
