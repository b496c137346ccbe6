"""Operations that act on space and leave channels to themselves: pools, interpolation, padding.

Each is seen as tables, one per dimension: the input positions that an output position is computed from.
"""

from collections.abc import Callable, Mapping, Sequence
from math import ceil, floor
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_leaves

Tables = Callable[[Sequence[int]], list[Tensor]]  #: sizes of the last dimensions -> tables ``[out, taps]``, -1 for none
_POOLS = {f"{kind}_pool{d}d": d for kind in ("max", "avg", "lp") for d in (1, 2, 3)}
_ADAPTIVE = {f"adaptive_{kind}_pool{d}d": d for kind in ("max", "avg") for d in (1, 2, 3)}
_FIELDS = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "output_size", "size", "scale_factor", "mode")
#: positional arguments behind the input
_ORDERS: dict[str, tuple[str, ...]] = {
    "max": ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"),
    "avg": ("kernel_size", "stride", "padding", "ceil_mode"),
    "lp": ("norm_type", "kernel_size", "stride", "ceil_mode"),
    "adaptive": ("output_size", "return_indices"),
    "interpolate": ("size", "scale_factor", "mode"),
    "pad": ("pad", "mode", "value"),
}
_MODULES: dict[type[nn.Module], str] = {
    **{getattr(nn, f"{kind}Pool{d}d"): f"{kind.lower()}_pool{d}d" for kind in ("Max", "Avg") for d in (1, 2, 3)},
    **{getattr(nn, f"LPPool{d}d"): f"lp_pool{d}d" for d in (1, 2, 3)},
    **{
        getattr(nn, f"Adaptive{kind}Pool{d}d"): f"adaptive_{kind.lower()}_pool{d}d"
        for kind in ("Max", "Avg")
        for d in (1, 2, 3)
    },
    nn.Upsample: "interpolate",
    nn.UpsamplingNearest2d: "interpolate",
    nn.UpsamplingBilinear2d: "interpolate",
}
_PADDING: dict[type[nn.Module], str] = {
    getattr(nn, f"{name}Pad{d}d"): mode
    for name, mode in (
        ("Zero", "constant"),
        ("Constant", "constant"),
        ("Reflection", "reflect"),
        ("Replication", "replicate"),
        ("Circular", "circular"),
    )
    for d in (1, 2, 3)
}


def tables_of(
    name: str | None, module: nn.Module | None, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
) -> Tables | None:
    """The tables of an operation on ``args[0]``, or of a leaf module; None if it is none of space."""
    if module is not None:
        name, given = _module_call(module)
    else:
        order = _ORDERS.get(_family(name), ())
        given = {**dict(zip(order, args[1:], strict=False)), **(kwargs or {})}
    if name is None or given.get("return_indices") or any(isinstance(leaf, Tensor) for leaf in tree_leaves(given)):
        return None
    if name in _POOLS:
        return lambda sizes: _pool(given, sizes[-_POOLS[name] :])
    if name in _ADAPTIVE:
        return lambda sizes: _adaptive(given["output_size"], sizes[-_ADAPTIVE[name] :])
    if name == "interpolate":
        return lambda sizes: _interpolation(given, sizes[2:])
    return (lambda sizes: _padding(given, sizes)) if name == "pad" else None


def _family(name: str | None) -> str:
    if name in _POOLS or name in _ADAPTIVE:
        return name.split("_")[0]
    return name or ""


def _module_call(module: nn.Module) -> tuple[str | None, Mapping[str, Any]]:
    for kinds in (_MODULES, _PADDING):
        for kind, name in kinds.items():
            if isinstance(module, kind) and type(module).forward is kind.forward:
                if kinds is _PADDING:
                    return "pad", {"pad": module.padding, "mode": name}
                return name, {field: getattr(module, field) for field in _FIELDS if hasattr(module, field)}
    return None, {}


def _each(value: Any, count: int) -> list[Any]:
    if not isinstance(value, (tuple, list)):
        return [value] * count
    return list(value) * count if len(value) == 1 else list(value)


def _pool(given: Mapping[str, Any], sizes: Sequence[int]) -> list[Tensor]:
    d = len(sizes)
    kernel = _each(given["kernel_size"], d)
    stride = _each(given.get("stride") or kernel, d)
    padding, dilation = _each(given.get("padding", 0), d), _each(given.get("dilation", 1), d)
    rounded = ceil if given.get("ceil_mode") else floor
    found = []
    for size, k, step, margin, spread in zip(sizes, kernel, stride, padding, dilation, strict=True):
        out = rounded((size + 2 * margin - spread * (k - 1) - 1) / step) + 1
        if (out - 1) * step >= size + margin:  # the last window must start inside
            out -= 1
        table = torch.arange(out)[:, None] * step - margin + torch.arange(k) * spread
        found.append(table.where((table >= 0) & (table < size), -1))
    return found


def _adaptive(wanted: Any, sizes: Sequence[int]) -> list[Tensor]:
    found = []
    for size, out in zip(sizes, _each(wanted, len(sizes)), strict=True):
        out = size if out is None else out
        starts, ends = torch.arange(out) * size // out, -(-(torch.arange(1, out + 1) * size) // out)
        table = starts[:, None] + torch.arange(int((ends - starts).max()))
        found.append(table.where(table < ends[:, None], -1))
    return found


def _interpolation(given: Mapping[str, Any], sizes: Sequence[int]) -> list[Tensor]:
    """The nearest entry, whatever the mode."""
    d = len(sizes)
    size, scale = given.get("size"), given.get("scale_factor")
    outs = _each(size, d) if size is not None else [floor(s * f) for s, f in zip(sizes, _each(scale, d), strict=True)]
    return [(torch.arange(out) * s // out)[:, None] for s, out in zip(sizes, outs, strict=True)]


def _padding(given: Mapping[str, Any], sizes: Sequence[int]) -> list[Tensor]:
    pad, mode = list(given["pad"]), given.get("mode", "constant")
    count = len(pad) // 2
    found = []
    for index, size in enumerate(sizes[-count:]):
        sides = pad[2 * (count - 1 - index) :][:2]
        line = torch.arange(1, size + 1, dtype=torch.float64).view(1, 1, -1)
        found.append(functional.pad(line, sides, mode=mode).view(-1, 1).long() - 1)
    return found
