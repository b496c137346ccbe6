"""Edges and axes: the weighted layers of a model, and the hidden widths between them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, fx, nn

from dagrow.axes import AxisLayout, Labelling, Rider
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


@dataclass(frozen=True)
class Axis:
    """One hidden width: all the channels that must grow together.

    Attributes:
        name: the names of those producers that were there first: it stays as it is when new paths join.
        width: its number of units (a unit is one channel, or several that can only grow together).
        producers: the edges that write it.
        consumers: the edges that read it, in any of the examples.
        riders: what carries one entry per channel on the way.
        growable: whether it can widen.
        reason: why not, or None.
    """

    name: str
    width: int
    producers: tuple[Edge, ...]
    consumers: tuple[Edge, ...]
    riders: tuple[Rider, ...]
    growable: bool
    reason: str | None
    layout: AxisLayout = field(repr=False, compare=False)

    @property
    def elsewhere(self) -> tuple[str, ...]:
        """Layers beside it that other examples run, not the first: they widen along, and are not measured."""
        return tuple(name for name in self._names if name in self.layout.labelling.elsewhere)

    @property
    def measured(self) -> "Axis":
        """The axis as the first example shows it, without the layers that only others run."""
        elsewhere = self.elsewhere
        if not elsewhere:
            return self
        producers, consumers = (
            tuple(edge for edge in edges if edge.name not in elsewhere) for edges in (self.producers, self.consumers)
        )
        riders = tuple(rider for rider in self.riders if rider.name not in elsewhere)
        return replace(self, producers=producers, consumers=consumers, riders=riders)

    @property
    def shared(self) -> str | None:
        """Why no closed form holds for it: a layer beside it does not act once on each sample; or None."""
        shared = self.layout.labelling.shared
        there = self.measured
        if not there.producers or (self.consumers and not there.consumers):
            return shared[self.elsewhere[0]]
        return next((why for name in there._names if (why := shared.get(name))), None)

    @property
    def _names(self) -> list[str]:
        return [edge.name for edge in (*self.producers, *self.consumers)] + [rider.name for rider in self.riders]


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


def in_place(edge: Edge, model: nn.Module) -> bool:
    """Whether the model still holds the layer, or the parameters of a function."""
    if not edge.layer.paths:
        return dict(model.named_modules()).get(edge.name) is edge.module
    parameters = dict(model.named_parameters())
    return all(parameters.get(edge.path(name)) is parameter for name, parameter in edge.parameters().items())


def axes_of(edges: Mapping[str, Edge], reasons: Mapping[AxisLayout, str | None], new: Sequence[str]) -> Iterator[Axis]:
    """Axes, named after their oldest producers; a number tells apart those of the same producers.

    Args:
        edges: by their names.
        reasons: why the axis of each layout cannot widen, or None.
        new: the modules that growths have put into the model, oldest first.

    Yields:
        One axis for each layout.
    """
    base = ["+".join(_oldest(layout.rows, new)) for layout in reasons]
    for index, (layout, why) in enumerate(reasons.items()):
        name = base[index] if base.count(base[index]) == 1 else f"{base[index]}[{base[:index].count(base[index])}]"
        producers, consumers = (tuple(edges[edge] for edge in sides) for sides in (layout.rows, layout.columns))
        yield Axis(name, layout.width, producers, consumers, tuple(layout.entries), why is None, why, layout)


def _oldest(names: Iterable[str], new: Sequence[str]) -> list[str]:
    """Of layers those of the model as it was at first, or else of the module that was put into it before the others."""
    ages = {name: new.index(module) if (module := name.partition(".")[0]) in new else -1 for name in names}
    return [name for name, age in ages.items() if age == min(ages.values())]
