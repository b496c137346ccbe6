"""From an `nn.Module` to a `Program`: its `fx.Graph`, proved to compute what the model computes.

Two front-ends, one normal form. `record` runs the model once and writes down what happens
(`dagrow.record`); `symbolic` uses `torch.fx` where there are no example inputs. Neither changes the model.
"""

import collections
import contextlib
import dataclasses
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from dagrow.errors import TraceError, first_line
from dagrow.record import (
    DEVICES,
    VALUE_ERRORS,
    FakeMode,
    Recorder,
    refusal,
    source,
)  # fmt: skip
from dagrow.sizes import COMPARISONS
from dagrow.stated import Place, StatedInt, arguments_of, stated
from dagrow.trees import leaves, mapped
from dagrow.undisturbed import AsFound

__all__ = [
    "Executor", "Program", "bind", "close", "explained", "fewer", "fits", "hold_values", "record", "refuse_lazy",
    "relax", "verify",
]  # fmt: skip

_STARS: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
_TOLERANCE = {torch.float64: 1e-9, torch.complex128: 1e-9, torch.float16: 2e-2, torch.bfloat16: 5e-2}


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
    computed: frozenset[Place] = frozenset()
    obstacle: str | None = None
    unrolled: str | None = None

    @cached_property
    def stated(self) -> dict[Place, list[fx.Node]]:
        """Attributes of modules, whole numbers, and the nodes that have them as arguments."""
        found: dict[Place, list[fx.Node]] = {}
        for node in self.graph.nodes:
            for value in arguments_of((node.args, node.kwargs)):
                if isinstance(value, StatedInt):
                    found.setdefault(value.place, []).append(node)
        return found

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Execute the graph with the model's current parameters.

        Raises TraceError for arguments that the graph does not have, or whose value it has baked in."""
        return self._run(Executor(self), args, kwargs)

    def _run(self, executor: "Executor", args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
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
        with _modes_kept():
            return executor.run(*(given[name] for name in made))


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


def record(
    model: nn.Module, example_inputs: Any, *, verified: bool = True, closed: Callable[[nn.Module], bool] | None = None
) -> Program:
    """The program of `model`, recorded in the mode that it is in, and verified at another batch size.

    Modules that are ``closed`` become one node, whatever they do inside."""
    given = bind(example_inputs)
    refuse_lazy(model)
    found, real = AsFound(model, weights=True), hold_values(model, given)
    held = {id(saved.tensor) for saved in found.tensors}
    with found.kept():
        program = _recorded(model, *given, real, closed, held)
    if program.obstacle and real:  # many a forward does without values where there are none
        with found.kept(), contextlib.suppress(TraceError), _quietly():
            program = _recorded(model, *given, False, closed, held)
    return verify(program, example_inputs, found) if verified else program


def _recorded(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], real: bool,
    closed: Callable[[nn.Module], bool] | None, held: Set[int],
) -> Program:  # fmt: skip
    """One run of the model, on fake tensors unless ``real``. Leaves it for the caller to clean up."""
    bound = _arguments(model, args, kwargs)
    fake = None if real else FakeMode(allow_non_fake_inputs=True)
    for module in model.modules():  # wrapped inputs and outputs would hide which tensor is which
        module._backward_hooks.clear()
        module._backward_pre_hooks.clear()
    with fake or contextlib.nullcontext(), torch.enable_grad(), stated(model) as uses, plainly():
        recorder = Recorder(model, fake, closed, held)
        uses.live = lambda: recorder.live
        for name, value in bound.arguments.items():
            star = _STARS.get(bound.signature.parameters[name].kind, "")
            bound.arguments[name] = recorder.placeholder(star + name, value)
        with explained(model, (args, kwargs)), recorder:
            output = model(*bound.args, **bound.kwargs)
        recorder.output(output)
        for name in recorder.assigned():
            recorder.notes[f"forward assigns buffer {name}; the graph leaves it"] = None
    return Program(
        model,
        recorder.graph,
        recorder.constants,
        tuple(recorder.notes),
        frozenset(uses.computed),
        recorder.obstacle,
        recorder.unrolled,
    )


def hold_values(model: nn.Module, inputs: Any) -> bool:
    """Whether no tensor is a stand-in without values."""
    tensors = [leaf for _, leaf in leaves(inputs) if isinstance(leaf, Tensor)]
    return not any(isinstance(t, FakeTensor) or t.is_meta for t in (*tensors, *model.parameters(), *model.buffers()))


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without what torch logs about operations that need values."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


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


def refuse_lazy(model: nn.Module) -> None:
    """Raises TraceError for parameters that have no shape yet."""
    lazy = [name for name, p in model.named_parameters() if nn.parameter.is_lazy(p)]
    if lazy:
        raise TraceError(f"Parameters {lazy} have no shape yet. Run one batch through the model first.")


def verify(program: Program, example_inputs: Any, found: AsFound | None = None) -> Program:
    """Compare the graph with the model at another batch size than it was made with, in the mode the model is in.

    Two samples, or one of two. Where the model itself refuses that, half of the batch, then one sample more; where
    it refuses all, the example, which a note tells. Both run on the same random numbers and buffers. Raises
    TraceError that names the first output that differs.

    Args:
        found: the model as it is, to come back to.
    """
    given = bind(example_inputs)
    if not hold_values(program.model, given):
        return _noted(program, "not verified: the model or the example inputs hold no values")
    found = found or AsFound(program.model, weights=True)
    for size, other in _resized(given):
        obstacle = _verified(program, found, other, size)
        if obstacle is None:
            return program
        program = _noted(program, obstacle)
    with explained(program.model, given):
        expected = _evaluated(found, program.model, given)
    _compare(program, found, expected, given, "the example inputs")
    return _noted(program, "verified at one batch size only")


def _verified(program: Program, found: AsFound, given: Any, size: int) -> str | None:
    """Why the graph cannot be verified at a batch size, or None if it is."""
    try:
        expected = _evaluated(found, program.model, given)
    except Exception as error:  # the user's forward may raise anything
        return f"the model refuses a batch of {size}: {first_line(error)}"
    try:
        _compare(program, found, expected, given, f"the example inputs with a batch of {size}")
    except TraceError:
        if size > 1:
            raise
        return "the graph does not hold for a batch of 1, for which the model does something else"
    return None


def _noted(program: Program, text: str) -> Program:
    return dataclasses.replace(program, specialisations=(*program.specialisations, text))


def _evaluated(found: AsFound, function: Callable[..., Any], given: Any) -> Any:
    """Call `function` on copied inputs, without gradients and fused attention, and leave the model as it was found."""
    with found.kept(), torch.no_grad(), plainly():
        args, kwargs = mapped(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, given)
        return mapped(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, function(*args, **kwargs))


def _compare(program: Program, found: AsFound, expected: Any, given: Any, which: str) -> None:
    name, expected = type(program.model).__name__, dict(leaves(expected))
    fixed = "".join(f"\n  - {text}" for text in program.specialisations) or " none noted"
    advice = f"Fixed while tracing:{fixed}\nRead sizes as x.shape[i] and keep them in whole-number arithmetic."
    try:
        computed = dict(leaves(_evaluated(found, program.run, given)))
    except Exception as error:
        raise TraceError(f"The graph of {name} fails on {which} ({first_line(error)}). {advice}") from error
    for path in {**expected, **computed}:
        if path not in expected or path not in computed or not close(expected[path], computed[path]):
            raise TraceError(f"The graph of {name} differs from the model at output{path} on {which}. {advice}")


def close(a: Any, b: Any) -> bool:
    """Whether two values are the same, tensors up to what their type tells apart."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return a is b or bool(a == b)
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    if not (a.is_floating_point() or a.is_complex()):
        return torch.equal(a, b)
    finite = a[torch.isfinite(a)].abs()
    slack = _TOLERANCE.get(a.dtype, 1e-4) * (finite.max().item() if finite.numel() else 0.0)
    return bool(torch.isclose(a, b, rtol=0.0, atol=slack, equal_nan=True).all())


