"""From an `nn.Module` to a `Program`: its `fx.Graph`, proved to compute what the model computes.

Two front-ends, one normal form. `record` runs the model once on fake tensors and writes down what happens
(`dagrow.record`); `symbolic` uses `torch.fx` where there are no example inputs. Neither changes the model.
"""

import collections
import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from dagrow.errors import TraceError, first_line
from dagrow.record import (
    VALUE_ERRORS,
    FakeMode,
    Recorder,
    refusal,
    source,
)  # fmt: skip
from dagrow.trees import leaves, mapped
from dagrow.undisturbed import undisturbed

__all__ = ["Executor", "Program", "bind", "explained", "fits", "record", "refuse_lazy", "verify"]

_STARS: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
_TOLERANCE = {torch.float64: 1e-9, torch.complex128: 1e-9, torch.float16: 2e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True, eq=False)
class Program:
    """A model and the graph of its forward.

    Nodes: placeholders named after forward's parameters, `call_module` for leaf modules, `get_attr` for
    parameters and buffers used directly and for `constants` (targets `_constant0`, ...), functions and
    methods for all else, one output. Every node has `meta["val"]`, its fake value, and `meta["source"]`, the
    user's line; `meta["mode_dependent"]` marks a call whose `training` argument was fixed by tracing.
    """

    model: nn.Module
    graph: fx.Graph
    constants: dict[str, Tensor]
    specialisations: tuple[str, ...]

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Execute the graph with the model's current parameters.

        Raises TraceError for arguments that the graph does not have, or whose value it has baked in."""
        given = _arguments(self.model, args, kwargs).arguments
        known = inspect.signature(self.model.forward).parameters
        made = {n.target.lstrip("*"): n.meta["val"] for n in self.graph.nodes if n.op == "placeholder"}
        given = {name: given.get(name, known[name].default) for name in {**made, **given}}
        wrong = [name for name, value in given.items() if not fits(made.get(name, known[name].default), value)]
        if wrong:
            raise TraceError(
                f"The graph of {type(self.model).__name__} was made for other values of {wrong}: not given "
                "then, or not given now, or not tensors and different. Trace again with these arguments."
            )
        before = torch.is_grad_enabled()
        try:
            return Executor(self).run(*(given[name] for name in made))
        finally:
            torch.set_grad_enabled(before)


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
        return self.module.get_submodule(target)(*args, **kwargs)

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


def _arguments(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> inspect.BoundArguments:
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


def record(model: nn.Module, example_inputs: Any, *, verified: bool = True) -> Program:
    """The program of `model`, recorded in the mode that it is in, and verified on the example inputs."""
    args, kwargs = bind(example_inputs)
    refuse_lazy(model)
    bound = _arguments(model, args, kwargs)
    with undisturbed(model, weights=True), FakeMode(allow_non_fake_inputs=True) as fake, torch.enable_grad():
        for module in model.modules():  # wrapped inputs and outputs would hide which tensor is which
            module._backward_hooks.clear()
            module._backward_pre_hooks.clear()
        recorder = Recorder(model, fake)
        for name, value in bound.arguments.items():
            star = _STARS.get(bound.signature.parameters[name].kind, "")
            bound.arguments[name] = recorder.placeholder(star + name, value)
        with explained(model, (args, kwargs)), recorder:
            output = model(*bound.args, **bound.kwargs)
        recorder.output(output)
        _note_buffers(model, recorder)
    program = Program(model, recorder.graph, recorder.constants, tuple(recorder.notes))
    return verify(program, example_inputs) if verified else program


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
            "Check that the model runs on these inputs; if so, it does something that fake tensors cannot."
        ) from error


def refuse_lazy(model: nn.Module) -> None:
    """Raises TraceError for parameters that have no shape yet."""
    lazy = [name for name, p in model.named_parameters() if nn.parameter.is_lazy(p)]
    if lazy:
        raise TraceError(f"Parameters {lazy} have no shape yet. Run one batch through the model first.")


def _note_buffers(model: nn.Module, recorder: Recorder) -> None:
    """A buffer that forward has assigned anew is fake now; the graph does not assign it."""
    for name, buffer in model.named_buffers():
        if isinstance(buffer, FakeTensor):
            recorder.notes[f"forward assigns buffer {name}; the graph leaves it"] = None


def verify(program: Program, example_inputs: Any) -> Program:
    """Compare the graph with the model, on the example and on twice its batch, in the mode the model is in.

    Both run on the same random numbers and buffers. Returns the program, with a note where the model itself
    refuses the larger batch. Raises TraceError that names the first output that differs.
    """
    given = bind(example_inputs)
    if any(isinstance(leaf, FakeTensor) or leaf.is_meta for _, leaf in leaves(given) if isinstance(leaf, Tensor)):
        return _noted(program, "not verified: the example inputs hold no values")
    _compare(program, given, "the example inputs")
    double = _doubled(given)
    if double is None:
        return _noted(program, "verified at one batch size only: no tensor input has a batch dimension")
    try:
        _evaluated(program.model, program.model, double)
    except Exception as error:
        return _noted(program, f"the model refuses twice the batch of the example: {first_line(error)}")
    _compare(program, double, "the example inputs with every batch repeated twice")
    return program


def _noted(program: Program, text: str) -> Program:
    return dataclasses.replace(program, specialisations=(*program.specialisations, text))


def _evaluated(model: nn.Module, function: Callable[..., Any], given: Any) -> Any:
    """Call `function` on copied inputs, without gradients and fused attention, and leave nothing changed."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with undisturbed(model, weights=True), torch.no_grad():
            args, kwargs = mapped(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, given)
            return mapped(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, function(*args, **kwargs))
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def _compare(program: Program, given: Any, which: str) -> None:
    name = type(program.model).__name__
    with explained(program.model, given):
        expected = dict(leaves(_evaluated(program.model, program.model, given)))
    fixed = "".join(f"\n  - {text}" for text in program.specialisations) or " none noted"
    advice = f"Fixed while tracing:{fixed}\nRead sizes as x.shape[i] and keep them in whole-number arithmetic."
    try:
        found = dict(leaves(_evaluated(program.model, program.run, given)))
    except Exception as error:
        raise TraceError(f"The graph of {name} fails on {which} ({first_line(error)}). {advice}") from error
    for path in {**expected, **found}:
        if path not in expected or path not in found or not _close(expected[path], found[path]):
            raise TraceError(f"The graph of {name} differs from the model at output{path} on {which}. {advice}")


def _close(a: Any, b: Any) -> bool:
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return a is b or bool(a == b)
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    if not (a.is_floating_point() or a.is_complex()):
        return torch.equal(a, b)
    finite = a[torch.isfinite(a)].abs()
    slack = _TOLERANCE.get(a.dtype, 1e-4) * (finite.max().item() if finite.numel() else 0.0)
    return bool(torch.isclose(a, b, rtol=0.0, atol=slack, equal_nan=True).all())


def _doubled(given: Any) -> Any:
    """The inputs with each tensor of the common batch size repeated along dimension 0, or None."""
    sizes = [leaf.shape[0] for _, leaf in leaves(given) if isinstance(leaf, Tensor) and leaf.dim()]
    if not sizes:
        return None
    batch = collections.Counter(sizes).most_common(1)[0][0]

    def twice(leaf: Any) -> Any:
        return torch.cat([leaf, leaf]) if isinstance(leaf, Tensor) and leaf.shape[:1] == (batch,) else leaf

    return mapped(twice, given)
