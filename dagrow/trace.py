"""From an `nn.Module` to a `Program`: its `fx.Graph`, proved to compute what the model computes.

Two front-ends, one normal form. `record` runs the model once on fake tensors and writes down what happens
(`dagrow.record`); `symbolic` uses `torch.fx` where there are no example inputs. Neither changes the model.
"""

import collections
import contextlib
import dataclasses
import functools
import inspect
import itertools
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from dagrow.errors import TraceError
from dagrow.record import (
    VALUE_ERRORS,
    FakeMode,
    Recorder,
    is_leaf,
    leaves,
    mapped,
    mark_mode,
    refusal,
    snapshot,
    source,
)  # fmt: skip

__all__ = ["Executor", "Program", "bind", "record", "symbolic", "untouched", "verify"]

_STARS: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
_TOLERANCE = {torch.float64: 1e-9, torch.complex128: 1e-9, torch.float16: 2e-2, torch.bfloat16: 5e-2}
_ASK = "Give example inputs, dagrow.trace(model, example_inputs): the model is then run once and recorded."
_SHAPELESS = {
    "relu", "relu_", "tanh", "sigmoid", "gelu", "silu", "elu", "selu", "leaky_relu", "softplus", "mish",
    "hardtanh", "relu6", "dropout", "flatten", "float", "contiguous", "view", "reshape",
}  # fmt: skip


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
        wrong = [name for name, value in given.items() if not _fits(made.get(name, known[name].default), value)]
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
        if target in self._constants:
            return self._constants[target]
        owner, _, name = target.rpartition(".")
        return getattr(self.module.get_submodule(owner), name)

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


def _fits(made: Any, given: Any) -> bool:
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
    _refuse_lazy(model)
    bound = _arguments(model, args, kwargs)
    with untouched(model), FakeMode(allow_non_fake_inputs=True) as fake, torch.enable_grad():
        for module in model.modules():  # wrapped inputs and outputs would hide which tensor is which
            module._backward_hooks.clear()
            module._backward_pre_hooks.clear()
        recorder = Recorder(model, fake)
        for name, value in bound.arguments.items():
            star = _STARS.get(bound.signature.parameters[name].kind, "")
            bound.arguments[name] = recorder.placeholder(star + name, value)
        with _explained(model, (args, kwargs)), recorder:
            output = model(*bound.args, **bound.kwargs)
        recorder.output(output)
        _note_buffers(model, recorder)
    program = Program(model, recorder.graph, recorder.constants, tuple(recorder.notes))
    return verify(program, example_inputs) if verified else program


@contextlib.contextmanager
def _explained(model: nn.Module, inputs: Any) -> Iterator[None]:
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


def _refuse_lazy(model: nn.Module) -> None:
    lazy = [name for name, p in model.named_parameters() if nn.parameter.is_lazy(p)]
    if lazy:
        raise TraceError(f"Parameters {lazy} have no shape yet. Run one batch through the model first.")


def _note_buffers(model: nn.Module, recorder: Recorder) -> None:
    """A buffer that forward has assigned anew is fake now; the graph does not assign it."""
    for name, buffer in model.named_buffers():
        if isinstance(buffer, FakeTensor):
            recorder.notes[f"forward assigns buffer {name}; the graph leaves it"] = None


