"""How the sizes of activations follow those of the inputs, beyond the example that was traced.

Two activations may have equally many positions by chance, because the example's inputs have. So the graph runs once
more on tensors without entries whose sizes are symbols (``torch.fx.experimental.symbolic_shapes``): what it computes,
compares or fixes relates the symbols, and what is still apart at the end may differ in the next batch.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import islice
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode as FakeMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.fx.node import map_aggregate

from dagrow._model_state import preserve_state
from dagrow._pytree import mapped
from dagrow.tracing._attribute_int import AttributeInt
from dagrow.tracing._program import Executor, Program, plainly
from dagrow.tracing._traced_int import COMPARISONS

Size = Any  #: an int, or an expression of sympy in the sizes of inputs
LONGEST = 24  #: operations in the expression of a size; more of them take torch minutes
TRIED, KEPT = 64, 6  #: so many sizes above the example's are tried, and so many that the model takes are enough


class DynamicSizes:
    """Sizes of nodes, as they follow those of the inputs.

    Args:
        shapes: node -> its sizes; plain numbers where the graph does not run on symbols.
        example: the symbols, as they were traced.
        held: what has to hold of them, or the graph is another.
    """

    def __init__(
        self, shapes: Mapping[fx.Node, Sequence[Size]], example: Mapping[Any, int], held: Sequence[Any]
    ) -> None:
        self.shapes, self.example, self.held = shapes, example, held
        self.together = cache(self._together)

    def same(self, some: Sequence[Size], others: Sequence[Size]) -> bool:
        """Whether sizes are the same whatever the inputs are."""
        pairs = zip(some, others, strict=False)
        return len(some) == len(others) and all(one == other for pair in pairs for one, other in self.together(*pair))

    def _together(self, one: Size, other: Size) -> list[tuple[int, int]]:
        """What two sizes are for inputs that the model takes: the example's first, some larger ones behind it."""
        free = sorted(_symbols(one) | _symbols(other), key=str)
        moved = dict.fromkeys([*((symbol,) for symbol in free), tuple(free)] if free else [])
        found = [self.example, *(values for some in moved for values in islice(self._taken(some), KEPT))]
        return [(_at(one, values), _at(other, values)) for values in found]

    def _taken(self, symbols: Sequence[Any]) -> Iterator[Mapping[Any, int]]:
        """Larger sizes for some symbols, all others as they were traced, for which the graph holds."""
        held = [condition for condition in self.held if condition.free_symbols & set(symbols)]
        for more in range(1, TRIED + 1):
            values = {**self.example, **{symbol: self.example[symbol] + more for symbol in symbols}}
            if all(bool(condition.subs(values)) for condition in held):
                yield values


def _symbols(size: Size) -> set[Any]:
    return set() if isinstance(size, int) else size.free_symbols


def _at(size: Size, values: Mapping[Any, int]) -> int:
    return size if isinstance(size, int) else int(size.subs(values))


def dynamic_sizes(program: Program) -> DynamicSizes:
    """The sizes of a program's nodes."""
    try:
        return _on_symbols(program)
    except Exception:  # torch's own operations and the user's may refuse symbols in any way
        values = {node: node.meta["val"] for node in program.graph.nodes}
        return DynamicSizes({node: value.shape for node, value in values.items() if isinstance(value, Tensor)}, {}, ())


def _on_symbols(program: Program) -> DynamicSizes:
    symbols = ShapeEnv(duck_shape=False)
    fake, runner = FakeMode(allow_non_fake_inputs=True, shape_env=symbols), _SizeInterpreter(program)
    with preserve_state(program.model, weights=True), torch.no_grad(), plainly(), enable_python_dispatcher(), fake:
        inputs = _DynamicInputs(program, symbols)
        program.through(runner, inputs.values)
        runner.hold()
    shapes = {node: tuple(map(_expression, shape)) for node, shape in runner.shapes.items()}
    held = [symbols.replace(guard.expr) for guard in symbols.guards]
    if any(_symbols(size) - inputs.sizes.keys() for sizes in (*shapes.values(), held) for size in sizes):
        raise ValueError("some sizes depend on entries")
    return DynamicSizes(shapes, inputs.sizes, held)


def _expression(size: int | torch.SymInt) -> Size:
    return size if isinstance(size, int) else size.node.expr


class _DynamicInputs:
    """Inputs without entries, each size a symbol of its own but for that of the batch, along which samples lie.

    Attributes:
        values: of the placeholders.
        sizes: symbol -> what it was in the example.
    """

    def __init__(self, program: Program, symbols: ShapeEnv) -> None:
        self.symbols, self.sizes = symbols, dict[Any, int]()
        self.device = next((parameter.device for parameter in program.model.parameters()), torch.device("cpu"))
        made = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"]
        self.values = [mapped(self._input, value) for value in made]

    def _input(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        sizes = [*value.shape[:1], *map(self._size, value.shape[1:])]
        return torch.empty(sizes, dtype=value.dtype, device=self.device)

    def _size(self, size: int) -> int | torch.SymInt:
        source = ConstantSource(f"size{len(self.sizes)}")
        symbol = self.symbols.create_symbol(size, source, DimDynamic.DYNAMIC)
        if symbol.free_symbols:  # 0 and 1 are numbers
            self.sizes[symbol] = size
        return self.symbols.create_symintnode(symbol, hint=size, source=source)


class _SizeInterpreter(Executor):
    """Notes shapes."""

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self.garbage_collect_values = False
        self.shapes: dict[fx.Node, Sequence[Any]] = {}

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> Any:
        """Symbols compute with plain numbers only."""
        given = super().fetch_args_kwargs_from_env(n)
        return map_aggregate(given, lambda value: int(value) if isinstance(value, AttributeInt) else value)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.shapes[n] = tuple(value.shape)
            if any(isinstance(size, torch.SymInt) and size.node.expr.count_ops() > LONGEST for size in value.shape):
                raise OverflowError(f"the sizes of {n.name} are computed in too many steps to be compared")
        return value

    def hold(self) -> None:
        """Compares what forward has compared, which relates the symbols."""
        for node in self.graph.nodes:
            for (sign, right), result in node.meta.get("guards", {}).items():
                other = self.env[right] if isinstance(right, fx.Node) else right
                if bool(COMPARISONS[sign](self.env[node], other)) is not result:
                    raise RuntimeError(f"{node.name} {sign} {right} is not {result}")
