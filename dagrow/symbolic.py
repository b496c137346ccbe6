"""The program of a model without example inputs, by ``torch.fx``."""

import itertools
from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from dagrow.boundaries import is_leaf
from dagrow.errors import TraceError
from dagrow.frames import source
from dagrow.program import Executor, Program, explained
from dagrow.record import FakeMode, snapshot
from dagrow.stated import stated
from dagrow.trace import refuse_lazy
from dagrow.trees import mapped
from dagrow.undisturbed import undisturbed
from dagrow.verification import verify

__all__ = ["symbolic"]

_ASK = "Give example inputs, dagrow.trace(model, example_inputs): the model is then run once and recorded."
_SHAPELESS = {
    "relu", "relu_", "tanh", "sigmoid", "gelu", "silu", "elu", "selu", "leaky_relu", "softplus", "mish",
    "hardtanh", "relu6", "dropout", "flatten", "float", "contiguous", "view", "reshape",
}  # fmt: skip


class _Tracer(fx.Tracer):
    """`torch.fx` with our leaf rule; parameters of forward that have a default are fixed at it."""

    def __init__(self, closed: Callable[[nn.Module], bool]) -> None:
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


def symbolic(model: nn.Module, closed: Callable[[nn.Module], bool] = lambda _module: False) -> Program:
    """The program of `model` by `torch.fx`, if its first layer tells the shape of its only input.

    Modules that are ``closed`` are not looked into."""
    refuse_lazy(model)
    with undisturbed(model, weights=True):
        try:
            tracer = _Tracer(closed)
            with stated(model) as uses:
                graph = tracer.trace(model)
        except Exception as error:
            raise TraceError(f"torch.fx cannot follow {type(model).__name__}.forward: {error} {_ASK}") from error
        constants = _named_constants(model, graph)
    result = graph.output_node()
    count = itertools.count()
    result.meta["structure"] = mapped(lambda _: next(count), _thawed(result.args[0]))
    program = Program(model, graph, constants, (), frozenset(uses.computed))
    example = _example(model, graph)
    fake = FakeMode(allow_non_fake_inputs=True)
    with undisturbed(model, weights=True), fake, torch.no_grad(), explained(model, example):
        _Propagator(program).run(fake.from_tensor(example))
    return verify(program, example)


class _Propagator(Executor):
    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        n.meta["val"] = mapped(snapshot, value)
        return value


def _named_constants(model: nn.Module, graph: fx.Graph) -> dict[str, Tensor]:
    """Rename the tensors that are neither parameters nor buffers; fx hangs some of them on the model."""
    known = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
    constants: dict[str, Tensor] = {}
    for node in graph.nodes:
        if node.op == "get_attr" and node.target not in known:
            name = f"_constant{len(constants)}"
            node.target, constants[name] = name, attrgetter(node.target)(model)
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
