"""Operations that act on space and leave channels to themselves: pools, interpolation, padding.

Each is seen as tables, one per dimension: the input positions that an output position is computed from.
"""

from collections.abc import Callable, Mapping, Sequence
from math import ceil, floor
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_leaves

from dagrow.layers._geometry import per_dimension

Tables = Callable[[Sequence[int]], list[Tensor]]  #: sizes of the last dimensions -> tables ``[out, taps]``, -1 for none
_POOLS = {f"{kind}_pool{d}d": d for kind in ("max", "avg", "lp") for d in (1, 2, 3)}
_ADAPTIVE = {f"adaptive_{kind}_pool{d}d": d for kind in ("max", "avg") for d in (1, 2, 3)}
_SETTINGS = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "output_size", "size", "scale_factor", "mode")
#: positional arguments behind the input
_ORDERS: dict[str, tuple[str, ...]] = {
    "max": ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"),
    "avg": ("kernel_size", "stride", "padding", "ceil_mode"),
    "lp": ("norm_type", "kernel_size", "stride", "ceil_mode"),
    "adaptive": ("output_size", "return_indices"),
    "interpolate": ("size", "scale_factor", "mode"),
    "pad": ("pad", "mode", "value"),
}
_KINDS = dict(Max="max", Avg="avg", LP="lp", AdaptiveMax="adaptive_max", AdaptiveAvg="adaptive_avg")
_MODULES: dict[type[nn.Module], str] = {
    **{getattr(nn, f"{kind}Pool{d}d"): f"{name}_pool{d}d" for kind, name in _KINDS.items() for d in (1, 2, 3)},
    **dict.fromkeys((nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d), "interpolate"),
}
_MODES = dict(Zero="constant", Constant="constant", Reflection="reflect", Replication="replicate", Circular="circular")
_PADDING = {getattr(nn, f"{name}Pad{d}d"): mode for name, mode in _MODES.items() for d in (1, 2, 3)}


def tables_of(
    name: str | None, module: nn.Module | None, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
) -> Tables | None:
    """The tables of an operation, or of a leaf module.

    Args:
        name: of the operation.
        module: the leaf module, whose name and arguments do not matter then.
        args: of the operation, ``args[0]`` its input.
        kwargs: of the operation.

    Returns:
        From sizes of the last dimensions to their tables; None if it is no operation on space.
    """
    if module is not None:
        name, settings = _module_call(module)
    else:
        name = name.removesuffix("_with_indices") if name else None
        settings = {**dict(zip(_ORDERS.get(_family(name), ()), args[1:], strict=False)), **(kwargs or {})}
    if name is None or any(isinstance(x, Tensor) for x in tree_leaves(settings)):
        return None
    if name in _POOLS:
        return lambda sizes: _pool(settings, sizes[-_POOLS[name] :])
    if name in _ADAPTIVE:
        return lambda sizes: _adaptive_pool(settings["output_size"], sizes[-_ADAPTIVE[name] :])
    if name == "interpolate":
        return lambda sizes: _interpolation(settings, sizes[2:])
    return (lambda sizes: _padding(settings, sizes)) if name == "pad" else None


def _family(name: str | None) -> str:
    if name in _POOLS or name in _ADAPTIVE:
        return name.split("_")[0]
    return name or ""


def _module_call(module: nn.Module) -> tuple[str | None, Mapping[str, Any]]:
    """The operation that a module does, and its settings."""
    for kinds in (_MODULES, _PADDING):
        for kind, name in kinds.items():
            if isinstance(module, kind) and type(module).forward is kind.forward:
                if kinds is _PADDING:
                    return "pad", {"pad": module.padding, "mode": name}
                return name, {field: getattr(module, field) for field in _SETTINGS if hasattr(module, field)}
    return None, {}


def _pool(settings: Mapping[str, Any], sizes: Sequence[int]) -> list[Tensor]:
    d = len(sizes)
    kernel = per_dimension(settings["kernel_size"], d)
    stride = per_dimension(settings.get("stride") or kernel, d)
    padding = per_dimension(settings.get("padding", 0), d)
    dilation = per_dimension(settings.get("dilation", 1), d)
    rounded = ceil if settings.get("ceil_mode") else floor
    tables = []
    for size, taps, step, margin, gap in zip(sizes, kernel, stride, padding, dilation, strict=True):
        windows = rounded((size + 2 * margin - gap * (taps - 1) - 1) / step) + 1
        if (windows - 1) * step >= size + margin:  # the last window must start inside
            windows -= 1
        table = torch.arange(windows)[:, None] * step - margin + torch.arange(taps) * gap
        tables.append(table.where((table >= 0) & (table < size), -1))
    return tables


def _adaptive_pool(output_size: Any, sizes: Sequence[int]) -> list[Tensor]:
    tables = []
    for size, windows in zip(sizes, per_dimension(output_size, len(sizes)), strict=True):
        windows = size if windows is None else windows
        starts, ends = torch.arange(windows) * size // windows, -(-(torch.arange(1, windows + 1) * size) // windows)
        table = starts[:, None] + torch.arange(int((ends - starts).max()))
        tables.append(table.where(table < ends[:, None], -1))
    return tables


def _interpolation(settings: Mapping[str, Any], sizes: Sequence[int]) -> list[Tensor]:
    """The nearest entry, whatever the mode."""
    d, outputs, scale = len(sizes), settings.get("size"), settings.get("scale_factor")
    if outputs is None:
        outputs = [floor(size * factor) for size, factor in zip(sizes, per_dimension(scale, d), strict=True)]
    outputs = per_dimension(outputs, d)
    return [(torch.arange(output) * size // output)[:, None] for size, output in zip(sizes, outputs, strict=True)]


def _padding(settings: Mapping[str, Any], sizes: Sequence[int]) -> list[Tensor]:
    """The last dimensions are padded, and their margins come last dimension first."""
    margins, mode = list(settings["pad"]), settings.get("mode", "constant")
    padded = sizes[len(sizes) - len(margins) // 2 :]
    tables = []
    for size, sides in zip(padded, reversed([*zip(margins[::2], margins[1::2], strict=True)]), strict=True):
        numbers = torch.arange(1, size + 1, dtype=torch.float64)
        line = functional.pad(rearrange(numbers, "entries -> 1 1 entries"), sides, mode=mode)
        tables.append(rearrange(line, "1 1 entries -> entries 1").long() - 1)
    return tables
