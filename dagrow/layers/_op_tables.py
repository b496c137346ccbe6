"""What torch operations do to channels, by class of operation. No operation is assumed harmless: unknown freezes."""

from collections.abc import Callable, Mapping, Sequence, Set
from functools import lru_cache
from typing import Any

import torch
from torch import fx, nn

#: y = f(x), entry by entry
POINTWISE = frozenset(
    """
    abs absolute acos acosh alpha_dropout arccos arccosh arcsin arcsinh arctan arctanh asin asinh atan atanh ceil celu
    clamp clamp_max clamp_min clip clone contiguous cos cosh cpu cuda data detach digamma special_expit type_as
    dropout dropout1d dropout2d dropout3d elu erf erfc erfinv exp exp2 expm1 feature_alpha_dropout floor frac isfinite
    isinf isnan lgamma log10 log2 logical_not logit positive sgn sinc sinh trunc
    float double half gelu hardshrink hardsigmoid hardswish hardtanh leaky_relu log log1p log_sigmoid logsigmoid
    mish nan_to_num neg negative pos reciprocal relu relu6 round rrelu rsqrt selu sigmoid sign silu sin softplus
    softshrink softsign sqrt square tan tanh tanhshrink threshold to type bfloat16
    angle as_tensor asarray coalesce conj conj_physical frexp imag real resolve_conj resolve_neg to_dense to_sparse
    to_sparse_coo to_sparse_csr
    """.split()
)
#: an entry is drawn at random, from a distribution that at most the entry there before tells
NOISE = frozenset(
    "bernoulli cauchy exponential geometric log_normal normal poisson randint_like random uniform".split()
)
#: y = f(x1, x2, ...), entry by entry after broadcasting
PAIRWISE = frozenset(
    """
    add sub subtract mul multiply div divide truediv floordiv mod pow maximum minimum where lerp addcmul addcdiv
    eq ne lt le gt ge masked_fill logical_and logical_or logical_xor bitwise_and bitwise_or fmod remainder atan2 radd
    rsub rmul rtruediv rdiv rpow copysign float_power floor_divide fmax fmin heaviside hypot ldexp logaddexp logaddexp2
    true_divide xlogy complex polar
    """.split()
)
#: entries are moved, repeated or dropped, never computed with: executed as they are on labels
MOVES = frozenset(
    """
    broadcast_to cat channel_shuffle chunk concat concatenate expand expand_as flatten flip getitem movedim moveaxis
    narrow permute pixel_shuffle pixel_unshuffle ravel repeat repeat_interleave reshape reshape_as roll select split
    split_with_sizes squeeze stack swapaxes swapdims t T mT tensor_split tile transpose unbind unflatten unsqueeze
    values view view_as view_as_real
    """.split()
)
#: a dimension is cut into parts
CUTS = frozenset({"chunk", "split", "tensor_split"})
#: entries along some dimensions are merged
REDUCTIONS = frozenset(
    """
    all amax amin aminmax any argmax argmin count_nonzero linalg_vector_norm logsumexp max mean median min nanmean
    nanmedian nansum norm prod std std_mean sum var var_mean
    """.split()
)
#: results are sizes or facts about a tensor, not values
SIZES = frozenset("size shape dim ndim numel len dtype device is_floating_point is_complex requires_grad".split())
#: sums of products of two tensors over a dimension
PRODUCTS = frozenset("matmul bmm mm einsum scaled_dot_product_attention".split())
#: f(0) = 0
ZERO_KEEPING = frozenset(
    """
    abs clone contiguous data detach dropout dropout1d dropout2d dropout3d elu celu expm1 feature_alpha_dropout float
    double half bfloat16 to type gelu hardshrink hardswish leaky_relu log1p mish neg negative pos relu relu6 round rrelu
    selu sign silu sin softshrink softsign sqrt square tan tanh tanhshrink
    mul multiply rmul mean sum coalesce to_dense to_sparse
    """.split()
)
#: switches that change how what follows is computed, not what becomes of channels
MODES = frozenset("set_grad_enabled enter_autocast exit_autocast".split())
#: tensors that are alike at all entries, in which no channel is told from another: one number, or noise
UNIFORM = frozenset(
    """
    empty empty_like full full_like new_empty new_full new_ones new_zeros ones ones_like rand rand_like randn
    randn_like zeros zeros_like
    """.split()
)
#: a PReLU with a slope for each channel has a rule of its own
_POINTWISE_MODULES = tuple(
    getattr(nn, name)
    for name in """
    Identity Dropout Dropout1d Dropout2d Dropout3d AlphaDropout FeatureAlphaDropout ReLU ReLU6 LeakyReLU RReLU ELU CELU
    SELU GELU SiLU Mish Tanh Sigmoid Softplus Softsign Tanhshrink LogSigmoid Hardtanh Hardsigmoid Hardswish Hardshrink
    Softshrink Threshold PReLU
    """.split()
)
#: those of them that make something else of 0
_SHIFTING_MODULES = (
    *(nn.AlphaDropout, nn.FeatureAlphaDropout, nn.Sigmoid, nn.Softplus, nn.LogSigmoid),
    *(nn.Hardsigmoid, nn.Hardtanh, nn.Threshold),
)
_MOVE_MODULES = (nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle)
#: modules that are known not to grow
REFUSALS: dict[type[nn.Module], str] = {
    nn.RNNBase: "is recurrent: its state would have to grow along",
    nn.RNNCellBase: "is recurrent: its state would have to grow along",
    nn.Embedding: "is a table, which no rule widens",
    nn.EmbeddingBag: "is a table, which no rule widens",
}


