"""Edges: the weighted layers of a model."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor, fx, nn

from dagrow.axes import AxisLayout, Labelling
from dagrow.layers import EdgeRule, LayerSite


@dataclass(frozen=True)
class Edge:
    """A weighted layer ``a = W b``.

    Attributes:
        name: the module's own path in the model; of a function called with a parameter, what owns the parameter.
        layer: where it acts, and on what.
        growable: whether an axis that it writes or reads can widen.
        reason: why not, or None.
        shared: why its weights do not act at this place alone, so that no closed form holds for them; or None.
    """

    name: str
    layer: LayerSite = field(repr=False, compare=False)
    growable: bool
    reason: str | None
    shared: str | None = None

    @property
    def module(self) -> nn.Module:
        """The layer itself, or a stand-in that holds the parameters of a function."""
        return self.layer.module

    @property
    def rule(self) -> EdgeRule:
        assert isinstance(self.layer.rule, EdgeRule)
        return self.layer.rule

    def path(self, entry: str) -> str:
        """The model's name of a parameter."""
        return self.layer.path(entry)

    def matrix(self, weight: Tensor) -> Tensor:
        """A view of a tensor of the weight's shape as ``[o, i, *kernel]``."""
        dims = self.rule.dims["weight"]
        assert dims[1] is not None
        return weight.movedim((dims[0], dims[1]), (0, 1))

    def parameters(self) -> dict[str, nn.Parameter]:
        """The layer's own weight and bias, by their names in the rule."""
        entries = {name: getattr(self.module, name, None) for name in self.rule.dims}
        return {name: entry for name, entry in entries.items() if isinstance(entry, nn.Parameter)}

    @property
    def trainable(self) -> bool:
        """Whether its own weights may move."""
        return all(parameter.requires_grad for parameter in self.parameters().values())

    @property
    def bias(self) -> bool:
        return "bias" in self.parameters()


def edges_of(
    layers: Mapping[fx.Node, LayerSite], labels: Labelling, reasons: Mapping[AxisLayout, str | None]
) -> Iterator[Edge]:
    """The weighted layers, and whether an axis beside them can widen."""
    by_name = {layer.name: layer for layer in reversed([*layers.values()])}  # of one that is called twice the first
    for name in labels.rows:
        around = [(layout, why) for layout, why in reasons.items() if name in layout.rows or name in layout.columns]
        growable = any(why is None for _, why in around)
        causes = [f"its output: {why}" if name in layout.rows else f"its input: {why}" for layout, why in around]
        if not any(name in layout.columns for layout, _ in around):
            why = labels.classes.reason(int(labels.columns[name][0])) or "holds no channels of a layer"
            causes.insert(0, f"its input: {why}")
        reason = None if growable else "; ".join(dict.fromkeys(causes))
        yield Edge(name, by_name[name], growable, reason, labels.shared.get(name))


def refused(sites: Iterable[LayerSite]) -> Iterator[Edge]:
    """Layers whose rules say that they do not grow, and that are not among those that were labelled."""
    for site in sites:
        reason = site.rule.refusal(site.module)
        yield Edge(site.name, site, False, reason, reason)


def replaced_in(edges: Iterable[Edge], model: nn.Module) -> Iterator[Edge]:
    """Those whose layer, or the parameters of whose function, the model does not hold any more."""
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    for edge in edges:
        if edge.layer.paths:
            held = all(parameters.get(edge.path(name)) is parameter for name, parameter in edge.parameters().items())
        else:
            held = modules.get(edge.name) is edge.module
        if not held:
            yield edge
