"""Whether a forward calls its layers more often for more samples, as where a batch is cut into chunks of one size.

Python counts unseen: a graph of two samples has one chunk, and says nothing of a second. So where a forward looks at
how many samples there are, it is recorded again for more of them, without numbers, and calls are compared.
"""

import operator
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor, fx

from dagrow._pytree import leaves, mapped
from dagrow.tracing._inputs import Arguments

MANY = 512  #: samples, more than most forwards take at once
_CUTS = {"chunk", "split", "split_with_sizes", "tensor_split", "unsafe_chunk", "unsafe_split", "unbind"}
_SIZES = {"shape", "size"}
_NAMED = ("call_module", "get_attr")


def samples_of(inputs: Arguments) -> int:
    """How many samples there are: the size of the dimension that most tensors share as their first; 0 for none."""
    sizes = Counter(leaf.shape[0] for _, leaf in leaves(inputs) if isinstance(leaf, Tensor) and leaf.dim())
    return sizes.most_common(1)[0][0] if sizes else 0


def looks_at_samples(graph: fx.Graph, samples: int, baked_size: str | None) -> bool:
    """Whether a forward compares the number of samples with another number, or cuts them into parts.

    Args:
        graph: of the forward.
        samples: in the example.
        baked_size: a size that its loops may count to, if there is one.

    Returns:
        Whether how often it calls its layers may follow the number of samples.
    """
    if not samples or baked_size is not None:
        return bool(samples)
    counts: set[fx.Node] = set()
    for node in graph.nodes:
        size = node.meta.get("val")
        if _is_first_size(node) or (isinstance(size, int) and counts.intersection(node.all_input_nodes)):
            counts.add(node)
            if any(not isinstance(right, fx.Node) for _, right in node.meta.get("guards", ())) and not size % samples:
                return True
        if _cuts(node) and not node.all_input_nodes[0].meta["val"].shape[0] % samples:
            return True
    return False


def _name(node: object) -> str:
    target = node.target if isinstance(node, fx.Node) else None
    if target is getattr and isinstance(node, fx.Node):
        return str(node.args[1])
    return target if isinstance(target, str) else getattr(target, "__name__", "")


def _is_first_size(node: fx.Node) -> bool:
    if node.target is operator.getitem:
        return _name(node.args[0]) in _SIZES and node.args[1:] == (0,)
    return _name(node) == "size" and node.args[1:] == (0,)


def _cuts(node: fx.Node) -> bool:
    """Whether the first dimension of a tensor is cut."""
    place = 1 if _name(node) == "unbind" else 2
    dim = node.args[place] if len(node.args) > place else node.kwargs.get("dim", 0)
    return _name(node) in _CUTS and isinstance(dim, int) and dim == 0


def with_samples(inputs: Arguments, times: int) -> Arguments:
    """The inputs with several times as many samples, and without entries."""
    samples = samples_of(inputs)

    def resized(leaf: object) -> object:
        if not isinstance(leaf, Tensor):
            return leaf
        shape = (samples * times, *leaf.shape[1:]) if leaf.shape[:1] == (samples,) else leaf.shape
        return torch.empty(shape, dtype=leaf.dtype, device="meta")

    return mapped(resized, inputs)


def uses(graph: fx.Graph) -> Mapping[str, int]:
    """How often modules are called and tensors are used, by their names."""
    counts: Counter[str] = Counter()
    for node in graph.nodes:
        if node.op == "call_module":
            counts[str(node.target)] += 1
        elif node.op == "get_attr":
            counts[str(node.target)] += len(node.users)
    return counts


def mark_calls(graph: fx.Graph, larger: fx.Graph, times: int) -> tuple[str, ...]:
    """Gives nodes of what is called more or less often for more samples ``meta["calls"]``, which says so.

    Args:
        graph: of the forward, for the example.
        larger: the same for more samples; it may end early, and has no output then.
        times: how many times as many.

    Returns:
        What is said.
    """
    here, there = uses(graph), uses(larger)
    is_whole = any(node.op == "output" for node in larger.nodes)
    reasons = {}
    for name, count in here.items():
        more = there.get(name, 0)
        if more > count or (is_whole and more < count):
            often = _often(more) + " or more" * (not is_whole)
            reasons[name] = (
                f"the forward uses {name} {_often(count)} for the example and {often} for "
                f"{times} times as many samples: the number of its calls follows the batch size"
            )
    for node in graph.nodes:
        named = [node, *(source for source in node.all_input_nodes if source.op == "get_attr")]
        reason = next((reasons[str(n.target)] for n in named if n.op in _NAMED and str(n.target) in reasons), None)
        if reason:
            node.meta["calls"] = reason
    return tuple(reasons.values())


def _often(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
