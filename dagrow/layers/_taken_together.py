"""Operations that order, pick or transform what lies along some dimensions of a tensor."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, fx, nn

from dagrow.layers._op_tables import op_name

#: where the dimensions stand among the arguments, and which they are by default (None: all)
_DIMS: dict[str, tuple[int, Any]] = {
    **dict.fromkeys(("sort", "argsort", "mode", "cummax", "cummin"), (1, -1)),
    **dict.fromkeys(("topk", "kthvalue", "diff"), (2, -1)),
    "repeat_interleave": (2, None),
    "msort": (1, 0),
    **{f"fft_{kind}": (2, -1) for kind in ("fft", "ifft", "rfft", "irfft", "hfft", "ihfft")},
    **{f"fft_{kind}2": (2, (-2, -1)) for kind in ("fft", "ifft", "rfft", "irfft", "hfft", "ihfft")},
    **{f"fft_{kind}n": (2, None) for kind in ("fft", "ifft", "rfft", "irfft", "hfft", "ihfft")},
    **dict.fromkeys(("fft_fftshift", "fft_ifftshift"), (1, None)),
}
_UNPOOLING = {f"max_unpool{d}d": d for d in (1, 2, 3)}
_UNPOOLING_MODULES = {getattr(nn, f"MaxUnpool{d}d"): d for d in (1, 2, 3)}
#: numbers in a tensor say what is picked along a dimension
PICKS = frozenset("gather index_select take_along_dim".split())
#: numbers in a tensor say where along a dimension entries go
PUTS = frozenset("scatter scatter_add scatter_reduce index_add index_copy index_reduce".split())


def taken_dims(
    node: fx.Node, module: nn.Module | None, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[int, ...] | None:
    """The dimensions along which an operation takes entries together, and which may have other sizes behind it.

    Args:
        node: the operation.
        module: that it calls, if it calls one.
        args: its arguments, the input first.
        kwargs: its keyword arguments.

    Returns:
        From 0 on; None for any other operation.
    """
    name = op_name(node) if module is None else None
    if not args or not isinstance(args[0], Tensor):
        return None
    ndim = args[0].ndim
    space = _UNPOOLING.get(str(name)) or _UNPOOLING_MODULES.get(type(module))  # type: ignore[arg-type]
    if space:
        return tuple(range(ndim - space, ndim))
    if name not in _DIMS:
        return None
    place, default = _DIMS[name]
    dims = args[place] if len(args) > place else kwargs.get("dim", default)
    dims = range(ndim) if dims is None else (dims,) if isinstance(dims, int) else dims
    return tuple(dim % ndim for dim in dims)
