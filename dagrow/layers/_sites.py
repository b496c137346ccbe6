"""Layers at their places in a graph: calls of modules that a rule knows, and functions called with a parameter."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, fx, nn

from dagrow.layers._functional_layers import ENTRIES, functional_layers
from dagrow.layers._rules import LayerRule, rule_for


@dataclass(frozen=True, eq=False)
class LayerSite:
    """A layer that acts at one node of a graph.

    Attributes:
        name: the module's path; of a function that of the module that owns the weight, or of a weight by another name.
        module: the layer, or a stand-in that holds the very parameters that a function was called with.
        rule: what dagrow knows of it.
        inputs: the node that it reads.
        paths: its parameters and buffers by their names in the rule, as the model names them.
        owner: the module whose attributes state its widths.
        names: of a function's arguments, in their order.
    """

    name: str
    module: nn.Module = field(repr=False)
    rule: LayerRule = field(repr=False)
    inputs: fx.Node = field(repr=False)
    paths: Mapping[str, str] = field(default_factory=dict, repr=False)
    owner: str = ""
    names: tuple[str, ...] = ()

    def path(self, entry: str) -> str:
        """The model's name of a parameter or buffer."""
        return self.paths.get(entry) or f"{self.name}.{entry}"


def layer_sites(graph: fx.Graph, model: nn.Module, rules: Sequence[LayerRule]) -> dict[fx.Node, LayerSite]:
    """The layers of a graph that a rule knows, by their nodes."""
    modules = dict(model.named_modules())
    held = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    known = {name: rule_for(module, rules) for name, module in modules.items()}
    found: dict[fx.Node, LayerSite] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            name, rule, inputs = str(node.target), known[str(node.target)], _only(node)
            if rule is not None and inputs is not None:
                found[node] = LayerSite(name, modules[name], rule, inputs, owner=name)
        elif node.op in ("call_function", "call_method"):
            layer = _functional(node, held, rules)
            if layer is not None:
                found[node] = layer
    return _told_apart(found)


def _told_apart(found: Mapping[fx.Node, LayerSite]) -> dict[fx.Node, LayerSite]:
    """Functions that use a layer's tensors otherwise than the layer does get names of their own."""
    uses: dict[str, list[Any]] = {}
    for layer in sorted(found.values(), key=lambda layer: bool(layer.paths)):  # modules keep their names
        use = type(layer.module), dict(layer.paths)
        if use not in uses.setdefault(layer.name, []):
            uses[layer.name].append(use)
    place = {node: uses[layer.name].index((type(layer.module), dict(layer.paths))) for node, layer in found.items()}
    return {
        node: replace(layer, name=f"{layer.name}[{place[node]}]") if place[node] else layer
        for node, layer in found.items()
    }


def _only(node: fx.Node) -> fx.Node | None:
    """The one thing that a module is called with."""
    given: list[Any] = [*node.args, *node.kwargs.values()]
    return given[0] if len(given) == 1 and isinstance(given[0], fx.Node) else None


def _functional(node: fx.Node, held: Mapping[str, Tensor], rules: Sequence[LayerRule]) -> LayerSite | None:
    for call in functional_layers(node, held):
        rule = rule_for(call.module, rules)
        if rule is not None and rule.channel_dim(call.inputs.meta["val"].ndim) >= 0:
            first = next(iter(call.paths.values()))
            owner, _, leaf = first.rpartition(".")
            name = owner if leaf in ENTRIES and owner else first
            return LayerSite(name, call.module, rule, call.inputs, call.paths, owner, call.names)
    return None
