"""Floating point operations of a forward pass, counted from its graph."""

from collections.abc import Mapping
from math import prod
from typing import Any

from torch import Tensor, fx

from dagrow.contractions import ATTENTION, ATTENTION_ARGUMENTS, Contraction, contraction
from dagrow.ops import op_name
from dagrow.placed import Placed

__all__ = ["count_flops", "weight_uses"]


def count_flops(graph: fx.Graph, layers: Mapping[fx.Node, Placed]) -> int:
    """Of one sample of the example that was traced; a multiplication and an addition are two.

    Counted are layers with a rule (each entry of a matrix or kernel once per position and call) and products of two
    activations: matmul, einsum and attention. Nothing else is: norms, activations, and layers without a rule, such as
    recurrent ones. So counts ``torch.utils.flop_counter`` as well.
    """
    total = sum(_of_layer(node, layers[node]) if node in layers else _of_product(node) for node in graph.nodes)
    return total // _samples(graph)


def weight_uses(graph: fx.Graph, layers: Mapping[fx.Node, Placed]) -> dict[str, int]:
    """Weight -> how often each of its entries is used for one sample of the example, over all calls."""
    found: dict[str, int] = {}
    for node, layer in layers.items():
        found[layer.path("weight")] = found.get(layer.path("weight"), 0) + _positions(node, layer)
    return {name: uses // _samples(graph) for name, uses in found.items()}


def _positions(node: fx.Node, layer: Placed) -> int:
    return int(layer.rule.positions(layer.inputs.meta["val"], node.meta["val"]))


def _of_layer(node: fx.Node, layer: Placed) -> int:
    weight = getattr(layer.module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim < 2:
        return 0
    return 2 * weight.numel() * _positions(node, layer)


def _of_product(node: fx.Node) -> int:
    name = op_name(node) if node.op in ("call_function", "call_method") else None
    if name == ATTENTION:
        return _of_attention(node)
    args = [arg.meta["val"] if isinstance(arg, fx.Node) else arg for arg in node.args]
    found = contraction(name, args)
    return 0 if found is None else _summed(found, *(arg for arg in args if isinstance(arg, Tensor)))


def _of_attention(node: fx.Node) -> int:
    """Scores of queries and keys, and the values that they weigh."""
    given: dict[str, Any] = {**dict(zip(ATTENTION_ARGUMENTS, node.args, strict=False)), **node.kwargs}
    query, key, value = (given[name].meta["val"] for name in ATTENTION_ARGUMENTS[:3])
    return 2 * query.shape[:-1].numel() * int(key.shape[-2]) * int(query.shape[-1] + value.shape[-1])


def _summed(found: Contraction, left: Tensor, right: Tensor) -> int:
    sizes = [dict(zip(found.left, left.shape, strict=True)), dict(zip(found.right, right.shape, strict=True))]
    return 2 * prod(max(int(size.get(letter, 1)) for size in sizes) for letter in found.out + found.summed)


def _samples(graph: fx.Graph) -> int:
    """Of the example: the first dimension of its first tensor."""
    values = [node.meta["val"] for node in graph.nodes if node.op == "placeholder"]
    sizes = [int(value.shape[0]) for value in values if isinstance(value, Tensor) and value.ndim]
    return max(1, sizes[0]) if sizes else 1
