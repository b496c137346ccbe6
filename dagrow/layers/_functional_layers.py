"""Functions that are called with parameters, and the layers that compute the same."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from operator import matmul
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from dagrow._pytree import leaf_values
from dagrow.layers._geometry import per_dimension
from dagrow.layers._linear import Product
from dagrow.layers._op_tables import op_name

ENTRIES = ("weight", "bias", "running_mean", "running_var")  #: of layers, that functions take as arguments
UNIT_DIM_OPS = frozenset({"squeeze", "unsqueeze"})  #: operations that add or drop dimensions of one entry
_COPIES = frozenset({"to", "type_as", "contiguous", "float", "double"})  #: perhaps of another type
_TRANSPOSES = frozenset({"t", "T", "mT", "transpose", "swapaxes", "swapdims", "permute"})
Settings = Mapping[str, Any]  #: arguments of a function by their names
Tensors = Mapping[str, Tensor]  #: a model's parameters and buffers by their paths, or a layer's by their names


@dataclass(frozen=True)
class ParameterSource:
    """The parameter or buffer that an argument is, or whose transpose it is.

    Attributes:
        node: that reads it.
        turned: whether the argument is its transpose.
        squeezed: whether dimensions of one entry came and went.
    """

    node: fx.Node
    turned: bool = False
    squeezed: bool = False

    @property
    def path(self) -> str:
        """The model's name of it."""
        return str(self.node.target)

    def serves(self, entry: str, tensors: Tensors) -> bool:
        """Whether it may be this entry of a layer: weights are parameters, and grow along dimensions that stay."""
        tensor = tensors[self.path]
        stays = not self.squeezed or (tensor.ndim > 2 and tensor.shape[0] > 1) or 1 not in tensor.shape
        return stays and (isinstance(tensor, nn.Parameter) or entry not in ("weight", "bias"))


def parameter_of(value: Any, tensors: Tensors) -> ParameterSource | None:
    """The parameter or buffer of the model that an argument is.

    Args:
        value: the argument.
        tensors: the model's parameters and buffers by their paths.

    Returns:
        Itself, also after dimensions of one entry came and went or a cast to the type that it has; of a matrix also
        transposed; or None.
    """
    node, squeezed = value, False
    while isinstance(node, fx.Node) and op_name(node) in UNIT_DIM_OPS | _COPIES:
        squeezed |= op_name(node) in UNIT_DIM_OPS
        node = node.args[0] if node.args else None
    if isinstance(node, fx.Node) and node.op == "get_attr" and node.target in tensors:
        tensor, computed = tensors[str(node.target)], value.meta["val"]
        same = (tensor.shape, tensor.dtype) == (computed.shape, computed.dtype)
        return ParameterSource(node, squeezed=squeezed) if same else None
    if not isinstance(value, fx.Node) or op_name(value) not in _TRANSPOSES or not value.args or value.kwargs:
        return None
    matrix, dims = value.args[0], [dim % 2 for dim in leaf_values(value.args[1:]) if isinstance(dim, int)]
    if not isinstance(matrix, fx.Node) or matrix.op != "get_attr" or matrix.target not in tensors:
        return None
    swapped = dims == [1, 0] if op_name(value) == "permute" else len(set(dims)) in (0, 2)
    return ParameterSource(matrix, turned=True) if swapped and tensors[str(matrix.target)].ndim == 2 else None


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


def functional_layers(node: fx.Node, tensors: Tensors) -> Iterator[FunctionalLayer]:
    """The layers that a call of a function may stand for."""
    function = node.target if node.op == "call_function" else getattr(torch, str(node.target), None)
    for signature in _SIGNATURES.get(function, ()):
        arguments = signature.bind(node)
        inputs = arguments.get("input")
        sources, settings = _sources(arguments, tensors), _settings(arguments)
        if not isinstance(inputs, fx.Node) or not sources or settings is None:
            continue
        paths = {entry: source.path for entry, source in sources.items()}
        turned = any(source.turned for source in sources.values())
        module = signature.build({entry: tensors[path] for entry, path in paths.items()}, settings, turned)
        if module is not None and not _ambiguous_groups(arguments, sources, settings, tensors):
            yield FunctionalLayer(module, inputs, paths, signature.names)


