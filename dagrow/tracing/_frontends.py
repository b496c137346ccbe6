"""From an `nn.Module` to a `Program`: its `fx.Graph`, proved to compute what the model computes.

Two front-ends, one normal form. `record` runs the model once and writes down what happens; `symbolic` uses `torch.fx`
where there are no example inputs. Neither changes the model.
"""

import contextlib
import inspect
import itertools
from collections.abc import Callable, Iterator, Set
from dataclasses import replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode as FakeMode

from dagrow._model_state import ModelState, preserve_state
from dagrow._pytree import container_level, mapped
from dagrow.errors import TraceError
from dagrow.tracing._attribute_int import UNTRIED, Trial, attribute_ints
from dagrow.tracing._call_counts import MANY, looks_at_samples, mark_calls, samples_of, with_samples
from dagrow.tracing._contexts import explained, plainly, quietly
from dagrow.tracing._graph_writer import GraphWriter, meta_copy
from dagrow.tracing._inputs import Arguments, bind, bind_to_forward, hold_values
from dagrow.tracing._leaf_modules import is_leaf
from dagrow.tracing._program import Executor, Program
from dagrow.tracing._recorder import Recorder
from dagrow.tracing._source_lines import is_raised_by_user, source
from dagrow.tracing._verification import verify

