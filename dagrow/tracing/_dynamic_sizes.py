"""How the sizes of activations follow those of the inputs, beyond the example that was traced.

Two activations may have equally many positions by chance, because the example's inputs have. So the graph runs again on
tensors without entries, at other sizes of its inputs. What has the same size at every sample that the graph takes has
it whatever the inputs are.
"""

import collections
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode as FakeMode
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from dagrow._model_state import preserve_state
from dagrow._pytree import mapped, tensors_in
from dagrow.tracing._contexts import plainly, quietly
from dagrow.tracing._program import Executor, Program
from dagrow.tracing._recorder import fake_batch_norm
from dagrow.tracing._traced_int import COMPARISONS

Sizes = tuple[int, ...]  #: of one dimension at every sample, the example's first
Shapes = Mapping[fx.Node, torch.Size]  #: of all activations at one sample
InputDim = tuple[int, int]  #: a tensor among the inputs, and a dimension of it
STEPS = (*range(1, 9), 12, 14, 16, 24, 28, 32, 64)  #: by which a dimension is tried to grow
JOINT = 6  #: samples in which all dimensions that can grow do, each by another multiple of its step
SEVERAL = 6  #: so many dimensions of equal sizes are tried in parts


@dataclass(frozen=True, eq=False)
class DynamicSizes:
    """Sizes of activations, as they follow those of the inputs.

    Attributes:
        shapes: node -> its size along each dimension, at every sample.
        example: the sizes of inputs that were varied, as they were traced; none where the graph needs values.
    """

    shapes: Mapping[fx.Node, tuple[Sizes, ...]]
    example: Mapping[InputDim, int]

    @staticmethod
    def together(size: Sizes, other: Sizes) -> list[tuple[int, int]]:
        """What two sizes are for inputs that the model takes.

        Args:
            size: of an activation along a dimension.
            other: of another one.

        Returns:
            Both sizes at every sample: for the example's inputs first, for larger ones behind it.
        """
        return list(zip(size, other, strict=True))


def dynamic_sizes(program: Program) -> DynamicSizes:
    """The sizes of a program's activations at the example's inputs and at some larger ones.

    Of each input all dimensions vary but the first, along which samples lie, and those of size 1.

    Args:
        program: a traced model; it is left as it was.

    Returns:
        Sizes at the samples that the graph takes: at those where torch can run it and no comparison of sizes comes
        out otherwise than it did.
    """
    runs, fake = _SizedRuns(program), FakeMode(allow_non_fake_inputs=True)
    with preserve_state(program.model, weights=True), torch.no_grad(), plainly(), quietly(), _ShortBatchNorm(), fake:
        at_example = runs.at({})
        samples = [] if at_example is None else [at_example, *_samples(runs)]
    if not samples:
        values = {node: node.meta["val"] for node in program.graph.nodes}
        samples = [{node: value.shape for node, value in values.items() if isinstance(value, Tensor)}]
    shapes = {node: tuple(zip(*(sample[node] for sample in samples), strict=False)) for node in samples[0]}
    return DynamicSizes(shapes, runs.sizes if at_example is not None else {})