def _is_one_of(module: nn.Module, kinds: Sequence[type[nn.Module]]) -> bool:
    """Of a type, or of a subclass that keeps its forward."""
    return any(isinstance(module, kind) and type(module).forward is kind.forward for kind in kinds)


def is_move_module(module: nn.Module) -> bool:
    """Whether the module only moves entries.

    Args:
        module: of any class.

    Returns:
        Whether it is of such a type with the type's own forward.
    """
    return _is_one_of(module, _MOVE_MODULES)


def is_pointwise_module(module: nn.Module) -> bool:
    """Whether the module computes each entry from itself alone, in the same way for every channel.

    Args:
        module: of any class.

    Returns:
        Whether it is of such a type with the type's own forward.
    """
    return _is_one_of(module, _POINTWISE_MODULES)


def keeps_zero(module: nn.Module) -> bool:
    """Whether the module computes each entry from itself alone and makes 0 of 0.

    Args:
        module: of any class.

    Returns:
        False where that is not known.
    """
    return is_pointwise_module(module) and not isinstance(module, _SHIFTING_MODULES)


def mixed_dims(node: fx.Node, module: nn.Module | None, ndim: int) -> list[int] | None:
    """The dimensions along which entries meet in an operation that keeps the shape, as in a norm or softmax.

    Args:
        node: the operation.
        module: that it calls, if it calls one.
        ndim: of its input.

    Returns:
        None for any other operation.
    """
    name = op_name(node)
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return list(range(ndim - len(module.normalized_shape), ndim))
    if module is None and name in {"layer_norm", "rms_norm"}:
        shape: Any = node.args[1] if len(node.args) > 1 else node.kwargs["normalized_shape"]
        return list(range(ndim - len(shape), ndim))
    dim: object
    if isinstance(module, (nn.Softmax, nn.LogSoftmax, nn.Softmin)):
        dim = module.dim
    elif module is None and name in {"softmax", "log_softmax", "softmin", "cumsum", "cumprod", "logcumsumexp"}:
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    elif module is None and name == "normalize":
        dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 1)
    else:
        return None
    return [dim % ndim] if isinstance(dim, int) else list(range(ndim))


