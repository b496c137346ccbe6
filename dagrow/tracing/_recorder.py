"""Recording one forward pass: every torch function, every call of a leaf module, every size becomes a node.

The model runs once, under a mode that sees every call, and is left as it was found; where inputs hold no values it
runs on fake tensors. Its own Python control flow simply runs, but must not read values.
"""

import contextlib
import sys
from collections.abc import Callable
from functools import partial
from inspect import signature
from types import CodeType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from dagrow._pytree import tensors_in
from dagrow.errors import TraceError
from dagrow.tracing._builtin_reads import names_math
from dagrow.tracing._call_forms import canonical_call, run_decomposed
from dagrow.tracing._contexts import VALUE_ERRORS
from dagrow.tracing._graph_writer import GraphWriter, Versions, versions
from dagrow.tracing._leaf_modules import OpaqueModule, is_leaf, opaque_parts
from dagrow.tracing._source_lines import refusal, source, user_frame
from dagrow.tracing._traced_int import formula

_READS = frozenset(
    "item tolist numpy __bool__ __int__ __float__ __complex__ __index__ __array__ __contains__ is_nonzero equal "
    "allclose".split()
)
_SIZES = {"shape", "size", "numel", "nelement", "stride"}
_BATCH_NORM = signature(functional.batch_norm)
_INNER = ("torch._subclasses", "torch._refs", "torch._decomp", "torch._meta", "torch._prims")
#: hooks run under the mode; of what is read of plain tensors there, it need not be told
_UNSEEN = torch._C.DisableTorchFunction


class Recorder(TorchFunctionMode):
    """Inside ``with recorder:``, what the writer's model calls is written into its graph.

    Args:
        writer: of the graph.
        closed: which modules become one node, whatever they do inside.
    """

    def __init__(self, writer: GraphWriter, closed: Callable[[nn.Module], bool]) -> None:
        super().__init__()
        self.writer, self.closed = writer, closed
        writer.live = lambda: self.live
        self._pending: tuple[Any, Versions] = ((), {})
        self._names_math: dict[CodeType, bool] = {}
        self._inside = 0
        self._open = False

    def __enter__(self) -> "Recorder":
        """Start recording: hang a pair of hooks on every leaf module, so that each call becomes one node."""
        self._handles = []
        self._opaque = dict(opaque_parts(self.writer.model))
        for (parent, name), module in self._opaque.items():
            parent._modules[name] = OpaqueModule(module)
        for path, module in self.writer.model.named_modules():
            if is_leaf(module) or isinstance(module, OpaqueModule) or self.closed(module):
                leave = partial(self._leave, path)
                self._handles += [
                    module.register_forward_pre_hook(self._arrive, prepend=True, with_kwargs=True),
                    module.register_forward_hook(leave, with_kwargs=True, always_call=True),
                ]
        self._open = True
        return super().__enter__()

    def __exit__(self, *raised: object) -> None:
        super().__exit__(*raised)
        self._open = False
        for handle in self._handles:
            handle.remove()
        for (parent, name), module in self._opaque.items():
            parent._modules[name] = module

    @property
    def live(self) -> bool:
        """True where the user's code runs, False inside a recorded call and after recording."""
        return self._open and not self._inside

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.writer.fake is not None and self._inside and func is functional.batch_norm:
            return fake_batch_norm(*args, **kwargs)
        if not self.live or sys._getframe(1).f_globals.get("__name__", "").startswith(_INNER):
            return func(*args, **kwargs)
        decomposed = run_decomposed(self, func, args, kwargs)
        if decomposed is not None:
            return decomposed[0]
        self._inside += 1
        try:
            return self._call(func, args, kwargs)
        finally:
            self._inside -= 1

    def _call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        writer, called = self.writer, getattr(func, "__name__", "")
        attribute = func.__self__.__name__ if called in ("__get__", "__set__") else ""
        name = attribute or called
        if name in _READS:
            self._read_value(name.strip("_"))
        if name in ("unbind", "__len__"):
            writer.count(args[0], args[1] if len(args) > 1 else kwargs.get("dim", 0))
            writer.note(f"{name} bakes in a size of {tuple(args[0].shape)}")
        lowered, before = writer.lower((args, kwargs)), versions((args, kwargs))
        try:
            result = func(*args, **kwargs)
        except VALUE_ERRORS as error:
            raise TraceError(refusal(name.strip("_"), source())) from error
        if attribute == "device":
            writer.keep_device(result, lowered[0][0])
        written = versions((args, kwargs)) != before or called in ("__set__", "_set_grad_enabled")
        if not (written or name in _SIZES or tensors_in(result)):
            return result
        node = writer.emit(*canonical_call(func, attribute, *lowered), disposable=name in _SIZES)
        if name in _SIZES:
            self._note_builtins(node)
        return writer.adopt(node, result, before)

    def _read_value(self, how: str) -> None:
        if self.writer.fake is not None:
            raise TraceError(refusal(how, source()))
        self.writer.note(f"{how} reads a value of the example")
        self.writer.obstacle = f"reads values of tensors ({source()})"

    def _note_builtins(self, size: fx.Node) -> None:
        """Notes a size that is read by code that calls what reads whole numbers unseen."""
        frame = user_frame()
        if frame is None:
            return
        code, writer = frame.f_code, self.writer
        if code not in self._names_math:
            self._names_math[code] = names_math(code, frame.f_globals)
        if "range" in code.co_names:
            writer.baked_size = f"{formula(size)} is read next to range(): a loop that counts to it is unrolled"
            writer.note(writer.baked_size)
        elif self._names_math[code]:
            writer.baked_size = f"{formula(size)} is read next to math: a number computed from it is baked in"
            writer.note(writer.baked_size)

    def _arrive(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._inside += 1
        if self._inside == 1:
            with _UNSEEN():
                self._pending = self.writer.lower((args, kwargs)), versions((args, kwargs))

    def _leave(self, path: str, module: nn.Module, args: Any, kwargs: Any, result: Any) -> Any:
        try:
            if self._inside != 1 or result is None:
                return None
            lowered, before = self._pending
            with _UNSEEN() if type(result) is Tensor else contextlib.nullcontext():
                return self.writer.adopt(self.writer.emit("call_module", path, *lowered), result, before)
        finally:
            self._inside -= 1


def fake_batch_norm(*args: Any, **kwargs: Any) -> Tensor:
    """What ``functional.batch_norm`` gives on fake tensors, without the many steps that torch takes to find out."""
    arguments = _BATCH_NORM.bind(*args, **kwargs).arguments
    inputs, weight = arguments["input"], arguments.get("weight")
    if arguments.get("training") and inputs.numel() == inputs.shape[1]:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {inputs.size()}")
    return inputs.clone() if weight is None else inputs + weight.sum()