Closed = Callable[[nn.Module], bool]  #: which modules become one node
_STARS: dict[object, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
_LONGER, _FEWEST = 8, 4000  #: times as many nodes, and so many, show that calls follow the number of samples
_ASK = "Give example inputs, dagrow.trace(model, example_inputs): the model is then run once and recorded."
_KEEPING_WIDTH = frozenset(
    "relu relu_ tanh sigmoid gelu silu elu selu leaky_relu softplus mish hardtanh relu6 dropout flatten float "
    "contiguous view reshape".split()
)


def _never(_module: nn.Module) -> bool:
    return False


def record(model: nn.Module, example_inputs: object, *, verified: bool = True, closed: Closed = _never) -> Program:
    """The program of a model, recorded in the mode that it is in.

    Raises TraceError, with the user's line, for what a graph cannot hold, or if the graph computes something else.

    Args:
        model: is run, and left as it was found.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments of forward.
        verified: whether the graph is compared with the model at another batch size.
        closed: which modules become one node, whatever they do inside.

    Returns:
        The model's graph.
    """
    inputs = bind(example_inputs)
    refuse_lazy(model)
    state, real = ModelState(model, weights=True), hold_values(model, inputs)
    cached = {id(saved.tensor) for saved in state.tensors}

    def recorded() -> Program:
        with state.kept():
            program = _recorded(model, inputs, real, closed, cached)
        if program.obstacle and real:  # many a forward does without values where there are none
            with state.kept(), contextlib.suppress(TraceError), quietly():
                program = _recorded(model, inputs, False, closed, cached)
        samples = samples_of(inputs)
        if looks_at_samples(program.graph, samples, program.baked_size):
            program = replace(program, specialisations=(*program.specialisations, *varying_calls(program, samples)))
        return verify(program, example_inputs, state) if verified else program

    def varying_calls(program: Program, samples: int) -> tuple[str, ...]:
        times, most = 1 + MANY // samples, max(_FEWEST, _LONGER * len(program.graph.nodes))
        try:  # it may refuse more samples, or need their values
            with quietly(), state.kept():
                more = _recorded(model, with_samples(inputs, times), False, closed, cached, most)
        except Exception:
            return ()
        return mark_calls(program.graph, more.graph, times)

    return state.trusted(recorded)


def raised_otherwise(
    program: Program, example_inputs: object, trial: Trial, closed: Closed = _never
) -> Exception | None:
    """What the model's forward raises by itself where sizes compare as in a wider network.

    Args:
        program: the graph, whose model is run, and left as it was found.
        example_inputs: that it was recorded with.
        trial: the sizes of the wider network.
        closed: as the graph was recorded.

    Returns:
        What a ``raise`` or ``assert`` of the user's code raised, or None.
    """
    model, inputs, state = program.model, bind(example_inputs), ModelState(program.model, weights=True)
    cached = {id(saved.tensor) for saved in state.tensors}
    try:
        with state.kept(), quietly():
            _recorded(model, inputs, program.on_values, closed, cached, trial=trial)
    except TraceError as error:
        cause = error.__cause__
        return cause if isinstance(cause, Exception) and is_raised_by_user(cause) else None
    return None


def _recorded(
    model: nn.Module,
    inputs: Arguments,
    real: bool,
    closed: Closed,
    cached: Set[int],
    most: int | None = None,
    trial: Trial = UNTRIED,
) -> Program:
    """One run of the model, on fake tensors unless ``real``, or of its first part. The caller cleans up behind it."""
    bound = bind_to_forward(model, *inputs)
    fake = None if real else FakeMode(allow_non_fake_inputs=True)
    for module in model.modules():  # wrapped inputs and outputs would hide which tensor is which
        module._backward_hooks.clear()
        module._backward_pre_hooks.clear()
    with fake or contextlib.nullcontext(), torch.enable_grad(), attribute_ints(model, trial) as uses, plainly():
        writer = GraphWriter(model, fake, cached, most)
        writer.trial = trial.sizes
        recorder = Recorder(writer, closed)
        uses.live = writer.live
        for name, value in bound.arguments.items():
            star = _STARS.get(bound.signature.parameters[name].kind, "")
            bound.arguments[name] = writer.placeholder(star + name, value)
        try:
            with explained(model, inputs), recorder:
                output = model(*bound.args, **bound.kwargs)
            writer.output(output)
        except TraceError:
            if not writer.is_full:
                raise
        for name in writer.assigned():
            writer.notes[f"forward assigns buffer {name}; the graph leaves it"] = None
    notes, computed = tuple(writer.notes), frozenset(uses.computed)
    return Program(
        model,
        writer.graph,
        writer.constants,
        notes,
        computed,
        writer.obstacle,
        writer.baked_size,
        tuple(uses.comparisons),
        real,
    )


def refuse_lazy(model: nn.Module) -> None:
    """Raises TraceError for parameters that have no shape yet."""
    lazy = [name for name, p in model.named_parameters() if nn.parameter.is_lazy(p)]
    if lazy:
        raise TraceError(f"Parameters {lazy} have no shape yet. Run one batch through the model first.")


class _Tracer(fx.Tracer):
    """`torch.fx` with our leaf rule; parameters of forward that have a default are fixed at it."""

    def __init__(self, closed: Closed) -> None:
        super().__init__()
        self.closed = closed

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_leaf(m) or self.closed(m)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta["source"] = source()
        return node

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        function, args = super().create_args_for_root(root_fn, is_module, concrete_args)
        for i, arg in enumerate(args):
            if isinstance(arg, fx.Proxy) and arg.node.args:
                args[i] = arg.node.args[0]
                self.graph.erase_node(arg.node)
        return function, args


def symbolic(model: nn.Module, closed: Closed = _never) -> Program:
    """The program of a model by `torch.fx`, if its first layer tells the shape of its only input.

    Args:
        model: is left as it was found.
        closed: which modules become one node, whatever they do inside.

    Returns:
        The model's graph, compared with the model on inputs of our own.

    Raises:
        TraceError: where example inputs are needed.
    """
    refuse_lazy(model)
    with preserve_state(model, weights=True):
        try:
            tracer = _Tracer(closed)
            with attribute_ints(model) as uses:
                graph = tracer.trace(model)
        except Exception as error:
            raise TraceError(f"torch.fx cannot follow {type(model).__name__}.forward: {error} {_ASK}") from error
        constants = _named_constants(model, graph)
    result = graph.output_node()
    count = itertools.count()
    result.meta["structure"] = mapped(lambda _: next(count), _thawed(result.args[0]))
    compared = tuple(uses.comparisons)
    program = Program(model, graph, constants, (), frozenset(uses.computed), attribute_comparisons=compared)
    example = _example(model, graph)
    fake = FakeMode(allow_non_fake_inputs=True)
    with preserve_state(model, weights=True), fake, torch.no_grad(), explained(model, example):
        _Propagator(program).run(fake.from_tensor(example))
    return verify(program, example)


class _Propagator(Executor):
    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        n.meta["val"] = mapped(meta_copy, value)
        return value


def _named_constants(model: nn.Module, graph: fx.Graph) -> dict[str, Tensor]:
    """Rename the tensors that are neither parameters nor buffers; fx hangs some of them on the model."""
    named = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
    constants: dict[str, Tensor] = {}
    for node in graph.nodes:
        if node.op == "get_attr" and node.target not in named:
            name = f"_constant{len(constants)}"
            node.target, constants[name] = name, attrgetter(node.target)(model)
    return constants


def _thawed(tree: Any) -> Any:
    """Fx's immutable containers as plain ones."""
    level = container_level(tree)
    if level is None:
        return tree
    children = [_thawed(child) for _, child in level[0]]
    if isinstance(tree, dict):
        return dict(zip(tree, children, strict=True))
    return children if isinstance(tree, list) else level[1](children)


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
        elif _keeps_width(module) if module is not None else name in _KEEPING_WIDTH:
            yield from _first_weights(model, user)
        else:
            raise TraceError(f"The input first reaches {user.target}, which leaves its shape open. {_ASK}")


def _keeps_width(module: nn.Module) -> bool:
    home = type(module).__module__.rpartition(".")[2]
    plain = not any(True for _ in module.parameters()) and not isinstance(module, nn.GLU)
    return plain and (home in ("activation", "dropout") or isinstance(module, (nn.Identity, nn.Flatten)))
