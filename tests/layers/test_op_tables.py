"""Each table holds what torch does, tried out on small tensors."""

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from dagrow.layers import (
    MOVES,
    PAIRWISE,
    POINTWISE,
    REDUCTIONS,
    ZERO_KEEPING,
    is_move_module,
    is_pointwise_module,
    keeps_zero,
    mixed_dims,
    neutral_entries,
    op_name,
    reduced_dims,
)

X = torch.rand(3, 4, generator=torch.Generator().manual_seed(0)) + 0.1


def runnable(names: frozenset[str], *operands: Tensor) -> dict[str, Callable[..., Tensor]]:
    """Those of torch's functions that need no other arguments and draw nothing at random."""
    functions = {}
    for name in sorted(names):
        function = next((getattr(space, name) for space in (torch, functional) if hasattr(space, name)), None)
        if function is None or "dropout" in name or name.endswith("_like") or name == "rrelu":
            continue
        try:
            result = function(*operands)
        except (TypeError, RuntimeError):
            continue
        if isinstance(result, Tensor):
            functions[name] = function
    return functions


def the_only(function: Callable[..., Any], *tensors: Tensor) -> fx.Node:
    """The node of a call of a function on placeholders."""
    graph = fx.Graph()
    return graph.call_function(function, tuple(graph.placeholder(f"x{i}") for i in range(len(tensors))))


def test_pointwise_operations_compute_each_entry_from_itself() -> None:
    functions = runnable(POINTWISE, X)
    assert len(functions) > 60
    for name, function in functions.items():
        alone = torch.stack([function(entry[None])[0] for entry in X.flatten()])
        torch.testing.assert_close(function(X).flatten(), alone, equal_nan=True, msg=name)


def test_pairwise_operations_compute_each_entry_from_those_beside_it() -> None:
    other = X.flip(0)
    functions = runnable(PAIRWISE, X, other)
    assert len(functions) > 20
    for name, function in functions.items():
        pairs = zip(X.flatten(), other.flatten(), strict=True)
        alone = torch.stack([function(a[None], b[None])[0] for a, b in pairs])
        torch.testing.assert_close(function(X, other).flatten(), alone, msg=name)
        assert function(X[:, :1], other).shape == X.shape, name


def test_what_keeps_zero_makes_zero_of_zero() -> None:
    functions = runnable(ZERO_KEEPING, torch.zeros(2, 3))
    assert len(functions) > 25
    for name, function in functions.items():
        assert not function(torch.zeros(2, 3)).any(), name


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("flip", ((1,),)),
        ("movedim", (0, 1)),
        ("narrow", (1, 1, 2)),
        ("permute", ((1, 0),)),
        ("repeat_interleave", (2,)),
        ("reshape", ((2, 6),)),
        ("roll", (1, 1)),
        ("select", (1, 2)),
        ("tile", ((2, 2),)),
        ("transpose", (0, 1)),
        ("unflatten", (1, (2, 2))),
    ],
)
def test_moves_compute_nothing(name: str, args: tuple[Any, ...]) -> None:
    """Executed on numbers of entries they tell where each entry of the result comes from."""
    assert name in MOVES
    function, places = getattr(torch, name), torch.arange(X.numel()).view(X.shape)
    assert torch.equal(function(X, *args), X.flatten()[function(places, *args)])


@pytest.mark.parametrize(
    ("function", "args", "kwargs"),
    [
        (torch.sum, (), {}),
        (torch.sum, ((0, -1),), {}),
        (torch.mean, (1,), {}),
        (torch.amax, (), {"dim": -1}),
        (torch.norm, (2, 1), {}),
        (torch.linalg.vector_norm, (2, (0, 2)), {}),
        (torch.logsumexp, (), {"dim": (0, 1)}),
    ],
)
def test_dimensions_that_a_reduction_takes_together(function: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    node, x = the_only(function, X), torch.rand(2, 3, 4)
    assert op_name(node) in REDUCTIONS
    dims = reduced_dims(node, (x, *args), kwargs)
    assert function(x, *args, **kwargs).shape == tuple(size for d, size in enumerate(x.shape) if d not in dims)


@pytest.mark.parametrize(
    ("function", "args", "module"),
    [
        (functional.softmax, (1,), None),
        (torch.cumsum, (-1,), None),
        (functional.layer_norm, ((3, 4),), None),
        (functional.normalize, (), None),
        (nn.LayerNorm(4), (), nn.LayerNorm(4)),
        (nn.Softmin(0), (), nn.Softmin(0)),
        (torch.sin, (), None),
    ],
)
def test_entries_meet_along_the_dimensions_that_are_told(function: Any, args: tuple, module: nn.Module | None) -> None:
    graph, x = fx.Graph(), torch.rand(2, 3, 4, dtype=torch.float64)
    source = graph.placeholder("x")
    node = graph.call_function(function, (source, *args)) if module is None else graph.call_module("m", (source,))
    jacobian = torch.autograd.functional.jacobian(lambda x: (module.double() if module else function)(x, *args), x)
    outputs, inputs = torch.nonzero(jacobian).split(3, 1)
    met = [d for d in range(3) if (outputs[:, d] != inputs[:, d]).any()]
    assert (mixed_dims(node, module, 3) or []) == met


def test_names_are_those_of_the_operation_however_it_is_called() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    spelled = [graph.call_function(f, (x, x)) for f in (torch.add, operator.add, operator.iadd, Tensor.add_)]
    assert {op_name(node) for node in (*spelled, graph.call_method("add_", (x, x)))} == {"add"}
    assert op_name(graph.call_function(getattr, (x, "shape"))) == "shape"
    assert op_name(graph.call_function(the_only, (x,))) is None


@pytest.mark.parametrize(
    ("use", "entries"),
    [
        (lambda x, w: x * w, {1.0}),
        (lambda x, w: x + w, {0.0}),
        (lambda x, w: x / w.abs(), {1.0}),
        (lambda x, w: x * w.view(1, -1), {1.0}),
        (lambda x, w: x * w + w, {0.0, 1.0}),
    ],
)
def test_neutral_entries_leave_a_channel_as_it_is(use: Callable[[Tensor, Tensor], Tensor], entries: set) -> None:
    graph = fx.symbolic_trace(use).graph
    assert neutral_entries(next(node for node in graph.nodes if node.name == "w")) == entries
    if len(entries) == 1:
        assert torch.equal(use(X, torch.full((4,), *entries)), X)


def test_modules_count_only_with_the_forward_of_their_class() -> None:
    class Mixing(nn.ReLU):
        def forward(self, x: Tensor) -> Tensor:
            return x.flip(-1)

    class Named(nn.ReLU):
        """Like any other."""

    assert is_pointwise_module(Named())
    assert not is_pointwise_module(Mixing())
    assert is_move_module(nn.Flatten())
    assert not is_move_module(nn.Softmax(1))
    for module in (nn.ReLU(), nn.Tanh(), nn.Sigmoid(), nn.Softplus(), nn.Hardtanh(), nn.GELU()):
        assert not keeps_zero(module) or not module(torch.zeros(3)).any()
    assert keeps_zero(nn.GELU())
    assert not keeps_zero(nn.Sigmoid())