class _Tracer(fx.Tracer):
    """`torch.fx` with our leaf rule; parameters of forward that have a default are fixed at it."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_leaf(m)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta["source"] = source()
        mark_mode(node)
        return node

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        function, args = super().create_args_for_root(root_fn, is_module, concrete_args)
        for i, arg in enumerate(args):
            if isinstance(arg, fx.Proxy) and arg.node.args:
                args[i] = arg.node.args[0]
                self.graph.erase_node(arg.node)
        return function, args


def symbolic(model: nn.Module) -> Program:
    """The program of `model` by `torch.fx`, if its first layer tells the shape of its only input."""
    _refuse_lazy(model)
    with untouched(model):
        try:
            tracer = _Tracer()
            graph = tracer.trace(model)
        except Exception as error:
            raise TraceError(f"torch.fx cannot follow {type(model).__name__}.forward: {error} {_ASK}") from error
        constants = _named_constants(model, graph)
    result = graph.output_node()
    count = itertools.count()
    result.meta["structure"] = mapped(lambda _: next(count), _thawed(result.args[0]))
    program = Program(model, graph, constants, ())
    example = _example(model, graph)
    fake = FakeMode(allow_non_fake_inputs=True)
    with untouched(model), fake, torch.no_grad(), _explained(model, example):
        _Propagator(program, fake).run(fake.from_tensor(example))
    return verify(program, example)


class _Propagator(Executor):
    def __init__(self, program: Program, fake: FakeMode) -> None:
        super().__init__(program)
        self._fake = fake

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        n.meta["val"] = mapped(functools.partial(snapshot, self._fake), value)
        return value


def _named_constants(model: nn.Module, graph: fx.Graph) -> dict[str, Tensor]:
    """Rename the tensors that are neither parameters nor buffers; fx hangs some of them on the model."""
    known = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
    constants: dict[str, Tensor] = {}
    for node in graph.nodes:
        if node.op == "get_attr" and node.target not in known:
            tensor = functools.reduce(getattr, node.target.split("."), model)
            node.target = f"_constant{len(constants)}"
            constants[node.target] = tensor  # type: ignore[assignment]
    return constants


def _thawed(tree: Any) -> Any:
    """fx's immutable containers as plain ones."""
    if isinstance(tree, list):
        return [_thawed(child) for child in tree]
    if isinstance(tree, dict):
        return {key: _thawed(child) for key, child in tree.items()}
    if isinstance(tree, tuple):
        children = [_thawed(child) for child in tree]
        return type(tree)(*children) if hasattr(tree, "_fields") else tuple(children)
    return tree


