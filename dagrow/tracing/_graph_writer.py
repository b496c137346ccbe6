"""Writing an `fx.Graph`: a node for everything that is called, and the nodes that its arguments came from.

Sizes read from tensors are whole numbers that remember their node (:class:`TracedInt`), so that the graph holds for
other batch sizes and sequence lengths than those that it was written with.
"""

import inspect
import itertools
import operator
import os
from collections.abc import Callable, Mapping, Set
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode as FakeMode
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.fx.node import map_aggregate
from torch.utils.weak import WeakIdKeyDictionary

from dagrow._pytree import container_level, is_plain, leaf_values, leaves, mapped, tensors_in
from dagrow.errors import TraceError
from dagrow.tracing._contexts import DEVICES, Autocast, autocast_state
from dagrow.tracing._source_lines import source
from dagrow.tracing._traced_int import TracedInt, guard

_PAD = "whose samples have sizes of their own, so that it has no width. Give a padded tensor with a mask."
_TRAIN = "which has no gradient, so that nothing could be measured. Grow the model before it is quantised."
Versions = dict[int, int]  #: the id of a tensor -> how often it was written


class GraphWriter:
    """The graph of a forward, written call by call.

    A tensor is known by its identity: inputs and results by the node that made them, parameters and buffers
    by their first name in the model, all other real tensors as constants. Tensors that were made from others before
    count as such only if they are ``cached`` in the model (their ids). A result that is the very tensor that went
    in (dropout in eval mode) is replaced by an alias, so that two nodes never share one tensor.

    Attributes:
        live: whether the user's code runs now, so that what is done with sizes is written.
        notes: what of the example is fixed in the graph.
        obstacle: why no forward can be written from the graph.
        baked_size: a size that Python may have counted to or computed with, unseen.
        trial: node -> another size or shape, with which the user's code compares; empty where nothing is tried out.
        most: nodes, after which it stops; None for no limit.
    """

    def __init__(
        self, model: nn.Module, fake: FakeMode | None, cached: Set[int] = frozenset(), most: int | None = None
    ) -> None:
        self.model, self.fake, self.cached, self.most, self.graph = model, fake, cached, most, fx.Graph()
        self.live: Callable[[], bool] = lambda: False
        self.trial: Mapping[str, Any] = {}
        self.constants: dict[str, Tensor] = {}
        self.notes: dict[str, None] = {}
        self.obstacle: str | None = None
        self.baked_size: str | None = None
        self._named = {id(t): (name, t) for name, t in itertools.chain(model.named_parameters(), model.named_buffers())}
        self._nodes: Any = WeakIdKeyDictionary()  # tensors go when forward lets them go
        self._devices: dict[int, fx.Node] = {}  # by the ids of devices, which must not be given to others meanwhile
        self._alive: list[torch.device] = []
        self._disposable: set[fx.Node] = set()
        #: of autocast, with the nodes that began them
        self._regions: list[tuple[Autocast, fx.Node | None]] = [(autocast_state(), None)]
        code = getattr(inspect.unwrap(model.forward), "__code__", None)
        self._home = f"{os.path.basename(code.co_filename)}:{code.co_firstlineno}" if code else "unknown line"

    def note(self, text: str) -> None:
        """Something that the graph cannot follow."""
        self.notes[f"{text} ({source()})"] = None

    @property
    def is_full(self) -> bool:
        """Whether it has written as much as it may."""
        return self.most is not None and len(self.graph.nodes) > self.most

    def emit(self, op: str, target: Any, args: Any = (), kwargs: Any = None, *, disposable: bool = False) -> fx.Node:
        """A new node; if it is disposable, only for as long as something reads it."""
        if self.is_full:
            raise TraceError(f"the graph has more than {self.most} nodes")
        self._follow_autocast()
        return self._create(op, target, args, kwargs, disposable=disposable)

    def _create(self, op: str, target: Any, args: Any, kwargs: Any = None, *, disposable: bool = False) -> fx.Node:
        name = "model" if target == "" else None
        node = self.graph.create_node(op, target, tuple(args), kwargs, name=name)
        node.meta["source"] = source()
        if disposable:
            self._disposable.add(node)
        return node

    def _follow_autocast(self) -> None:
        """Nodes for the regions of autocast that forward has entered or left since the last node."""
        now = autocast_state()
        while now != self._regions[-1][0] and any(now == state for state, _ in self._regions[:-1]):
            self._create("call_function", _exit_autocast, (self._regions.pop()[1],))
        for kind, before, state in zip(DEVICES, self._regions[-1][0], now, strict=True):
            if before != state:
                node = self._create("call_function", _enter_autocast, (kind, state[1], state[0], False))
                self._regions.append((now, node))
                self.obstacle = f"switches autocast ({source()})"

    def lower(self, value: Any) -> Any:
        """Arguments with nodes in the places of tensors and sizes."""
        try:
            return map_aggregate(value, self._lower_leaf)
        except SystemError as error:  # a named tuple that looks at what it is made of
            kinds = ", ".join(sorted({type(part).__name__ for part in value[0] if isinstance(part, tuple)}))
            raise TraceError(
                f"{source()}: forward calls a function with a {kinds}, which a graph cannot hold. Call it with tensors."
            ) from error

    def _lower_leaf(self, value: Any) -> Any:
        if isinstance(value, np.generic):  # written into a forward it must be a plain number
            return value.item()
        if isinstance(value, TracedInt):
            return value.node if value.writer is self else int.__int__(value)
        if isinstance(value, torch.device) and id(value) in self._devices:
            return self._part(self._devices[id(value)], getattr, "device", value)
        return self._node_of(value) if isinstance(value, Tensor) else value

    def _node_of(self, tensor: Tensor) -> fx.Node:
        made_by = tensor.grad_fn
        if isinstance(made_by, torch.autograd.function.BackwardCFunction):
            name = made_by.name().removesuffix("Backward")
            self.note(f"the graph differentiates the forward of {name}, it does not call its backward")
            self.obstacle = f"calls {name}, which has a backward of its own"
        if tensor not in self._nodes:
            self._keep(tensor, self._attribute(tensor))
        return self._nodes[tensor]

    def _attribute(self, tensor: Tensor) -> fx.Node:
        name = self._named[id(tensor)][0] if id(tensor) in self._named else f"_constant{len(self.constants)}"
        if name.startswith("_constant"):
            derived = tensor.grad_fn is not None if self.fake is None else isinstance(tensor, FakeTensor)
            if derived and id(tensor) not in self.cached:
                raise TraceError(
                    f"{source()}: a tensor of shape {tuple(tensor.shape)} was made by something other than a "
                    "torch function (torch.Tensor(...), from_numpy, vmap, a scripted part, a cache filled by "
                    "another call), so the graph cannot remake it. Use torch.tensor(...) or a function there."
                )
            self.constants[name] = tensor.detach() if derived else tensor
        node = self.emit("get_attr", name, disposable=True)
        node.meta["val"] = meta_copy(tensor)
        return node

    def _keep(self, tensor: Tensor, node: fx.Node) -> None:
        self._nodes[tensor] = node
        self._devices.setdefault(id(tensor.device), node)
        self._alive.append(tensor.device)

    def keep_device(self, device: torch.device, node: fx.Node) -> None:
        """What is called with a device that was read from a tensor follows the tensor of ``node``."""
        self._devices[id(device)] = node
        self._alive.append(device)

    def _part(self, node: fx.Node, access: Callable[..., Any], key: Any, value: Any) -> fx.Node:
        part = self.emit("call_function", access, (node, key), disposable=True)
        part.meta["val"] = mapped(meta_copy, value)
        return part

    def count(self, tensor: Tensor, dim: int) -> None:
        """Python counts the entries along a dimension, so that there must be as many."""
        shape = self._part(self._node_of(tensor), getattr, "shape", tensor.shape)
        guard(self._part(shape, operator.getitem, dim, tensor.shape[dim]), "==", tensor.shape[dim], True)

    def adopt(self, node: fx.Node, value: Any, before: Versions) -> Any:
        """What forward gets for the value of a node: its sizes remember where they came from.

        Args:
            node: a call.
            value: what it gave.
            before: the versions of the arguments before the call.

        Returns:
            The value, tied to the node.
        """
        node.meta["val"] = mapped(meta_copy, value)
        return self._follow(node, value, before)

    def _follow(self, node: fx.Node, value: Any, before: Versions) -> Any:
        """Tie `value` to `node`, its parts to `getitem` nodes, and make its sizes live."""
        if isinstance(value, Tensor):
            is_known = value in self._nodes or id(value) in self._named
            if is_known and _version(value) == before.get(id(value), _version(value)):
                value = torch.ops.aten.alias.default(value)
            self._keep(value, node)
            return value
        if type(value) is int:
            return TracedInt(value, node, self)
        level = container_level(value)
        if level is None:
            return value
        parts = [self._follow(self._part(node, *_access(key), child), child, before) for key, child in level[0]]
        if all(a is b for a, (_, b) in zip(parts, level[0], strict=True)):
            return value
        return torch.Size(parts) if isinstance(value, torch.Size) else level[1](parts)

    def computed(self, function: Callable[..., int], operands: tuple[Any, ...], value: int) -> TracedInt:
        """The result of arithmetic on sizes, recorded as a node of its own."""
        node = self.emit("call_function", function, self.lower(operands), disposable=True)
        node.meta["val"] = value
        return TracedInt(value, node, self)

    def placeholder(self, target: str, value: Any) -> Any:
        """A node for one parameter of forward, and a value of our own to call forward with."""
        node = self.graph.create_node("placeholder", target, name=target.lstrip("*"))
        node.meta.update(val=mapped(meta_copy, value), source=self._home)
        for path, leaf in leaves(value):
            if not isinstance(leaf, Tensor) and leaf is not None:
                self.notes[f"argument {target}{path} = {leaf!r} is baked in"] = None
        return self._argument(node, mapped(self._own, value))

    def _argument(self, node: fx.Node, value: Any) -> Any:
        if isinstance(value, Tensor):
            self._keep(value, node)
        level = container_level(value)
        for key, child in level[0] if level else ():
            self._argument(self._part(node, *_access(key), child), child)
        return value

    def _own(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if self.fake is None:
            return value.detach().clone().requires_grad_(value.requires_grad)
        if isinstance(value, FakeTensor) or value.is_meta:
            home = next((t.device for _, t in self._named.values()), value.device)
            return torch.empty_like(value, device=home, requires_grad=value.requires_grad)
        return self.fake.from_tensor(value.detach()).requires_grad_(value.requires_grad)

    def assigned(self) -> list[str]:
        """Buffers that forward has assigned anew."""
        return [name for name, buffer in self.model.named_buffers() if id(buffer) not in self._named]

    def output(self, value: object) -> None:
        """Writes the output node: `args[0]` is the nest of tuples, lists and dicts that forward returned.

        Where there are other containers, it is the flat tuple of the leaves; `meta["structure"]` is always
        the nest with the numbers of the leaves in their places.

        Args:
            value: what forward returned.

        Raises:
            TraceError: a leaf of it is neither a tensor nor a plain value.
        """
        for path, leaf in leaves(value):
            if not isinstance(leaf, (Tensor, int, float, complex, str, type(None), torch.dtype, torch.device)):
                raise TraceError(
                    f"forward returns a {type(leaf).__name__} at output{path}, which cannot be looked into. "
                    "Return tensors in tuples, lists, dicts or dataclasses, switch it off (such as "
                    "use_cache=False), or register the class with torch.utils._pytree."
                )
        self._follow_autocast()
        lowered = mapped(self._lower_leaf, value if is_plain(value) else tuple(leaf_values(value)))
        node = self.emit("output", "output", (lowered,))
        count = itertools.count()
        node.meta.update(val=mapped(meta_copy, value), structure=mapped(lambda _: next(count), value))
        node.meta["source"] = self._home
        self._tidy()

    def _tidy(self) -> None:
        """Drop sizes, parts and attributes that nothing reads; calls stay, they may write."""
        for node in reversed(self.graph.nodes):
            if node in self._disposable and not node.users and not node.meta.get("baked"):
                self.graph.erase_node(node)
        used = {node.target for node in self.graph.nodes if node.op == "get_attr"}
        self.constants = {name: tensor for name, tensor in self.constants.items() if name in used}


def meta_copy(value: Any) -> Any:
    """`value` as a node keeps it: without its entries, and safe from later in-place changes of shape."""
    if not isinstance(value, Tensor):
        return value
    if value.is_nested or value.is_quantized:
        kind, instead = ("nested", _PAD) if value.is_nested else ("quantised", _TRAIN)
        raise TraceError(f"{source()}: forward computes with a {kind} tensor, {instead}")
    if value.layout is not torch.strided:
        return value.detach()
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def versions(tree: object) -> Versions:
    """How often each tensor of a nest was written."""
    return {id(tensor): _version(tensor) for tensor in tensors_in(tree)}


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _access(key: Any) -> tuple[Callable[..., Any], Any]:
    if isinstance(key, pytree.GetAttrKey):
        return getattr, key.name
    return operator.getitem, key.idx if isinstance(key, pytree.SequenceKey) else key.key
