"""Arguments of forward that are no tensors: a forward that is written from graphs holds for what they were."""

import inspect
from collections.abc import Iterator

from torch import Tensor

from dagrow._pytree import leaves
from dagrow.tracing._program import Program


def fixed_arguments(program: Program) -> str:
    """What the arguments of forward are in the examples, where they are no tensors.

    Args:
        program: of all examples.

    Returns:
        Names and values for messages; empty where all arguments are tensors.
    """
    return ", ".join(f"{name} = {' or '.join(values)}" for name, values in _values(program).items())


def given_number(program: Program) -> str | None:
    """A number that an example gives as an argument, so that other calls will give others.

    Args:
        program: of all examples.

    Returns:
        A clause about the model's own forward; None where there is none, or where examples give several.
    """
    values = _values(program)
    for name, default, traced in _arguments(program):
        usual = dict(leaves(default))
        for path, leaf in leaves(traced):
            if (
                type(leaf) in (int, float)
                and usual.get(path, inspect.Parameter.empty) != leaf
                and len(values[name]) == 1
            ):
                return (
                    f"whose argument {name}{path} = {leaf} would be fixed in one that is written anew; give it as a "
                    "tensor, or show other values, also=[other, ...]"
                )
    return None


def _values(program: Program) -> dict[str, list[str]]:
    """Arguments that are no tensors, and what they are in the examples."""
    values: dict[str, dict[str, None]] = {}
    for name, _, traced in _arguments(program):
        plain = [leaf for _, leaf in leaves(traced) if not isinstance(leaf, Tensor)]
        shown = repr(plain[0] if traced is plain[0] else plain) if plain else "a tensor"
        values.setdefault(name, {})[shown] = None
    return {name: list(shown) for name, shown in values.items() if list(shown) != ["a tensor"]}


def _arguments(program: Program) -> Iterator[tuple[str, object, object]]:
    """Of each example: the names of forward's arguments, their defaults, and their values."""
    for part in program.every:
        given = {str(n.target).lstrip("*"): n.meta["val"] for n in part.graph.nodes if n.op == "placeholder"}
        for parameter in inspect.signature(part.model.forward).parameters.values():
            if parameter.name in given or parameter.default is not parameter.empty:
                yield parameter.name, parameter.default, given.get(parameter.name, parameter.default)
