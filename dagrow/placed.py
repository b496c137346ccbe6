"""Layers at their places in a graph: calls of modules that a rule knows, and functions called with a parameter."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from operator import matmul
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from dagrow.layers import LayerRule, Product, rule_for
from dagrow.ops import op_name
from dagrow.stated import arguments_of

__all__ = ["THIN", "Placed", "parameter_of", "placed"]

THIN = frozenset({"squeeze", "unsqueeze"})  #: operations that add or drop dimensions of one entry


@dataclass(frozen=True, eq=False)
class Placed:
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


def placed(graph: fx.Graph, model: nn.Module, rules: Sequence[LayerRule]) -> dict[fx.Node, Placed]:
    """The layers of a graph that a rule knows, by their nodes."""
    modules = dict(model.named_modules())
    held = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    known = {name: rule_for(module, rules) for name, module in modules.items()}
    found: dict[fx.Node, Placed] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            name, rule, inputs = str(node.target), known[str(node.target)], _only(node)
            if rule is not None and inputs is not None:
                found[node] = Placed(name, modules[name], rule, inputs, owner=name)
        elif node.op in ("call_function", "call_method"):
            layer = _functional(node, held, rules)
            if layer is not None:
                found[node] = layer
    return _told_apart(found)


def _told_apart(found: Mapping[fx.Node, Placed]) -> dict[fx.Node, Placed]:
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
    }  # fmt: skip


def _only(node: fx.Node) -> fx.Node | None:
    """The one thing that a module is called with."""
    given: list[Any] = [*node.args, *node.kwargs.values()]
    return given[0] if len(given) == 1 and isinstance(given[0], fx.Node) else None


def _functional(node: fx.Node, held: Mapping[str, Tensor], rules: Sequence[LayerRule]) -> Placed | None:
    function = node.target if node.op == "call_function" else getattr(torch, str(node.target), None)
    found = (_called(node, call, held, rules) for call in _CALLS.get(function, ()))
    return next((layer for layer in found if layer is not None), None)


def _called(node: fx.Node, call: "_Call", held: Mapping[str, Tensor], rules: Sequence[LayerRule]) -> Placed | None:
    given = call.arguments(node)
    if given is None or not isinstance(given.get("input"), fx.Node):
        return None
    origins = {entry: parameter_of(given[entry], held) for entry in _ENTRIES if given.get(entry) is not None}
    tensors = {entry: origin for entry, origin in origins.items() if origin is not None and origin.serves(entry, held)}
    turned = {entry for entry, origin in tensors.items() if origin.turned}
    if not tensors or len(tensors) < len(origins) or not turned <= {"weight"}:
        return None
    settings = {key: _setting(key, value) for key, value in given.items() if key not in ("input", *_ENTRIES)}
    if any(isinstance(value, fx.Node) for setting in settings.values() for value in _each(setting)):
        return None
    thin = any(origin.thin and held[origin.path].shape[1:2] == (1,) for origin in tensors.values())
    if settings.get("groups", 1) == 1 and (thin or isinstance(given.get("groups"), fx.Node)):
        return None  # one group, or as many as there are channels: that cannot be told
    module = call.make({entry: held[origin.path] for entry, origin in tensors.items()}, settings, bool(turned))
    rule = None if module is None else rule_for(module, rules)
    if module is None or rule is None or rule.channel_dim(given["input"].meta["val"].ndim) < 0:
        return None
    paths = {entry: origin.path for entry, origin in tensors.items()}
    first = next(iter(paths.values()))
    owner, _, leaf = first.rpartition(".")
    return Placed(
        owner if leaf in _ENTRIES and owner else first, module, rule, given["input"], paths, owner, call.names
    )


def _setting(name: str, value: Any) -> Any:
    """A number instead of the node of one that follows from the sizes of parameters, or that counts groups."""
    if (
        isinstance(value, fx.Node)
        and isinstance(value.meta["val"], int)
        and (name == "groups" or _of_parameters(value))
    ):
        return value.meta["val"]
    return value


def _of_parameters(node: fx.Node) -> bool:
    return node.op == "get_attr" or (bool(node.all_input_nodes) and all(map(_of_parameters, node.all_input_nodes)))


@dataclass(frozen=True)
class _Origin:
    """The parameter or buffer that an argument is, or whose transpose it is."""

    node: fx.Node
    turned: bool = False
    thin: bool = False  #: whether dimensions of one entry came and went

    @property
    def path(self) -> str:
        return str(self.node.target)

    def serves(self, entry: str, held: Mapping[str, Tensor]) -> bool:
        """Whether it may be this entry of a layer: weights are parameters, and grow along dimensions that stay."""
        tensor = held[self.path]
        stays = not self.thin or (tensor.ndim > 2 and tensor.shape[0] > 1) or 1 not in tensor.shape
        return stays and (isinstance(tensor, nn.Parameter) or entry not in ("weight", "bias"))


def parameter_of(value: Any, held: Mapping[str, Tensor]) -> _Origin | None:
    """The parameter or buffer of the model that an argument is: itself, after dimensions of one entry came and went,
    or, of a matrix, transposed; or None."""
    node = value
    while isinstance(node, fx.Node) and op_name(node) in THIN:
        node = node.args[0] if node.args else None
    if isinstance(node, fx.Node) and node.op == "get_attr" and node.target in held:
        same = held[str(node.target)].shape == value.meta["val"].shape
        return _Origin(node, thin=node is not value) if same else None
    if not isinstance(value, fx.Node) or op_name(value) not in _TURNS or not value.args or value.kwargs:
        return None
    matrix, dims = value.args[0], [dim % 2 for dim in arguments_of(value.args[1:]) if isinstance(dim, int)]
    if not isinstance(matrix, fx.Node) or matrix.op != "get_attr" or matrix.target not in held:
        return None
    swapped = dims == [1, 0] if op_name(value) == "permute" else len(set(dims)) in (0, 2)
    return _Origin(matrix, turned=True) if swapped and held[str(matrix.target)].ndim == 2 else None


@dataclass(frozen=True)
class _Call:
    """How a function takes its arguments, and the layer that does the same.

    Attributes:
        names: of its arguments, in their order.
        make: a layer of given tensors and settings, and of the transpose of the weight if it is turned; or None.
    """

    names: tuple[str, ...]
    make: Callable[[Mapping[str, Tensor], Mapping[str, Any], bool], nn.Module | None]

    def arguments(self, node: fx.Node) -> dict[str, Any] | None:
        """By their names; None for a call that gives others."""
        given = {**dict(zip(self.names, node.args, strict=False)), **node.kwargs}
        return given if len(node.args) <= len(self.names) and set(given) <= set(self.names) else None


def _linear(tensors: Mapping[str, Tensor], settings: Mapping[str, Any], turned: bool) -> nn.Module | None:
    weight, bias = tensors.get("weight"), tensors.get("bias")
    if weight is None or weight.ndim != 2 or settings:
        return None
    if bias is not None and bias.shape != weight.shape[1 if turned else 0 :][:1]:
        return None
    if turned:
        return Product(weight, bias, turned=True)
    outputs, inputs = weight.shape
    return _holding(nn.Linear(inputs, outputs, device="meta"), tensors)


def _product(tensors: Mapping[str, Tensor], settings: Mapping[str, Any], turned: bool) -> nn.Module | None:
    return _linear(tensors, settings, not turned)


def _left(tensors: Mapping[str, Tensor], settings: Mapping[str, Any], turned: bool) -> nn.Module | None:
    weight = tensors["weight"]
    return Product(weight, turned=turned, columns=True) if weight.ndim == 2 else None


def _convolution(
    kind: type[nn.Module], tensors: Mapping[str, Tensor], settings: Mapping[str, Any], turned: bool
) -> nn.Module | None:
    weight, groups = tensors["weight"], settings.get("groups", 1)
    if weight.ndim < 3:
        return None
    inputs, outputs = (0, 1) if issubclass(kind, _TRANSPOSED) else (1, 0)
    sizes = list(weight.shape[:2])
    sizes[1] *= groups  # the second dimension is that of one group
    given = {key: value if key == "groups" or isinstance(value, str) else _of(value, weight.ndim - 2)
             for key, value in settings.items()}  # fmt: skip
    module = kind(sizes[inputs], sizes[outputs], tuple(weight.shape[2:]), device="meta", **given)
    return _holding(module, tensors)


def _batch_norm(tensors: Mapping[str, Tensor], settings: Mapping[str, Any], turned: bool) -> nn.Module | None:
    width = len(next(iter(tensors.values())))
    module = nn.BatchNorm2d(
        width, settings.get("eps", 1e-5), affine="weight" in tensors, track_running_stats="running_mean" in tensors,
        device="meta",
    )  # fmt: skip
    return _holding(module, tensors) if len(tensors) == 4 else None


def _group_norm(tensors: Mapping[str, Tensor], settings: Mapping[str, Any], turned: bool) -> nn.Module | None:
    groups, width = settings["num_groups"], len(next(iter(tensors.values())))
    module = nn.GroupNorm(groups, width, settings.get("eps", 1e-5), device="meta")
    return _holding(module, tensors) if len(tensors) == 2 else None


def _slopes(tensors: Mapping[str, Tensor], settings: Mapping[str, Any], turned: bool) -> nn.Module | None:
    return _holding(nn.PReLU(tensors["weight"].numel(), device="meta"), tensors)


_ENTRIES = ("weight", "bias", "running_mean", "running_var")
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_ORDER = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_ORDER_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_TURNS = {"t", "T", "mT", "transpose", "swapaxes", "swapdims", "permute"}
_PRODUCTS = (_Call(("input", "weight"), _product), _Call(("weight", "input"), _left))
_CALLS: dict[Any, tuple[_Call, ...]] = {
    functional.linear: (_Call(("input", "weight", "bias"), _linear),),
    torch.matmul: _PRODUCTS, torch.mm: _PRODUCTS, matmul: _PRODUCTS,
    torch.addmm: (_Call(("bias", "input", "weight"), _product),),
    functional.batch_norm: (_Call(
        ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"), _batch_norm
    ),),
    functional.group_norm: (_Call(("input", "num_groups", "weight", "bias", "eps"), _group_norm),),
    functional.prelu: (_Call(("input", "weight"), _slopes),),
} | {
    getattr(space, f"{name}{d}d"): (_Call(order, partial(_convolution, getattr(nn, f"{kind}{d}d"))),)
    for space in (functional, torch)
    for name, kind, order in (("conv", "Conv", _ORDER), ("conv_transpose", "ConvTranspose", _ORDER_TRANSPOSED))
    for d in (1, 2, 3)
}  # fmt: skip


def _each(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (tuple, list)) else [value]


def _of(value: Any, count: int) -> tuple[int, ...]:
    """A setting for each dimension of space."""
    given = _each(value)
    return tuple(given) * count if len(given) == 1 else tuple(given)


def _holding(module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The layer with the very tensors, and no other."""
    for entry in _ENTRIES:
        if entry in module._parameters:
            module._parameters[entry] = tensors.get(entry)  # type: ignore[assignment]
        elif entry in module._buffers:
            module._buffers[entry] = tensors.get(entry)
    return module