def reduced_dims(node: fx.Node, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, ...]:
    """The dimensions over which a reduction takes its input.

    Args:
        node: the reduction.
        args: its arguments, the input first.
        kwargs: its keyword arguments.

    Returns:
        From 0 on; all of them where none are named.
    """
    ndim, place = args[0].ndim, 2 if op_name(node) in {"norm", "linalg_vector_norm"} else 1
    dims = args[place] if len(args) > place else kwargs.get("dim", kwargs.get("axis"))
    if dims is None or isinstance(dims, bool):
        return tuple(range(ndim))
    return tuple(d % ndim for d in ((dims,) if isinstance(dims, int) else dims))


def op_name(node: fx.Node) -> str | None:
    """The operation's plain name.

    Args:
        node: a call of a function or a method.

    Returns:
        ``add`` for ``torch.add``, ``Tensor.add_``, ``operator.iadd`` and ``+``; None for a function of others.
    """
    if node.target is getattr and len(node.args) > 1:
        return str(node.args[1])
    return _plain_name(node.op, node.target)


@lru_cache(maxsize=2048)
def _plain_name(op: str, target: Any) -> str | None:
    if op == "call_function" and not _is_torch(target):
        return None
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    if name == "__get__":  # a property of tensors, such as Tensor.shape
        name = getattr(getattr(target, "__self__", None), "__name__", "")
    name = name.strip("_")
    return {"iadd": "add", "isub": "sub", "imul": "mul", "itruediv": "truediv"}.get(name, name)


def _is_torch(target: object) -> bool:
    if target is getattr or target is len:
        return True
    module = getattr(target, "__module__", None) or ""
    owner = getattr(target, "__objclass__", None) or type(getattr(target, "__self__", None))
    return module.startswith(("torch", "_operator")) or issubclass(owner, torch.Tensor) or "torch" in str(owner)


_PRODUCTS_OF_TWO = frozenset(
    """
    mul multiply div divide truediv true_divide floor_divide floordiv pow mod remainder fmod
    """.split()
)
#: of 0 they make what cannot be multiplied with, or learns nothing; of 1 a number like any other
_FROM_ONE = frozenset("abs absolute log log10 log2 reciprocal rsqrt sqrt square".split())
#: the same numbers, elsewhere
_COPIES = MOVES | {"to", "contiguous", "clone", "float", "double", "type", "data", "detach"}


def _identity_of(name: str | None) -> float:
    """The entry of a per-channel operand that leaves the channel as it is: 1 for products, 0 otherwise."""
    return 1.0 if name in _PRODUCTS_OF_TWO else 0.0


def neutral_entries(node: fx.Node) -> set[float]:
    """What leaves a channel as it is, at each operation that computes with a tensor used directly.

    Args:
        node: that reads the tensor.

    Returns:
        The entries, one if all operations agree.
    """
    entries: set[float] = set()
    for user in node.users:
        name = op_name(user)
        entries |= neutral_entries(user) if name in _COPIES else {1.0 if name in _FROM_ONE else _identity_of(name)}
    return entries


def binds(node: fx.Node, live: Set[fx.Node]) -> bool:
    """Whether a tensor used directly meets activations entry by entry, rather than in what is computed from it.

    Args:
        node: that reads the tensor, or computes from it.
        live: nodes that depend on an input of the model.

    Returns:
        Whether any of its users does.
    """
    for user in node.users:
        name = op_name(user)
        if user in live:
            if name in PAIRWISE | MOVES | PRODUCTS or user.op == "output":
                return True
        elif name in PAIRWISE | MOVES | POINTWISE | PRODUCTS and binds(user, live):
            return True
    return False


def executor(node: fx.Node) -> Callable[..., object]:
    """What runs a node's operation.

    Args:
        node: a call of a function or a method.

    Returns:
        A callable that takes the node's arguments.
    """
    if node.op == "call_method":
        return _method(str(node.target))
    assert callable(node.target)
    return node.target


def _method(name: str) -> Callable[..., object]:
    return lambda self, *args, **kwargs: getattr(self, name)(*args, **kwargs)
