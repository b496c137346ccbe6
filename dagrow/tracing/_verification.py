"""Whether a graph computes what its model computes, also at batch sizes that it was not made with."""

import collections
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from dagrow._comparison import close
from dagrow._model_state import ModelState
from dagrow._pytree import leaves, mapped
from dagrow.errors import TraceError, first_line
from dagrow.tracing._contexts import explained, plainly
from dagrow.tracing._inputs import Arguments, bind, hold_values
from dagrow.tracing._program import Executor, Program
from dagrow.tracing._traced_int import COMPARISONS


def verify(program: Program, example_inputs: object, state: ModelState | None = None) -> Program:
    """Compare the graph with the model at another batch size than it was made with, in the mode the model is in.

    Two samples, or one of two. Where the model itself refuses that, half of the batch, then one sample more; where
    it refuses all, the example, which a note tells. Both run on the same random numbers and buffers. Raises
    TraceError that names the first output that differs.

    Args:
        program: the graph with its model.
        example_inputs: that it was made with.
        state: the model as it is, to come back to.

    Returns:
        The program, with notes of what could not be verified.
    """
    inputs = bind(example_inputs)
    if not hold_values(program.model, inputs):
        return _noted(program, "not verified: the model or the example inputs hold no values")
    state = state or ModelState(program.model, weights=True)
    for size, resized in _resized(inputs):
        obstacle = _verified(program, state, resized, size)
        if obstacle is None:
            return program
        program = _noted(program, obstacle)
    with explained(program.model, inputs):
        expected = _evaluated(state, program.model, inputs)
    _compare(program, state, expected, inputs, "the example inputs")
    return _noted(program, "verified at one batch size only")


def _verified(program: Program, state: ModelState, inputs: Arguments, size: int) -> str | None:
    """Why the graph cannot be verified at a batch size, or None if it is."""
    try:
        expected = _evaluated(state, program.model, inputs)
    except Exception as error:  # the user's forward may raise anything
        return f"the model refuses a batch of {size}: {first_line(error)}"
    try:
        _compare(program, state, expected, inputs, f"the example inputs with a batch of {size}")
    except TraceError:
        if size > 1:
            raise
        return "the graph does not hold for a batch of 1, for which the model does something else"
    return None


def _noted(program: Program, text: str) -> Program:
    return dataclasses.replace(program, specialisations=(*program.specialisations, text))


def _evaluated(state: ModelState, function: Callable[..., object], inputs: Arguments) -> object:
    """Call `function` on copied inputs, without gradients and fused attention, and leave the model as it was found."""
    with state.kept(), torch.no_grad(), plainly():
        args, kwargs = mapped(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, inputs)
        return mapped(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, function(*args, **kwargs))


def _compare(program: Program, state: ModelState, expected: object, inputs: Arguments, which: str) -> None:
    name, expected = type(program.model).__name__, dict(leaves(expected))
    fixed = "".join(f"\n  - {text}" for text in program.specialisations) or " none noted"
    advice = f"Fixed while tracing:{fixed}\nRead sizes as x.shape[i] and keep them in whole-number arithmetic."
    try:
        computed = dict(leaves(_evaluated(state, program.run, inputs)))
    except Exception as error:
        raise TraceError(f"The graph of {name} fails on {which} ({first_line(error)}). {advice}") from error
    for path in {**expected, **computed}:
        if path not in expected or path not in computed or not close(expected[path], computed[path]):
            raise TraceError(f"The graph of {name} differs from the model at output{path} on {which}. {advice}")


def relax_guards(program: Program, example_inputs: object) -> None:
    """Drops comparisons of sizes that come out otherwise for one sample or two, where the graph holds nevertheless.

    Args:
        program: whose nodes lose the comparisons.
        example_inputs: of which the samples are taken.
    """
    if not any(node.meta.get("guards") for node in program.graph.nodes):
        return
    state, executor = ModelState(program.model, weights=True), Executor(program)
    executor.garbage_collect_values = False
    for _, inputs in _resized(bind(example_inputs), (1, 2)):
        try:
            expected = dict(leaves(_evaluated(state, program.model, inputs)))
            computed = dict(leaves(_evaluated(state, lambda *a, **k: program.run_with(executor, a, k), inputs)))
        except Exception:  # the user's forward may raise anything
            return
        if all(path in computed and close(value, computed[path]) for path, value in expected.items()):
            _relax(executor.env)


def _relax(values: Mapping[fx.Node, Any]) -> None:
    """Drops the comparisons that come out otherwise for the values of nodes."""
    for node, size in values.items():
        guards = node.meta.get("guards", {})
        for (sign, right), holds in list(guards.items()):
            if COMPARISONS[sign](size, values.get(right, right)) is not holds:
                del guards[sign, right]


def _resized(inputs: Arguments, batch_sizes: Sequence[int] = ()) -> Iterator[tuple[int, Arguments]]:
    """The inputs with other sizes of the dimension that most tensors share as their first."""
    sizes = [leaf.shape[0] for _, leaf in leaves(inputs) if isinstance(leaf, Tensor) and leaf.dim()]
    batch = collections.Counter(sizes).most_common(1)[0][0] if sizes else 0
    usual = [size for size in (1 if batch == 2 else 2, batch // 2, batch + 1) if size > 1 or batch == 2]
    for size in dict.fromkeys(batch_sizes or usual) if batch else ():
        samples = torch.arange(size) % batch

        def taken(leaf: object, samples: Tensor = samples) -> object:
            return _rows(leaf, samples) if isinstance(leaf, Tensor) and leaf.shape[:1] == (batch,) else leaf

        yield size, mapped(taken, inputs)


def _rows(tensor: Tensor, numbers: Tensor) -> Tensor:
    """Some rows of a tensor of any layout."""
    numbers = numbers.to(tensor.device)
    if tensor.layout is torch.strided:
        return tensor[numbers]
    rows = tensor.to_sparse_coo().index_select(0, numbers)
    return rows if tensor.layout is torch.sparse_coo else rows.to_sparse(layout=tensor.layout)


def two_samples(example_inputs: Any) -> Any:
    """Two samples of the example inputs, where there are more.

    Args:
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments of forward.

    Returns:
        The same with two samples, or the example inputs as they are.
    """
    inputs = bind(example_inputs)
    size, (args, kwargs) = next(_resized(inputs), (0, inputs))
    return (args or kwargs) if size == 2 else example_inputs
