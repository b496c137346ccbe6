"""Recording one forward pass as an `fx.Graph`: every torch function, every call of a leaf module, every size.

The model runs once, under a mode that sees every call, and is left as it was found; where inputs hold no values it
runs on fake tensors. Its own Python control flow simply runs, but must not read values. Sizes read from tensors are
integers that remember their node (`LiveInt`), so the graph holds for other batch sizes and sequence lengths than those
it was recorded with.
"""

import contextlib
import inspect
import itertools
import operator
import os
import sys
from collections.abc import Callable, Set
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode as FakeMode
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.fx.node import map_aggregate
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from dagrow._pytree import is_plain, leaves, mapped, opened, tensors_in
from dagrow.errors import TraceError
from dagrow.tracing._call_forms import run_opened, spelled
from dagrow.tracing._leaf_modules import OpaqueModule, is_leaf, opaque_parts
from dagrow.tracing._source_lines import refusal, source, user_names
from dagrow.tracing._traced_int import TracedInt, described, guard

Versions = dict[int, int]
DEVICES = ("cpu", "cuda")  #: that forward may cast for
_READS = {
    "item",
    "tolist",
    "numpy",
    "__bool__",
    "__int__",
    "__float__",
    "__complex__",
    "__index__",
    "__array__",
    "__contains__",
    "is_nonzero",
    "equal",
    "allclose",
}
_SIZES = {"shape", "size", "numel", "nelement", "stride"}
_INNER = ("torch._subclasses", "torch._refs", "torch._decomp", "torch._meta", "torch._prims")
#: hooks run under the mode; of what is read of plain tensors there, it need not be told
_UNSEEN = torch._C.DisableTorchFunction
VALUE_ERRORS = (DataDependentOutputException, DynamicOutputShapeException)


def snapshot(value: Any) -> Any:
    """`value` as a node keeps it: without its entries, and safe from later in-place changes of shape."""
    if not isinstance(value, Tensor):
        return value
    if value.layout is not torch.strided or value.is_nested:
        return value.detach()
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