def _example(model: nn.Module, graph: fx.Graph) -> Tensor:
    """A batch of two for the only input, its width read off the linear layer that it reaches first."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    if len(inputs) != 1:
        raise TraceError(f"{type(model).__name__}.forward has {len(inputs)} inputs of unknown shape. {_ASK}")
    weights = list(_first_weights(model, inputs[0]))
    if len({w.shape[1] for w in weights}) != 1:
        raise TraceError(f"The first layers of {type(model).__name__} leave the input's shape open. {_ASK}")
    first = weights[0]
    line = torch.linspace(-1, 1, 2 * first.shape[1], device=first.device)
    return line.reshape(2, -1).to(first.dtype)


def _first_weights(model: nn.Module, node: fx.Node) -> Iterator[Tensor]:
    """The weights of the linear layers that read `node`, through what keeps the last dimension."""
    for user in node.users:
        module = model.get_submodule(str(user.target)) if user.op == "call_module" else None
        name = getattr(user.target, "__name__", user.target)
        if isinstance(module, nn.Linear):
            yield module.weight
        elif module is None and (name in ("size", "dim", "getattr") or user.op == "output"):
            continue
        elif _keeps_width(module) if module is not None else name in _SHAPELESS:
            yield from _first_weights(model, user)
        else:
            raise TraceError(f"The input first reaches {user.target}, which leaves its shape open. {_ASK}")


def _keeps_width(module: nn.Module) -> bool:
    home = type(module).__module__.rpartition(".")[2]
    plain = not any(True for _ in module.parameters()) and not isinstance(module, nn.GLU)
    return plain and (home in ("activation", "dropout") or isinstance(module, (nn.Identity, nn.Flatten)))


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
        return _noted(program, f"the model refuses twice the batch of the example: {_first_line(error)}")
    _compare(program, double, "the example inputs with every batch repeated twice")
    return program


def _noted(program: Program, text: str) -> Program:
    return dataclasses.replace(program, specialisations=(*program.specialisations, text))


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _evaluated(model: nn.Module, function: Callable[..., Any], given: Any) -> Any:
    """Call `function` on copied inputs, without gradients and fused attention, and leave nothing changed."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with untouched(model), torch.no_grad():
            args, kwargs = mapped(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, given)
            return mapped(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, function(*args, **kwargs))
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def _compare(program: Program, given: Any, which: str) -> None:
    name = type(program.model).__name__
    with _explained(program.model, given):
        expected = dict(leaves(_evaluated(program.model, program.model, given)))
    fixed = "".join(f"\n  - {text}" for text in program.specialisations) or " none noted"
    advice = f"Fixed while tracing:{fixed}\nRead sizes as x.shape[i] and keep them in whole-number arithmetic."
    try:
        found = dict(leaves(_evaluated(program.model, program.run, given)))
    except Exception as error:
        raise TraceError(f"The graph of {name} fails on {which} ({_first_line(error)}). {advice}") from error
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


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Leave the model and the random generators as they were found, whatever happens inside.

    Covers every attribute of every module (modes, hooks, caches in dicts, lists and sets), and the value,
    identity, gradient and `requires_grad` of every parameter, buffer and tensor attribute. Costs one copy of
    the tensors.
    """
    containers: dict[int, Any] = {}
    found: dict[int, Tensor] = {}
    for module in list(model.modules()):
        _collect(vars(module), containers, found)
    copies = [(container, container.copy()) for container in containers.values()]
    saved = [_Saved.of(tensor) for tensor in found.values()]
    generators = _random_state()
    try:
        yield
    finally:
        for container, content in copies:
            _refill(container, content)
        for item in saved:
            item.restore()
        for setter, state in generators:
            setter(state)


def _collect(value: Any, containers: dict[int, Any], found: dict[int, Tensor]) -> None:
    if isinstance(value, Tensor):
        found[id(value)] = value
    elif type(value) in (dict, list, set, collections.OrderedDict, collections.deque) and id(value) not in containers:
        containers[id(value)] = value
        for child in list(value.values() if isinstance(value, dict) else value):
            _collect(child, containers, found)


def _refill(container: Any, content: Any) -> None:
    flat = [[*c, *c.values()] if isinstance(c, dict) else list(c) for c in (container, content)]
    if len(flat[0]) == len(flat[1]) and all(a is b for a, b in zip(*flat, strict=True)):
        return
    container.clear()
    (container.extend if hasattr(container, "extend") else container.update)(content)


@dataclass(frozen=True)
class _Saved:
    tensor: Tensor
    data: Tensor
    values: Tensor | None
    requires_grad: bool
    grad: Tensor | None

    @staticmethod
    def of(tensor: Tensor) -> "_Saved":
        solid = tensor.layout is torch.strided and not tensor.is_meta and not isinstance(tensor, FakeTensor)
        values = tensor.detach().clone() if solid else None
        return _Saved(tensor, tensor.data, values, tensor.requires_grad, tensor.grad if tensor.is_leaf else None)

    def restore(self) -> None:
        """Write back only what has changed: a write would break the backward of a loss still alive."""
        tensor = self.tensor
        if self.values is not None:
            if tensor.data_ptr() != self.data.data_ptr() or tensor.shape != self.data.shape:
                tensor.data = self.data
            if not torch.equal(tensor, self.values):
                with torch.no_grad():
                    tensor.copy_(self.values)
        if tensor.is_leaf:
            tensor.requires_grad_(self.requires_grad)
            if tensor.grad is not self.grad:
                tensor.grad = self.grad


def _random_state() -> list[tuple[Callable[[Any], Any], Any]]:
    states: list[tuple[Callable[[Any], Any], Any]] = [
        (torch.set_rng_state, torch.get_rng_state()),
        (random.setstate, random.getstate()),
        (np.random.set_state, np.random.get_state()),
    ]
    if torch.cuda.is_initialized():
        states.append((torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all()))
    return states
