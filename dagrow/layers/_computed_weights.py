"""Layers whose weight is computed in the forward, or holds a matrix for each of several parts: seen, but not grown.

A new row of such a weight would have to come out of the computation: a mask, a scale or another network would need new
entries that nobody but the user knows.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import Any

from torch import Tensor, fx, nn

from dagrow._pytree import tensors_in
from dagrow.layers._contractions import Contraction, contraction
from dagrow.layers._functional_layers import Tensors, parameter_of
from dagrow.layers._op_tables import op_name
from dagrow.layers._rules import EdgeRule

#: functions of an input and a weight
LAYERS = frozenset({"linear", *(f"{kind}{d}d" for kind in ("conv", "conv_transpose") for d in (1, 2, 3))})
_ADDING = {"addmm": "mm", "baddbmm": "bmm"}  #: products with something added


class Computed(nn.Module):
    """A layer whose weight is no parameter: what is to be said of it.

    Args:
        tensors: the parameters that the weight is computed from, by their paths.
        weight: as it is computed, without entries.
        widths: of its input and output.
    """

    def __init__(self, tensors: Tensors, weight: Tensor, widths: tuple[int, int]) -> None:
        super().__init__()
        self.__dict__ |= {**tensors, "weight": weight}  # not of its own
        self.paths = tuple(tensors)
        self.in_features, self.out_features = widths


@dataclass(frozen=True)
class ComputedRule(EdgeRule):
    """A layer that cannot grow, as its weight is computed.

    Args:
        paths: of the parameters that the weight is computed from.
        dim: of the channels; from the end where it is negative.
        why: it does not grow.
    """

    paths: tuple[str, ...]
    dim: int
    why: str

    types = (Computed,)

    @property
    def dims(self) -> Mapping[str, tuple[int, int | None]]:  # type: ignore[override]
        return MappingProxyType(dict.fromkeys(self.paths, (0, None)))

    def channel_dim(self, ndim: int) -> int:
        return self.dim % ndim

    def refusal(self, module: nn.Module) -> str:
        return self.why

    def features(self, module: nn.Module, inputs: Tensor) -> Tensor:
        return inputs.movedim(self.dim, -1).flatten(0, -2)

    def rows(self, module: nn.Module, outputs: Tensor) -> Tensor:
        return outputs.movedim(self.dim, -1).flatten(0, -2)

    def widths(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features

    def attributes(self, inputs: int, outputs: int) -> dict[str, int]:
        return {}

    def positions(self, inputs: Tensor, outputs: Tensor) -> int:
        return outputs.numel() // max(1, outputs.shape[self.dim])


@dataclass(frozen=True)
class ComputedLayer:
    """A call of a function with a weight that is computed.

    Attributes:
        module: what is to be said of the layer.
        rule: that it does not grow.
        inputs: the node that it reads.
    """

    module: Computed
    rule: ComputedRule
    inputs: fx.Node


Sources = Mapping[fx.Node, tuple[str, ...]]  #: nodes that follow from no input of the model -> the tensors behind them


def weight_sources(graph: fx.Graph, tensors: Tensors) -> Sources:
    """What is computed from parameters, buffers and constants alone.

    Args:
        graph: of the model's forward.
        tensors: the model's parameters and buffers by their paths.

    Returns:
        Node -> the parameters and buffers that it is computed from.
    """
    sources: dict[fx.Node, tuple[str, ...]] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            sources[node] = (str(node.target),) if node.target in tensors else ()
        elif node.op not in ("placeholder", "output") and not _calls_layer(node) and tensors_in(node.meta.get("val")):
            inputs = [source for source in node.all_input_nodes if tensors_in(source.meta.get("val"))]
            if all(source in sources for source in inputs):
                sources[node] = tuple(dict.fromkeys(path for source in inputs for path in sources[source]))
    return sources


def _calls_layer(node: fx.Node) -> bool:
    module = node.meta.get("module")
    return module is not None and any(True for _ in module.parameters())


def computed_layer(node: fx.Node, sources: Sources, tensors: Tensors) -> ComputedLayer | None:
    """The layer that a function with a computed weight stands for.

    Args:
        node: any call.
        sources: of :func:`weight_sources`.
        tensors: the model's parameters and buffers by their paths.

    Returns:
        None where the function is none that has a weight, or its weight follows from the input, or from no parameter.
    """
    if op_name(node) not in LAYERS:
        return None
    named = {**dict(zip(("input", "weight", "bias"), node.args, strict=False)), **node.kwargs}
    inputs, weight, bias = (named.get(name) for name in ("input", "weight", "bias"))
    if not isinstance(inputs, fx.Node) or not isinstance(weight, fx.Node) or inputs in sources:
        return None
    why = _computed_from("weight", weight, sources, tensors)
    if isinstance(bias, fx.Node):
        why = why or _computed_from("bias", bias, sources, tensors)
    why = why or f"operation {op_name(node)} has no rule where its settings are computed"
    return _layer(node, inputs, weight, -1 if op_name(node) == "linear" else 1, why, sources, tensors)


def parameter_product(node: fx.Node, sources: Sources, tensors: Tensors) -> ComputedLayer | None:
    """The layer that a product of an activation with a parameter of several matrices, or a computed one, stands for.

    Args:
        node: any call.
        sources: of :func:`weight_sources`.
        tensors: the model's parameters and buffers by their paths.

    Returns:
        None where it is no such product: one that sums over the last dimension of the activation, and whose own last
        dimension is one of the parameter.
    """
    operands = [arg for arg in node.args if isinstance(arg, fx.Node)][-2:]
    metas = [arg.meta["val"] if isinstance(arg, fx.Node) else arg for arg in node.args]
    name, plain = op_name(node), _ADDING.get(str(op_name(node)))
    product = contraction(plain or name, metas[-2:] if plain else metas)
    if product is None or len(operands) != 2 or (operands[0] in sources) == (operands[1] in sources):
        return None
    inputs, weight = operands
    if inputs in sources:
        inputs, weight, product = weight, inputs, Contraction(product.right, product.left, product.out)
    if product.left[-1] not in product.summed or product.out[-1:] in product.left:
        return None
    why = _computed_from("weight", weight, sources, tensors)
    matrices, path = prod(weight.meta["val"].shape[:-2]), ", ".join(sources[weight])
    why = why or f"its weight {path} holds {matrices} matrices of one product, which no rule widens"
    return _layer(node, inputs, weight, -1, why, sources, tensors)


def _computed_from(entry: str, node: fx.Node, sources: Sources, tensors: Tensors) -> str | None:
    """That an entry of a layer is computed, and from what; None if it is in the model as it is."""
    if parameter_of(node, tensors) is not None:
        return None
    paths = sorted(sources.get(node, ()), key=lambda path: not isinstance(tensors[path], nn.Parameter))
    return f"its {entry} is computed from {', '.join(paths) or 'the input'}, not a parameter"


def _layer(
    node: fx.Node, inputs: fx.Node, weight: fx.Node, dim: int, why: str, sources: Sources, tensors: Tensors
) -> ComputedLayer | None:
    paths = tuple(path for path in sources.get(weight, ()) if isinstance(tensors[path], nn.Parameter))
    if not paths:
        return None
    widths = inputs.meta["val"].shape[dim], node.meta["val"].shape[dim]
    module = Computed({path: tensors[path] for path in paths}, weight.meta["val"], widths)
    return ComputedLayer(module, ComputedRule(paths, dim, why), inputs)