class Recorder(TorchFunctionMode):
    """Writes an `fx.Graph` while a model runs inside `with recorder:`.

    A tensor is known by its identity: inputs and results by the node that made them, parameters and buffers
    by their first name in the model, all other real tensors as constants. Tensors that were made from others before
    count as such only if the model ``held`` them (their ids): in a cache. A result that is the very tensor that went
    in (dropout in eval mode) is replaced by an alias, so that two nodes never share one tensor.
    """

    def __init__(
        self,
        model: nn.Module,
        fake: FakeMode | None,
        closed: Callable[[nn.Module], bool] | None = None,
        held: Set[int] = frozenset(),
    ) -> None:
        super().__init__()
        self.model, self.fake, self.closed, self.held, self.graph = model, fake, closed, held, fx.Graph()
        self.constants: dict[str, Tensor] = {}
        self.notes: dict[str, None] = {}
        self.obstacle: str | None = None  #: why no forward can be written from the graph
        self.unrolled: str | None = None  #: a size that loops may count to
        self._named = {id(t): (name, t) for name, t in itertools.chain(model.named_parameters(), model.named_buffers())}
        self._nodes: Any = WeakIdKeyDictionary()  # tensors go when forward lets them go
        self._devices: dict[int, fx.Node] = {}
        self._kept: list[Any] = []
        self._disposable: set[fx.Node] = set()
        self._pending: tuple[Any, Versions] = ((), {})
        self._autocast: list[tuple[Any, fx.Node | None]] = [
            (_autocast(), None)
        ]  #: regions that forward is in, and the node that began each
        self._switching = False
        code = getattr(inspect.unwrap(model.forward), "__code__", None)
        self._home = f"{os.path.basename(code.co_filename)}:{code.co_firstlineno}" if code else "unknown line"
        self._inside = 0
        self._open = False

    def __enter__(self) -> "Recorder":
        """Start recording: hang a pair of hooks on every leaf module, so that each call becomes one node."""
        self._handles = []
        self._closed = dict(opaque_parts(self.model))
        for (parent, name), module in self._closed.items():
            parent._modules[name] = OpaqueModule(module)
        for path, module in self.model.named_modules():
            if is_leaf(module) or isinstance(module, OpaqueModule) or (self.closed is not None and self.closed(module)):
                leave = partial(self._leave, path)
                self._handles += [
                    module.register_forward_pre_hook(self._arrive, prepend=True, with_kwargs=True),
                    module.register_forward_hook(leave, with_kwargs=True, always_call=True),
                ]
        self._open = True
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._open = False
        for handle in self._handles:
            handle.remove()
        for (parent, name), module in self._closed.items():
            parent._modules[name] = module

    @property
    def live(self) -> bool:
        """True where the user's code runs, False inside a recorded call and after recording."""
        return self._open and not self._inside

    def note(self, text: str) -> None:
        self.notes[f"{text} ({source()})"] = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.fake is not None and self._inside and func is functional.batch_norm:
            return _batch_normed(*args, **kwargs)
        if not self.live or sys._getframe(1).f_globals.get("__name__", "").startswith(_INNER):
            return func(*args, **kwargs)
        opened_up = run_opened(self, func, args, kwargs)
        if opened_up is not None:
            return opened_up[0]
        self._inside += 1
        try:
            return self._call(func, args, kwargs)
        finally:
            self._inside -= 1

    def _call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        called = getattr(func, "__name__", "")
        attribute = func.__self__.__name__ if called in ("__get__", "__set__") else ""
        name = attribute or called
        if name in _READS and self.fake is not None:
            raise TraceError(refusal(name.strip("_"), source()))
        if name in _READS:
            self.note(f"{name.strip('_')} reads a value of the example")
            self.obstacle = f"reads values of tensors ({source()})"
        if name in ("unbind", "__len__"):
            self._count(args[0], args[1] if len(args) > 1 else kwargs.get("dim", 0))
            self.note(f"{name} bakes in a size of {tuple(args[0].shape)}")
        lowered, before = self._lower((args, kwargs)), _versions((args, kwargs))
        try:
            result = func(*args, **kwargs)
        except VALUE_ERRORS as error:
            raise TraceError(refusal(name.strip("_"), source())) from error
        if attribute == "device":
            self._devices[id(result)] = lowered[0][0]
            self._kept.append(result)
        written = _versions((args, kwargs)) != before or called in ("__set__", "_set_grad_enabled")
        if not (written or name in _SIZES or any(isinstance(leaf, Tensor) for _, leaf in leaves(result))):
            return result
        node = self._emit(*spelled(func, attribute, *lowered))
        if name in _SIZES:
            self._disposable.add(node)
            if "range" in user_names():
                self.unrolled = f"{described(node)} is read next to range(): a loop that counts to it is unrolled"
                self.note(self.unrolled)
        return self._adopt(node, result, before)

    def _count(self, tensor: Tensor, dim: int) -> None:
        """Python counts the entries along a dimension."""
        shape = self._part(self._node_of(tensor), getattr, "shape", tensor.shape)
        guard(self._part(shape, operator.getitem, dim, tensor.shape[dim]), "==", tensor.shape[dim], True)

    def _arrive(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._inside += 1
        if self._inside == 1:
            with _UNSEEN():
                self._pending = self._lower((args, kwargs)), _versions((args, kwargs))

    def _leave(self, path: str, module: nn.Module, args: Any, kwargs: Any, result: Any) -> Any:
        try:
            if self._inside != 1 or result is None:
                return None
            lowered, before = self._pending
            with _UNSEEN() if type(result) is Tensor else contextlib.nullcontext():
                return self._adopt(self._emit("call_module", path, *lowered), result, before)
        finally:
            self._inside -= 1

    def _emit(self, op: str, target: Any, args: Any = (), kwargs: Any = None) -> fx.Node:
        if self._open and not self._switching:
            self._follow_autocast()
        name = "model" if target == "" else None
        node = self.graph.create_node(op, target, tuple(args), kwargs, name=name)
        node.meta["source"] = source()
        return node

    def _follow_autocast(self) -> None:
        """Nodes for the regions of autocast that forward has entered or left since the last node."""
        self._switching = True
        now = _autocast()
        while now != self._autocast[-1][0] and any(now == state for state, _ in self._autocast[:-1]):
            self._emit("call_function", _exit_autocast, (self._autocast.pop()[1],))
        for kind, before, state in zip(DEVICES, self._autocast[-1][0], now, strict=True):
            if before != state:
                node = self._emit("call_function", _enter_autocast, (kind, state[1], state[0], False))
                self._autocast.append((now, node))
                self.obstacle = f"switches autocast ({source()})"
        self._switching = False

    def _lower(self, value: Any) -> Any:
        return map_aggregate(value, self._lower_leaf)

    def _lower_leaf(self, value: Any) -> Any:
        if isinstance(value, np.generic):  # written into a forward it must be a plain number
            return value.item()
        if isinstance(value, TracedInt):
            return value.node if value.recorder is self else int.__int__(value)
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
            if derived and id(tensor) not in self.held:
                raise TraceError(
                    f"{source()}: a tensor of shape {tuple(tensor.shape)} was made by something other than a "
                    "torch function (torch.Tensor(...), from_numpy, vmap, a scripted part, a cache filled by "
                    "another call), so the graph cannot remake it. Use torch.tensor(...) or a function there."
                )
            self.constants[name] = tensor.detach() if derived else tensor
        node = self._emit("get_attr", name)
        node.meta["val"] = snapshot(tensor)
        self._disposable.add(node)
        return node

    def _keep(self, tensor: Tensor, node: fx.Node) -> None:
        self._nodes[tensor] = node
        self._devices.setdefault(id(tensor.device), node)
        self._kept.append(tensor.device)

    def _part(self, node: fx.Node, access: Callable[..., Any], key: Any, value: Any) -> fx.Node:
        part = self._emit("call_function", access, (node, key))
        part.meta["val"] = mapped(snapshot, value)
        self._disposable.add(part)
        return part

    def _adopt(self, node: fx.Node, value: Any, before: Versions) -> Any:
        node.meta["val"] = mapped(snapshot, value)
        return self._follow(node, value, before)

    def _follow(self, node: fx.Node, value: Any, before: Versions) -> Any:
        """Tie `value` to `node`, its parts to `getitem` nodes, and make its sizes live."""
        if isinstance(value, Tensor):
            known = value in self._nodes or id(value) in self._named
            if known and _version(value) == before.get(id(value), _version(value)):
                value = torch.ops.aten.alias.default(value)
            self._keep(value, node)
            return value
        if type(value) is int:
            return TracedInt(value, node, self)
        level = opened(value)
        if level is None:
            return value
        parts = [self._follow(self._part(node, *_access(key), child), child, before) for key, child in level[0]]
        if all(a is b for a, (_, b) in zip(parts, level[0], strict=True)):
            return value
        return torch.Size(parts) if isinstance(value, torch.Size) else level[1](parts)

    def computed(self, function: Callable[..., int], operands: tuple[Any, ...], value: int) -> TracedInt:
        """The result of arithmetic on sizes, recorded as a node of its own."""
        node = self._emit("call_function", function, self._lower(operands))
        node.meta["val"] = value
        self._disposable.add(node)
        return TracedInt(value, node, self)

    def placeholder(self, target: str, value: Any) -> Any:
        """A node for one parameter of forward, and a value of our own to call forward with."""
        node = self.graph.create_node("placeholder", target, name=target.lstrip("*"))
        node.meta.update(val=mapped(snapshot, value), source=self._home)
        for path, leaf in leaves(value):
            if not isinstance(leaf, Tensor) and leaf is not None:
                self.notes[f"argument {target}{path} = {leaf!r} is baked in"] = None
        return self._given(node, mapped(self._own, value))

    def _given(self, node: fx.Node, value: Any) -> Any:
        if isinstance(value, Tensor):
            self._keep(value, node)
        level = opened(value)
        for key, child in level[0] if level else ():
            self._given(self._part(node, *_access(key), child), child)
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

    def output(self, value: Any) -> None:
        """Write the output node: `args[0]` is the nest of tuples, lists and dicts that forward returned.

        Where there are other containers, it is the flat tuple of the leaves; `meta["structure"]` is always
        the nest with the numbers of the leaves in their places.
        """
        for path, leaf in leaves(value):
            if not isinstance(leaf, (Tensor, int, float, complex, str, type(None), torch.dtype, torch.device)):
                raise TraceError(
                    f"forward returns a {type(leaf).__name__} at output{path}, which cannot be looked into. "
                    "Return tensors in tuples, lists, dicts or dataclasses, switch it off (such as "
                    "use_cache=False), or register the class with torch.utils._pytree."
                )
        self._follow_autocast()
        lowered = mapped(self._lower_leaf, value) if is_plain(value) else None
        flat = tuple(self._lower_leaf(leaf) for _, leaf in leaves(value))
        node = self._emit("output", "output", (flat if lowered is None else lowered,))
        count = itertools.count()
        node.meta.update(val=mapped(snapshot, value), structure=mapped(lambda _: next(count), value))
        node.meta["source"] = self._home
        self._tidy()

    def _tidy(self) -> None:
        """Drop sizes, parts and attributes that nothing reads; calls stay, they may write."""
        for node in reversed(self.graph.nodes):
            if node in self._disposable and not node.users and not node.meta.get("baked"):
                self.graph.erase_node(node)
        used = {node.target for node in self.graph.nodes if node.op == "get_attr"}
        self.constants = {name: tensor for name, tensor in self.constants.items() if name in used}


def _batch_normed(
    inputs: Tensor,
    mean: Any,
    variance: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    *_: Any,
    **__: Any,
) -> Tensor:
    """What ``functional.batch_norm`` gives on fake tensors, without the many steps that torch takes to find out."""
    if training and inputs.numel() == inputs.shape[1]:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {inputs.size()}")
    return inputs.clone() if weight is None else inputs + weight.sum()


def _autocast() -> tuple[tuple[bool, torch.dtype], ...]:
    return tuple((torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in DEVICES)


def _access(key: Any) -> tuple[Callable[..., Any], Any]:
    if isinstance(key, pytree.GetAttrKey):
        return getattr, key.name
    return operator.getitem, key.idx if isinstance(key, pytree.SequenceKey) else key.key


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _versions(tree: Any) -> Versions:
    return {id(tensor): _version(tensor) for tensor in tensors_in(tree)}