def _sources(arguments: Settings, tensors: Tensors) -> dict[str, ParameterSource]:
    """The parameters that a function was called with; empty if one of its entries is something else."""
    entries = [entry for entry in ENTRIES if arguments.get(entry) is not None]
    sources = {entry: parameter_of(arguments[entry], tensors) for entry in entries}
    serving = {entry: source for entry, source in sources.items() if source and source.serves(entry, tensors)}
    only_weight_is_turned = {entry for entry, source in serving.items() if source.turned} <= {"weight"}
    return serving if len(serving) == len(entries) and only_weight_is_turned else {}


def _settings(arguments: Settings) -> dict[str, Any] | None:
    """The other arguments; None if one is computed from the input."""
    settings = {}  # in which nodes that follow from the sizes of parameters, and a count of groups, are numbers
    for name, value in arguments.items():
        if name not in ("input", *ENTRIES):
            is_known = isinstance(value, fx.Node) and (name == "groups" or _of_parameters(value))
            settings[name] = value.meta["val"] if is_known and isinstance(value.meta["val"], int) else value
    return None if any(isinstance(part, fx.Node) for part in leaf_values(settings)) else settings


def _ambiguous_groups(
    arguments: Settings, sources: Mapping[str, ParameterSource], settings: Settings, tensors: Tensors
) -> bool:
    """Whether there is one group, or as many as there are channels, of which there is one: nobody can say which."""
    single = any(source.squeezed and tensors[source.path].shape[1:2] == (1,) for source in sources.values())
    return settings.get("groups", 1) == 1 and (single or isinstance(arguments.get("groups"), fx.Node))


def _of_parameters(node: fx.Node) -> bool:
    return node.op == "get_attr" or (bool(node.all_input_nodes) and all(map(_of_parameters, node.all_input_nodes)))


@dataclass(frozen=True)
class _Signature:
    """How a function takes its arguments, and the layer that does the same.

    Attributes:
        names: of its arguments, in their order.
        build: a layer of given tensors and settings, and of the transpose of the weight if it is turned; or None.
    """

    names: tuple[str, ...]
    build: Callable[[Tensors, Settings, bool], nn.Module | None]

    def bind(self, node: fx.Node) -> dict[str, Any]:
        """Arguments by their names; empty for a call with others."""
        arguments = {**dict(zip(self.names, node.args, strict=False)), **node.kwargs}
        return arguments if len(node.args) <= len(self.names) and set(arguments) <= set(self.names) else {}


def _linear(tensors: Tensors, settings: Settings, turned: bool) -> nn.Module | None:
    weight, bias = tensors.get("weight"), tensors.get("bias")
    if weight is None or weight.ndim != 2 or settings:
        return None
    if bias is not None and bias.shape != weight.shape[1 if turned else 0 :][:1]:
        return None
    if turned:
        return Product(weight, bias, turned=True)
    outputs, inputs = weight.shape
    return _with_tensors(nn.Linear(inputs, outputs, device="meta"), tensors)


def _product(tensors: Tensors, settings: Settings, turned: bool) -> nn.Module | None:
    return _linear(tensors, settings, not turned)


def _einsum(tensors: Tensors, settings: Settings, turned: bool) -> nn.Module | None:
    """``...i,oi->...o``, or the weight the other way round."""
    sides, arrow, out = str(settings["equation"]).replace(" ", "").partition("->")
    read, _, weight = sides.partition(",")
    letters = [side.replace("...", "") for side in (read, weight, out)]
    if not arrow or len(weight) != 2 or any(len(set(side)) < len(side) for side in letters) or not letters[0]:
        return None
    i, o = read[-1], out[-1:]
    if out != read[:-1] + o or {i, o} != set(weight) or o in read:
        return None
    return _linear(tensors, {}, turned != (weight[0] == i))


