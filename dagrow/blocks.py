"""Convolutions with groups, read in one of two ways: they grow by whole groups, or by a channel in each group."""

from collections.abc import Mapping
from dataclasses import replace

from torch import fx, nn

from dagrow.labels import Labelling, Rider, label
from dagrow.layers import BlockConvolutionRule, GroupedRule
from dagrow.placed import Placed
from dagrow.sharing import freeze_shared

__all__ = ["labelled"]


def labelled(
    graph: fx.Graph, model: nn.Module, layers: Mapping[fx.Node, Placed]
) -> tuple[dict[fx.Node, Placed], Labelling]:
    """The graph run on labels. Convolutions whose groups are frozen are taken as edges, within whose groups what is
    around them may still grow."""
    found = _run(graph, model, layers)
    rules = {
        rider.name: BlockConvolutionRule(rider.rule.space, groups=int(rider.module.groups))  # type: ignore[arg-type]
        for rider in found.entries if isinstance(rider.rule, GroupedRule) and rider.module is not None
        and not rider.rule.transposed and rider.rule.group(rider.module)[0] > 1 and _frozen(found, rider)
    }  # fmt: skip
    if not rules:
        return dict(layers), found
    read = {node: replace(layer, rule=rules.get(layer.name, layer.rule)) for node, layer in layers.items()}
    return read, _run(graph, model, read)


def _run(graph: fx.Graph, model: nn.Module, layers: Mapping[fx.Node, Placed]) -> Labelling:
    found = label(graph, model, layers)
    freeze_shared(graph, model, layers, found)
    return found


def _frozen(found: Labelling, rider: Rider) -> bool:
    return bool((found.classes.numbers(found.classes.roots(found.entries[rider])) > 0).any())