def relax(program: Program, example_inputs: Any) -> None:
    """Drops comparisons of sizes that come out otherwise for one sample or two, where the graph holds nevertheless."""
    found, executor = AsFound(program.model, weights=True), _Sizing(program)
    for _, one in _resized(bind(example_inputs), (1, 2)):
        try:
            expected = dict(leaves(_evaluated(found, program.model, one)))
            computed = dict(leaves(_evaluated(found, lambda *a, **k: program._run(executor, a, k), one)))
        except Exception:  # the user's forward may raise anything
            return
        if all(path in computed and close(value, computed[path]) for path, value in expected.items()):
            executor.relax()


class _Sizing(Executor):
    """Remembers sizes that were compared."""

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self.sizes: dict[Any, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.meta.get("baked"):
            self.sizes[n] = value
        return value

    def relax(self) -> None:
        for node, left in self.sizes.items():
            guards = node.meta.get("guards", {})
            for (sign, right), holds in list(guards.items()):
                if COMPARISONS[sign](left, self.sizes.get(right, right)) is not holds:
                    del guards[sign, right]


def _resized(given: Any, wanted: Sequence[int] = ()) -> Iterator[tuple[int, Any]]:
    """The inputs with other sizes of the dimension that most tensors share as their first."""
    sizes = [leaf.shape[0] for _, leaf in leaves(given) if isinstance(leaf, Tensor) and leaf.dim()]
    batch = collections.Counter(sizes).most_common(1)[0][0] if sizes else 0
    usual = [size for size in (1 if batch == 2 else 2, batch // 2, batch + 1) if size > 1 or batch == 2]
    for size in dict.fromkeys(wanted or usual) if batch else ():
        samples = torch.arange(size) % batch

        def taken(leaf: Any, samples: Tensor = samples) -> Any:
            batched = isinstance(leaf, Tensor) and leaf.shape[:1] == (batch,)
            return leaf[samples.to(leaf.device)] if batched else leaf

        yield size, mapped(taken, given)


def fewer(example_inputs: Any) -> Any:
    """Two samples of the example inputs, where there are more."""
    given = bind(example_inputs)
    size, (args, kwargs) = next(_resized(given), (0, given))
    return (args or kwargs) if size == 2 else example_inputs
