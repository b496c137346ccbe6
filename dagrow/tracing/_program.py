"""The `fx.Graph` of a model's forward, and running it."""

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from dagrow._pytree import leaf_values, leaves, mapped
from dagrow.errors import TraceError
from dagrow.tracing._attribute_int import AttributeInt, AttributePath
from dagrow.tracing._recorder import DEVICES, VALUE_ERRORS
from dagrow.tracing._source_lines import refusal, source


@dataclass(frozen=True, eq=False)
class Program:
    """A model and the graph of its forward.

    Nodes: placeholders named after forward's parameters, `call_module` for leaf modules, `get_attr` for
    parameters and buffers used directly and for `constants` (targets `_constant0`, ...), functions and
    methods for all else, one output. Every node has `meta["val"]`, its value (tensors without entries), and
    `meta["source"]`, the user's line.

    Nodes of sizes that were compared have `meta["guards"]`, what came out.

    `computed` are the attributes of modules, whole numbers, that forward computed with; `obstacle` is what forward
    does that none written from the graph would do; `unrolled` is a size that its loops may count to.
    """

    model: nn.Module
    graph: fx.Graph
    constants: dict[str, Tensor]
    specialisations: tuple[str, ...]
    computed: frozenset[AttributePath] = frozenset()
    obstacle: str | None = None
    unrolled: str | None = None

    @cached_property
    def stated(self) -> dict[AttributePath, list[fx.Node]]:
        """Attributes of modules, whole numbers, and the nodes that have them as arguments."""
        found: dict[AttributePath, list[fx.Node]] = {}
        for node in self.graph.nodes:
            for value in leaf_values((node.args, node.kwargs)):
                if isinstance(value, AttributeInt):
                    found.setdefault(value.place, []).append(node)
        return found

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Execute the graph with the model's current parameters.

        Raises TraceError for arguments that the graph does not have, or whose value it has baked in."""
        return self._run(Executor(self), args, kwargs)

    def _run(self, executor: "Executor", args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = arguments(self.model, args, kwargs).arguments
        known = inspect.signature(self.model.forward).parameters
        made = {n.target.lstrip("*"): n.meta["val"] for n in self.graph.nodes if n.op == "placeholder"}
        given = {name: given.get(name, known[name].default) for name in {**made, **given}}
        wrong = [name for name, value in given.items() if not fits(made.get(name, known[name].default), value)]
        if wrong:
            raise TraceError(
                f"The graph of {type(self.model).__name__} was made for other values of {wrong}: not given "
                "then, or not given now, or not tensors and different. Trace again with these arguments."
            )
        return self.through(executor, [given[name] for name in made])

    def through(self, executor: "Executor", values: Sequence[Any]) -> Any:
        """Runs the graph with the values of its placeholders."""
        with _modes_kept():
            return executor.run(*values)


@contextlib.contextmanager
def _modes_kept() -> Iterator[None]:
    """Leaves gradients and autocast switched as they were, also where a graph ends halfway."""
    grad = torch.is_grad_enabled()
    casting = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in DEVICES]
    try:
        yield
    finally:
        torch.set_grad_enabled(grad)
        for kind, enabled, dtype in casting:
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)


class Executor(fx.Interpreter):
    """Runs a program node by node; subclass it and override `run_node` to see every value."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.model, graph=program.graph)
        self.extra_traceback = False
        self._constants = program.constants
        self._grad = torch.is_grad_enabled()

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        return next(self.args_iter)  # also for *args and **kwargs: one value each

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self._constants[target] if target in self._constants else attrgetter(target)(self.module)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module = self.submodules.get(target)  # which lacks second names
        return (self.module.get_submodule(target) if module is None else module)(*args, **kwargs)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is torch._C._set_grad_enabled:
            args = (args[0] and self._grad,)
        return super().call_function(target, args, kwargs)

    def output(self, target: Any, args: Any, kwargs: Any) -> Any:
        values = [value for _, value in leaves(args[0])]
        return mapped(lambda i: values[i], self.graph.output_node().meta["structure"])


def bind(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of forward: from a tensor, a tuple or list, or a dict of keywords."""
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    if isinstance(example_inputs, Mapping) and all(isinstance(key, str) for key in example_inputs):
        return (), dict(example_inputs)
    raise TraceError(
        f"Example inputs are a {type(example_inputs).__name__}. Give a tensor, a tuple or list of positional "
        "arguments of forward, or a dict of its keyword arguments; a dict that is itself one argument goes "
        "into a tuple: (d,)."
    )


def arguments(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> inspect.BoundArguments:
    try:
        return inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise TraceError(
            f"{type(model).__name__}.forward{inspect.signature(model.forward)} cannot be called with these "
            f"inputs ({_shapes((args, kwargs))}): {error}. Give a tuple of positional or a dict of keyword "
            "arguments."
        ) from error


def _shapes(tree: Any) -> str:
    shown = [f"{str(v.dtype)[6:]}{list(v.shape)}" if isinstance(v, Tensor) else repr(v) for _, v in leaves(tree)]
    return ", ".join(shown) or "nothing"


def fits(made: Any, given: Any) -> bool:
    """Whether a graph made for the first value can take the second: only tensors may differ."""
    old, new = dict(leaves(made)), dict(leaves(given))
    return old.keys() == new.keys() and all(_alike(old[path], new[path]) for path in old)


def _alike(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor)
    return a is b or (type(a) is type(b) and bool(a == b))


def hold_values(model: nn.Module, inputs: Any) -> bool:
    """Whether no tensor is a stand-in without values."""
    tensors = [leaf for _, leaf in leaves(inputs) if isinstance(leaf, Tensor)]
    return not any(isinstance(t, FakeTensor) or t.is_meta for t in (*tensors, *model.parameters(), *model.buffers()))


@contextlib.contextmanager
def plainly() -> Iterator[None]:
    """Without the fused paths of torch's transformer layers, and with compiled parts as they were written."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


@contextlib.contextmanager
def explained(model: nn.Module, inputs: Any) -> Iterator[None]:
    """Turns what a forward raises while it is traced into a TraceError with the user's line."""
    try:
        yield
    except TraceError:
        raise
    except VALUE_ERRORS as error:
        raise TraceError(refusal("this line", source(error))) from error
    except Exception as error:
        raise TraceError(
            f"{source(error)}: {type(model).__name__}.forward raised {type(error).__name__} on inputs "
            f"{_shapes(inputs)}: {error} "
            "Check that the model runs on these inputs."
        ) from error


def tensor_at(model: nn.Module, name: str) -> Tensor:
    """A parameter or buffer by its name, which starts with a dot where the model itself is the layer."""
    return attrgetter(name.removeprefix("."))(model)