class _ShortBatchNorm(TorchFunctionMode):
    """Inside, batch norms of tensors without entries take one step."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (fake_batch_norm if func is functional.batch_norm else func)(*args, **(kwargs or {}))


class _SizedRuns:
    """The graph, run at chosen sizes of its inputs."""

    def __init__(self, program: Program) -> None:
        self.program, self.executor = program, _SizeInterpreter(program)
        self.inputs = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"]
        shapes = enumerate(tensor.shape for tensor in tensors_in(self.inputs))
        self.sizes: dict[InputDim, int] = {
            (number, dim): size for number, shape in shapes for dim, size in enumerate(shape) if dim and size > 1
        }
        self.device = next((parameter.device for parameter in program.model.parameters()), torch.device("cpu"))

    def at(self, increases: Mapping[InputDim, int]) -> Shapes | None:
        """Shapes of nodes where some dimensions of inputs are larger; None where the graph does not hold for them."""
        try:
            self.program.through(self.executor, self._inputs(increases))
        except Exception:  # torch's own operations and the user's may refuse sizes in any way
            return None
        return self.executor.shapes

    def _inputs(self, increases: Mapping[InputDim, int]) -> Sequence[object]:
        numbers = itertools.count()

        def resized(value: object) -> object:
            if not isinstance(value, Tensor):
                return value
            number = next(numbers)
            shape = [size + increases.get((number, dim), 0) for dim, size in enumerate(value.shape)]
            return torch.empty(shape, dtype=value.dtype, device=self.device)

        return [mapped(resized, value) for value in self.inputs]


class _SizeInterpreter(Executor):
    """Notes shapes, and fails where sizes compare otherwise than they did when the graph was made."""

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self.garbage_collect_values = False
        self.shapes: dict[fx.Node, torch.Size] = {}
        self.guards = collections.defaultdict(list)  # by the later of the nodes that were compared
        order = {node: place for place, node in enumerate(self.graph.nodes)}
        for node in self.graph.nodes:
            for (sign, right), result in node.meta.get("guards", {}).items():
                later = right if isinstance(right, fx.Node) and order[right] > order[node] else node
                self.guards[later].append((node, sign, right, result))

    def run(self, *args: Any, **kwargs: Any) -> Any:
        self.shapes = {}
        return super().run(*args, **kwargs)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.shapes[n] = value.shape
        values = {**self.env, n: value} if n in self.guards else {}
        for node, sign, right, result in self.guards.get(n, ()):
            if bool(COMPARISONS[sign](values[node], values.get(right, right))) is not result:
                raise RuntimeError(f"{node.name} {sign} {right} is not {result}")
        return value


def _samples(runs: _SizedRuns) -> list[Shapes]:
    """Shapes of nodes at larger inputs: a dimension by itself or with those that it is tied to, then all at once."""
    samples: list[Shapes] = []
    steps: dict[InputDim, int] = {}
    free: list[tuple[InputDim, ...]] = []
    for dims in _sets(runs.sizes, steps):
        for step in STEPS:
            shapes = runs.at(dict.fromkeys(dims, step))
            if shapes is not None:
                samples.append(shapes)
                steps |= dict.fromkeys(dims, step)
                free.append(dims)
                break
    for turn in range(JOINT if free else 0):
        factors = {dim: 1 + (turn + number + 1) % JOINT for number, dims in enumerate(free) for dim in dims}
        shapes = runs.at({dim: factors[dim] * steps[dim] for dim in steps})
        samples += [] if shapes is None else [shapes]
    return samples


def _sets(sizes: Mapping[InputDim, int], steps: Mapping[InputDim, int]) -> Iterator[tuple[InputDim, ...]]:
    """Sets of input dimensions that may grow together, while ``steps`` fills with those that are found to.

    First each by itself; then those of equal sizes: up to half of them, all that is left (0), larger parts; then pairs
    from different inputs.

    Args:
        sizes: of the dimensions that vary.
        steps: by dimensions that were found to grow.

    Yields:
        Sets of dimensions that are not among them.
    """
    yield from ((dim,) for dim in sizes)
    for size in {sizes[dim]: None for dim in sizes if dim not in steps}:
        equal = [dim for dim in sizes if sizes[dim] == size and dim not in steps]
        half = len(equal) // 2
        parts = [*range(2, half + 1), 0, *range(half + 1, len(equal))] if len(equal) <= SEVERAL else [0]
        for count in parts:
            fixed = [dim for dim in equal if dim not in steps]
            for dims in itertools.combinations(fixed, count or len(fixed)):
                if len(dims) > 1 and steps.keys().isdisjoint(dims):
                    yield dims
    for dims in itertools.combinations([dim for dim in sizes if dim not in steps], 2):
        if dims[0][0] != dims[1][0] and sizes[dims[0]] != sizes[dims[1]] and steps.keys().isdisjoint(dims):
            yield dims
