"""Where sizes change that a model's forward holds: in the attributes that state them, or in a forward written anew."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx

from dagrow.program import Program
from dagrow.stated import Place, StatedInt, arguments_of

__all__ = ["Arguments", "moved", "settled", "substituted"]

Arguments = tuple[tuple[Any, ...], dict[str, Any]]  #: of a node
Attributes = Mapping[str, Mapping[str, Any]]  #: module -> its attributes


def moved(literals: Mapping[fx.Node, Arguments]) -> dict[Place, int]:
    """What numbers that modules state become in the arguments of nodes."""
    found: dict[Place, int] = {}
    for node, arguments in literals.items():
        for old, new in zip(arguments_of((node.args, node.kwargs)), arguments_of(arguments), strict=False):
            if isinstance(old, StatedInt) and isinstance(new, int) and old != new:
                found[old.place] = new
    return found


def substituted(arguments: Arguments, restated: Mapping[Place, int]) -> Arguments:
    """A node's arguments with other numbers for those that modules state."""
    if not restated:
        return arguments

    def number(value: Any) -> Any:
        return restated.get(value.place, value) if isinstance(value, StatedInt) else value

    args, kwargs = fx.node.map_aggregate(arguments, number)  # type: ignore[misc]
    return tuple(args), dict(kwargs)


def settled(
    program: Program, literals: Mapping[fx.Node, Arguments], attributes: Attributes, resized: Mapping[Place, int],
    restated: Mapping[Place, int],
) -> tuple[Mapping[fx.Node, Arguments], Attributes, bool]:  # fmt: skip
    """What changes in a forward: arguments of nodes, attributes, and whether it must be written anew.

    If every size that changes came unchanged from an attribute of a module, which is not computed with, the attributes
    change and the model's own forward goes on.

    Args:
        literals: node -> its arguments in the grown network, where they differ but for stated numbers.
        attributes: that change in any case.
        resized: attributes that layers restate, and what they become.
        restated: attributes that change with all their uses in the graph.
    """
    follow = all(value == restated.get(place) for place, value in resized.items() if place in program.stated)
    written = bool(literals) or not follow or bool(program.computed & {*resized, *restated})
    uses = [node for place in restated for node in program.stated[place]]
    found = {node: (node.args, dict(node.kwargs)) for node in uses} | dict(literals)
    found = {node: substituted(arguments, restated) for node, arguments in found.items()}
    if written:
        return found, attributes, True
    changed = {path: dict(names) for path, names in attributes.items()}
    for (path, name, index), value in restated.items():
        names = changed.setdefault(path, {})
        names[name] = value if index is None else _replaced(
            names.get(name, getattr(program.model.get_submodule(path), name)), index, value
        )  # fmt: skip
    return found, changed, False


def _replaced(items: Sequence[int], index: int, value: int) -> Sequence[int]:
    return type(items)([*items[:index], value, *items[index + 1 :]])  # type: ignore[call-arg]
