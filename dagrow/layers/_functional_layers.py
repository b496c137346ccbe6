"""Functions that are called with parameters, and the layers that compute the same."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import matmul
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from dagrow._pytree import leaf_values
from dagrow.layers._linear import Product
from dagrow.layers._op_tables import op_name

ENTRIES = ("weight", "bias", "running_mean", "running_var")  #: of layers, that functions take as arguments
THIN = frozenset({"squeeze", "unsqueeze"})  #: operations that add or drop dimensions of one entry


@dataclass(frozen=True)
class ParameterSource:
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


def parameter_of(value: Any, held: Mapping[str, Tensor]) -> ParameterSource | None:
    """The parameter or buffer of the model that an argument is: itself, after dimensions of one entry came and went,
    or, of a matrix, transposed; or None."""
    node = value
    while isinstance(node, fx.Node) and op_name(node) in THIN:
        node = node.args[0] if node.args else None
    if isinstance(node, fx.Node) and node.op == "get_attr" and node.target in held:
        same = held[str(node.target)].shape == value.meta["val"].shape
        return ParameterSource(node, thin=node is not value) if same else None
    if not isinstance(value, fx.Node) or op_name(value) not in _TURNS or not value.args or value.kwargs:
        return None
    matrix, dims = value.args[0], [dim % 2 for dim in leaf_values(value.args[1:]) if isinstance(dim, int)]
    if not isinstance(matrix, fx.Node) or matrix.op != "get_attr" or matrix.target not in held:
        return None
    swapped = dims == [1, 0] if op_name(value) == "permute" else len(set(dims)) in (0, 2)
    return ParameterSource(matrix, turned=True) if swapped and held[str(matrix.target)].ndim == 2 else None


@dataclass(frozen=True)
class FunctionalLayer:
    """A call of a function with parameters.

    Attributes:
        module: a layer that computes the same, with the very parameters.
        inputs: the node that it reads.
        paths: its parameters and buffers by their names in the layer, as the model names them.
        names: of the function's arguments, in their order.
    """

    module: nn.Module
    inputs: fx.Node
    paths: Mapping[str, str]
    names: tuple[str, ...]


def functional_layers(node: fx.Node, held: Mapping[str, Tensor]) -> Iterator[FunctionalLayer]:
    """The layers that a call of a function may stand for."""
    function = node.target if node.op == "call_function" else getattr(torch, str(node.target), None)
    for call in _CALLS.get(function, ()):
        given = call.arguments(node)
        origins = {} if given is None else _origins(given, held)
        settings = {} if given is None else _settings(given)
        if given is not None and origins and settings is not None and isinstance(given.get("input"), fx.Node):
            paths = {entry: origin.path for entry, origin in origins.items()}
            turned = any(origin.turned for origin in origins.values())
            module = call.make({entry: held[path] for entry, path in paths.items()}, settings, turned)
            if module is not None and not _untold(given, origins, settings, held):
                yield FunctionalLayer(module, given["input"], paths, call.names)


def _origins(given: Mapping[str, Any], held: Mapping[str, Tensor]) -> dict[str, ParameterSource]:
    """The parameters that a function was called with; empty if one of its entries is something else."""
    wanted = {entry: parameter_of(given[entry], held) for entry in ENTRIES if given.get(entry) is not None}
    found = {entry: origin for entry, origin in wanted.items() if origin is not None and origin.serves(entry, held)}
    whole = len(found) == len(wanted) and {entry for entry, origin in found.items() if origin.turned} <= {"weight"}
    return found if whole else {}


def _settings(given: Mapping[str, Any]) -> dict[str, Any] | None:
    """The other arguments, with numbers for nodes that follow from the sizes of parameters and for a count of groups;
    None if one is computed from the input."""
    found = {}
    for name, value in given.items():
        if name not in ("input", *ENTRIES):
            counted = isinstance(value, fx.Node) and (name == "groups" or _of_parameters(value))
            found[name] = value.meta["val"] if counted and isinstance(value.meta["val"], int) else value
    return None if any(isinstance(part, fx.Node) for value in found.values() for part in _each(value)) else found


def _untold(
    given: Mapping[str, Any],
    origins: Mapping[str, ParameterSource],
    settings: Mapping[str, Any],
    held: Mapping[str, Tensor],
) -> bool:
    """Whether there is one group, or as many as there are channels, of which there is one."""
    thin = any(origin.thin and held[origin.path].shape[1:2] == (1,) for origin in origins.values())
    return settings.get("groups", 1) == 1 and (thin or isinstance(given.get("groups"), fx.Node))


def _of_parameters(node: fx.Node) -> bool:
    return node.op == "get_attr" or (bool(node.all_input_nodes) and all(map(_of_parameters, node.all_input_nodes)))


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
    given = {
        key: value if key == "groups" or isinstance(value, str) else _of(value, weight.ndim - 2)
        for key, value in settings.items()
    }
    module = kind(sizes[inputs], sizes[outputs], tuple(weight.shape[2:]), device="meta", **given)
    return _holding(module, tensors)


def _batch_norm(tensors: Mapping[str, Tensor], settings: Mapping[str, Any], turned: bool) -> nn.Module | None:
    width = len(next(iter(tensors.values())))
    module = nn.BatchNorm2d(
        width,
        settings.get("eps", 1e-5),
        affine="weight" in tensors,
        track_running_stats="running_mean" in tensors,
        device="meta",
    )
    return _holding(module, tensors) if len(tensors) == 4 else None


def _group_norm(tensors: Mapping[str, Tensor], settings: Mapping[str, Any], turned: bool) -> nn.Module | None:
    groups, width = settings["num_groups"], len(next(iter(tensors.values())))
    module = nn.GroupNorm(groups, width, settings.get("eps", 1e-5), device="meta")
    return _holding(module, tensors) if len(tensors) == 2 else None


def _slopes(tensors: Mapping[str, Tensor], settings: Mapping[str, Any], turned: bool) -> nn.Module | None:
    return _holding(nn.PReLU(tensors["weight"].numel(), device="meta"), tensors)


_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_ORDER = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_ORDER_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_TURNS = {"t", "T", "mT", "transpose", "swapaxes", "swapdims", "permute"}
_PRODUCTS = (_Call(("input", "weight"), _product), _Call(("weight", "input"), _left))
_CALLS: dict[Any, tuple[_Call, ...]] = {
    functional.linear: (_Call(("input", "weight", "bias"), _linear),),
    torch.matmul: _PRODUCTS,
    torch.mm: _PRODUCTS,
    matmul: _PRODUCTS,
    torch.addmm: (_Call(("bias", "input", "weight"), _product),),
    functional.batch_norm: (
        _Call(("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"), _batch_norm),
    ),
    functional.group_norm: (_Call(("input", "num_groups", "weight", "bias", "eps"), _group_norm),),
    functional.prelu: (_Call(("input", "weight"), _slopes),),
} | {
    getattr(space, f"{name}{d}d"): (_Call(order, partial(_convolution, getattr(nn, f"{kind}{d}d"))),)
    for space in (functional, torch)
    for name, kind, order in (("conv", "Conv", _ORDER), ("conv_transpose", "ConvTranspose", _ORDER_TRANSPOSED))
    for d in (1, 2, 3)
}


def _each(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (tuple, list)) else [value]


def _of(value: Any, count: int) -> tuple[int, ...]:
    """A setting for each dimension of space."""
    given = _each(value)
    return tuple(given) * count if len(given) == 1 else tuple(given)


def _holding(module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The layer with the very tensors, and no other."""
    for entry in ENTRIES:
        if entry in module._parameters:
            module._parameters[entry] = tensors.get(entry)  # type: ignore[assignment]
        elif entry in module._buffers:
            module._buffers[entry] = tensors.get(entry)
    return module
