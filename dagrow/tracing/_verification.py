"""Whether a graph computes what its model computes, also at batch sizes that it was not made with."""

import collections
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from dagrow._comparison import close
from dagrow._model_state import ModelState
from dagrow._pytree import leaves, mapped
from dagrow.errors import TraceError, first_line
from dagrow.tracing._program import Executor, Program, bind, explained, hold_values, plainly
from dagrow.tracing._traced_int import COMPARISONS


def verify(program: Program, example_inputs: Any, found: ModelState | None = None) -> Program:
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
    found = found or ModelState(program.model, weights=True)
    for size, other in _resized(given):
        obstacle = _verified(program, found, other, size)
        if obstacle is None:
            return program
        program = _noted(program, obstacle)
    with explained(program.model, given):
        expected = _evaluated(found, program.model, given)
    _compare(program, found, expected, given, "the example inputs")
    return _noted(program, "verified at one batch size only")


def _verified(program: Program, found: ModelState, given: Any, size: int) -> str | None:
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


def _evaluated(found: ModelState, function: Callable[..., Any], given: Any) -> Any:
    """Call `function` on copied inputs, without gradients and fused attention, and leave the model as it was found."""
    with found.kept(), torch.no_grad(), plainly():
        args, kwargs = mapped(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, given)
        return mapped(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, function(*args, **kwargs))


def _compare(program: Program, found: ModelState, expected: Any, given: Any, which: str) -> None:
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


def relax(program: Program, example_inputs: Any) -> None:
    """Drops comparisons of sizes that come out otherwise for one sample or two, where the graph holds nevertheless."""
    if not any(node.meta.get("guards") for node in program.graph.nodes):
        return
    found, executor = ModelState(program.model, weights=True), _Sizing(program)
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
