"""Layers at their places in a graph: calls of modules that a rule knows, and functions called with a parameter."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import fx, nn

from dagrow.layers._computed_weights import ComputedLayer, computed_layer, parameter_product, weight_sources
from dagrow.layers._functional_layers import ENTRIES, Tensors, functional_layers
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
        """The model's name of a parameter or buffer.

        Args:
            entry: its name in the rule.

        Returns:
            Its path in the model.
        """
        return self.paths.get(entry) or f"{self.name}.{entry}"


def layer_sites(graph: fx.Graph, model: nn.Module, rules: Sequence[LayerRule]) -> dict[fx.Node, LayerSite]:
    """The layers of a graph that a rule knows.

    Args:
        graph: of the model's forward.
        model: whose modules and parameters the graph calls.
        rules: the first that fits a layer speaks for it.

    Returns:
        Layers by the nodes at which they act.
    """
    modules = dict(model.named_modules())
    tensors = _tensors(model)
    sources = weight_sources(graph, tensors)
    rule_of = {name: rule_for(module, rules) for name, module in modules.items()}
    sites: dict[fx.Node, LayerSite] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            name, inputs = str(node.target), _only_argument(node)
            rule = rule_of[name]
            if rule is not None and inputs is not None:
                sites[node] = LayerSite(name, modules[name], rule, inputs, owner=name)
        elif node.op in ("call_function", "call_method"):
            site = _functional_site(node, tensors, rules) or _site(computed_layer(node, sources, tensors))
            if site is not None:
                sites[node] = site
    return _with_unique_names(sites)


def parameter_products(
    graph: fx.Graph, model: nn.Module, layers: Mapping[fx.Node, LayerSite]
) -> dict[fx.Node, LayerSite]:
    """Products of activations with parameters that are no layers of :func:`layer_sites`: no rule says how they grow.

    Args:
        graph: of the model's forward.
        model: whose parameters it uses.
        layers: those that a rule knows.

    Returns:
        Layers by the nodes at which they act, which have names of their own.
    """
    tensors = _tensors(model)
    sources = weight_sources(graph, tensors)
    sites = dict(layers)
    for node in graph.nodes:
        if node not in sites and node.op in ("call_function", "call_method"):
            site = _site(parameter_product(node, sources, tensors))
            if site is not None:
                sites[node] = site
    return {node: site for node, site in _with_unique_names(sites).items() if node not in layers}


def _tensors(model: nn.Module) -> Tensors:
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def _with_unique_names(sites: Mapping[fx.Node, LayerSite]) -> dict[fx.Node, LayerSite]:
    """Functions that use a layer's tensors otherwise than the layer does get names of their own."""
    uses: dict[str, list[tuple[type[nn.Module], dict[str, str]]]] = {}
    for site in sorted(sites.values(), key=lambda site: bool(site.paths)):  # modules keep their names
        use = type(site.module), dict(site.paths)
        if use not in uses.setdefault(site.name, []):
            uses[site.name].append(use)
    numbers = {node: uses[site.name].index((type(site.module), dict(site.paths))) for node, site in sites.items()}
    return {
        node: replace(site, name=f"{site.name}[{numbers[node]}]") if numbers[node] else site
        for node, site in sites.items()
    }


def _only_argument(node: fx.Node) -> fx.Node | None:
    """The one thing that a module is called with."""
    arguments = [*node.args, *node.kwargs.values()]
    return arguments[0] if len(arguments) == 1 and isinstance(arguments[0], fx.Node) else None


def _site(layer: ComputedLayer | None) -> LayerSite | None:
    if layer is None:
        return None
    name, owner = _name(layer.rule.paths[0])
    return LayerSite(name, layer.module, layer.rule, layer.inputs, {path: path for path in layer.rule.paths}, owner)


def _name(parameter: str) -> tuple[str, str]:
    """How a layer is called that has this parameter, and the module that owns it."""
    owner, _, leaf = parameter.rpartition(".")
    return owner if leaf in ENTRIES and owner else parameter, owner


def _functional_site(node: fx.Node, tensors: Tensors, rules: Sequence[LayerRule]) -> LayerSite | None:
    for layer in functional_layers(node, tensors):
        rule = rule_for(layer.module, rules)
        if rule is not None and rule.channel_dim(layer.inputs.meta["val"].ndim) >= 0:
            name, owner = _name(next(iter(layer.paths.values())))
            return LayerSite(name, layer.module, rule, layer.inputs, layer.paths, owner, layer.names)
    return None