def _left_product(tensors: Tensors, settings: Settings, turned: bool) -> nn.Module | None:
    weight = tensors["weight"]
    return Product(weight, turned=turned, columns=True) if weight.ndim == 2 else None


def _convolution(kind: type[nn.Module], tensors: Tensors, settings: Settings, turned: bool) -> nn.Module | None:
    weight, groups = tensors["weight"], settings.get("groups", 1)
    if weight.ndim < 3:
        return None
    first, second = weight.shape[0], weight.shape[1] * groups  # the second dimension is that of one group
    inputs, outputs = (first, second) if issubclass(kind, _TRANSPOSED) else (second, first)
    options = {
        key: value if key == "groups" or isinstance(value, str) else per_dimension(value, weight.ndim - 2)
        for key, value in settings.items()
    }
    return _with_tensors(kind(inputs, outputs, tuple(weight.shape[2:]), device="meta", **options), tensors)


def _batch_norm(tensors: Tensors, settings: Settings, turned: bool) -> nn.Module | None:
    width, eps = len(next(iter(tensors.values()))), settings.get("eps", 1e-5)
    affine, tracks = "weight" in tensors, "running_mean" in tensors
    module = nn.BatchNorm2d(width, eps, affine=affine, track_running_stats=tracks, device="meta")
    return _with_tensors(module, tensors) if len(tensors) == 4 else None


def _group_norm(tensors: Tensors, settings: Settings, turned: bool) -> nn.Module | None:
    groups, width = settings["num_groups"], len(next(iter(tensors.values())))
    module = nn.GroupNorm(groups, width, settings.get("eps", 1e-5), device="meta")
    return _with_tensors(module, tensors) if len(tensors) == 2 else None


def _prelu(tensors: Tensors, settings: Settings, turned: bool) -> nn.Module | None:
    return _with_tensors(nn.PReLU(tensors["weight"].numel(), device="meta"), tensors)


_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_ORDER = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_ORDER_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_ORDER_BATCH_NORM = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
_PRODUCTS = (_Signature(("input", "weight"), _product), _Signature(("weight", "input"), _left_product))
_SIGNATURES: dict[Any, tuple[_Signature, ...]] = {
    functional.linear: (_Signature(("input", "weight", "bias"), _linear),),
    torch.matmul: _PRODUCTS,
    torch.mm: _PRODUCTS,
    matmul: _PRODUCTS,
    torch.einsum: (_Signature(("equation", "input", "weight"), _einsum),),
    torch.addmm: (_Signature(("bias", "input", "weight"), _product),),
    functional.batch_norm: (_Signature(_ORDER_BATCH_NORM, _batch_norm),),
    functional.group_norm: (_Signature(("input", "num_groups", "weight", "bias", "eps"), _group_norm),),
    functional.prelu: (_Signature(("input", "weight"), _prelu),),
} | {
    getattr(namespace, f"{name}{d}d"): (_Signature(order, partial(_convolution, getattr(nn, f"{kind}{d}d"))),)
    for namespace in (functional, torch)
    for name, kind, order in (("conv", "Conv", _ORDER), ("conv_transpose", "ConvTranspose", _ORDER_TRANSPOSED))
    for d in (1, 2, 3)
}


def _with_tensors(module: nn.Module, tensors: Tensors) -> nn.Module:
    """The layer with the very tensors, and no other."""
    for entry in ENTRIES:
        if entry in module._parameters:
            module._parameters[entry] = tensors.get(entry)  # type: ignore[assignment]
        elif entry in module._buffers:
            module._buffers[entry] = tensors.get(entry)
    return module
