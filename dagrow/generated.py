"""A forward written from the graph, for models whose own forward has a size written into it that no longer fits.

It is put on the object through a subclass of the user's class made for this object alone, so that ``isinstance``,
the other methods, deepcopy, pickle and ``torch.compile`` go on working.
"""

import importlib
import re
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from torch import fx, nn

from dagrow.dag import Dag

__all__ = ["wear"]


def wear(dag: Dag, literals: Mapping[fx.Node, tuple[Any, ...]]) -> type[nn.Module]:
    """A class like the model's own whose forward runs the dag's graph with other literal sizes."""
    graph, copies = fx.Graph(), {}
    graph.output(graph.graph_copy(dag.graph, copies))
    for node, args in literals.items():
        copies[node].args = fx.map_arg(args, lambda n: copies[n])
    for node, copied in copies.items():
        if node.meta.get("mode_dependent"):
            _follow_mode(graph, copied)
    code = graph.python_code("self")
    source = re.sub(r"\bself\.(_constant\d+)\b", r"\1", code.src)
    return _subclass(_own_class(dag.model), source, {**code.globals, **dag.program.constants})


def _own_class(model: nn.Module) -> type[nn.Module]:
    """The user's class, below any that we made."""
    return next(kind for kind in type(model).__mro__ if "_dagrow_source" not in vars(kind))


def _follow_mode(graph: fx.Graph, node: fx.Node) -> None:
    """The ``training`` flag that was fixed while recording follows the model's mode again."""
    with graph.inserting_before(node):
        mode = graph.get_attr("training")
    if "training" in node.kwargs:
        node.kwargs = {**node.kwargs, "training": mode}
    elif "train" in node.kwargs:
        node.kwargs = {**node.kwargs, "train": mode}
    else:
        node.args = tuple(mode if isinstance(arg, bool) else arg for arg in node.args)


def _subclass(base: type[nn.Module], source: str, names: Mapping[str, Any]) -> type[nn.Module]:
    scope = dict(names)
    exec(compile(source, f"<forward of {base.__name__}, written by dagrow>", "exec"), scope)
    body = {
        "forward": scope["forward"], "__reduce_ex__": _reduce, "__module__": base.__module__, "__doc__": base.__doc__,
        "__qualname__": base.__qualname__, "_dagrow_source": source, "_dagrow_names": dict(names),
    }  # fmt: skip
    return type(base.__name__, (base,), body)


def _reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
    names = {
        key: _Module(value.__name__) if isinstance(value, ModuleType) else value
        for key, value in self._dagrow_names.items()
    }
    return _rebuild, (_own_class(self), self._dagrow_source, names), self.__dict__


class _Module:
    """A module by its name."""

    def __init__(self, name: str) -> None:
        self.name = name


def _rebuild(base: type[nn.Module], source: str, names: Mapping[str, Any]) -> nn.Module:
    found = {
        key: importlib.import_module(value.name) if isinstance(value, _Module) else value
        for key, value in names.items()
    }
    kind = _subclass(base, source, found)
    return kind.__new__(kind)
