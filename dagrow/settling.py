"""Where sizes change that a model's forward holds: in the attributes that state them, or in a forward written anew."""

from collections.abc import Mapping
from typing import Any

from torch import fx

from dagrow.stated import StatedInt, arguments_of
from dagrow.trace import Program

__all__ = ["Arguments", "settled"]

Arguments = tuple[tuple[Any, ...], dict[str, Any]]  #: of a node
Attributes = Mapping[str, Mapping[str, Any]]  #: module -> its attributes
Place = tuple[str, str]  #: a module and its attribute


def settled(
    program: Program, literals: Mapping[fx.Node, Arguments], attributes: Attributes, resized: Mapping[Place, int]
) -> tuple[Mapping[fx.Node, Arguments], Attributes]:
    """Arguments of nodes that a forward must be written for, if any; and attributes that change.

    If every size that changes came unchanged from an attribute of a module, which is used for nothing else, the
    attributes change and the model's own forward goes on.

    Args:
        literals: node -> its arguments in the grown network.
        attributes: that change in any case.
        resized: attributes that layers restate, and what they become.
    """
    moved = _moved(literals)
    places = {**resized, **(moved or {})}
    if moved is None or not all(_everywhere(program, literals, *change) for change in places.items()):
        if not literals:  # written anew, forward keeps the old numbers
            first = next(iter(program.graph.nodes))
            literals = {first: (first.args, dict(first.kwargs))}
        return literals, attributes
    changed = {path: dict(names) for path, names in attributes.items()}
    for (path, name), value in moved.items():
        changed.setdefault(path, {})[name] = value
    return {}, changed


def _moved(literals: Mapping[fx.Node, Arguments]) -> dict[Place, int] | None:
    """What stated numbers become; None if something else changes too."""
    found: dict[Place, int] = {}
    for node, arguments in literals.items():
        old, new = list(arguments_of((node.args, node.kwargs))), list(arguments_of(arguments))
        if len(old) != len(new) or old == new:
            return None
        for a, b in zip(old, new, strict=True):
            if isinstance(a, StatedInt) and a != b:
                found[a.place] = int(b)
            elif a is not b and a != b:
                return None
    return found


def _everywhere(program: Program, literals: Mapping[fx.Node, Arguments], place: Place, value: int) -> bool:
    """Whether a stated number becomes the same wherever forward uses it, and is not computed with."""
    if place in program.computed:
        return False
    for node in program.stated.get(place, ()):
        old, new = arguments_of((node.args, node.kwargs)), arguments_of(literals.get(node, (node.args, node.kwargs)))
        for a, b in zip(old, new, strict=True):
            if isinstance(a, StatedInt) and a.place == place and b != value:
                return False
    return True
