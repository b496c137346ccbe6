"""Gradients inside the graph of a loss, also where a backward pass runs layers again.

A reentrant checkpoint, or a reversible block, runs its layers without a graph and once more, with one, in the backward
pass. Gradients there are seen by hooks on nodes while ``loss.backward()`` runs; ``torch.autograd.grad`` cannot.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from dagrow._model_state import restoring
from dagrow.errors import LossError


def runs_again(loss: Tensor, hidden: bool) -> bool:
    """Whether the backward pass of a loss may run layers again, of which its graph shows nothing.

    Args:
        loss: of a batch.
        hidden: whether layers ran without a graph; then any custom function may hold them.

    Returns:
        True if it has to be run as a whole.
    """
    custom = [node for node in _nodes(loss.grad_fn) if isinstance(node, BackwardCFunction)]
    return any(hidden or "Checkpoint" in node.name() for node in custom)


def _nodes(root: Node | None) -> Iterator[Node]:
    seen, waiting = {root}, [root]
    while waiting:
        node = waiting.pop()
        if node is not None:
            yield node
            new = {after for after, _ in node.next_functions} - seen
            seen |= new
            waiting += new


def gradients_at(loss: Tensor, places: Sequence[GradientEdge], weights: Sequence[Tensor] = ()) -> list[Tensor | None]:
    """Gradients of a loss at places in its graph, and of weights, without what hooks of theirs would make of them.

    Args:
        loss: of a batch.
        places: where.
        weights: leaves of the graph.

    Returns:
        Its gradient at each, None where it does not reach.

    Raises:
        RuntimeError: there is none.
    """
    ends = [*places, *map(get_gradient_edge, weights)]
    if not ends or not loss.requires_grad:
        return [None] * len(ends)
    hooks = [(table, dict(table)) for table in (weight._backward_hooks for weight in weights) if table]

    def restore() -> None:
        for table, content in hooks:
            table.update(content)

    try:
        with restoring(restore):
            for table, _ in hooks:
                table.clear()
            return [*torch.autograd.grad(loss, ends, allow_unused=True)]
    except RuntimeError as error:
        error.add_note(_no_gradient(error))
        raise


def gradients_of(loss: Tensor, leaves: Sequence[Tensor]) -> list[Tensor | None]:
    """Gradients of leaves alone.

    Args:
        loss: of a batch.
        leaves: of its graph.

    Returns:
        Its gradient at each, None where it does not reach.
    """
    return gradients_at(loss, (), leaves)


def watch(edge: GradientEdge, keep: Callable[[Tensor], None]) -> None:
    """Hands on the gradient that arrives at a place of a graph in a backward pass."""

    def arrived(gradients: Sequence[Tensor | None]) -> None:
        gradient = gradients[edge.output_nr]
        if gradient is not None:
            keep(gradient)

    edge.node.register_prehook(arrived)


def run_backward(loss: Tensor, model: nn.Module) -> None:
    """A whole backward pass, which leaves gradients at the parameters.

    Args:
        loss: of a batch.
        model: whose parameters the gradients are left at.

    Raises:
        RuntimeError: there is no gradient.
        LossError: the pass would run what others do with the gradients of parameters.
    """
    hooked = _hooked(model.named_parameters())
    if hooked:
        raise LossError(
            "layers may run again in the backward pass (in a checkpoint with use_reentrant=True, or a function of your "
            f"own beside layers that run under no_grad), and {hooked} carries hooks that such a pass would run. "
            "Measure without these hooks, or let the model call "
            "torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
        )
    try:
        loss.backward()
    except RuntimeError as error:
        error.add_note(_no_gradient(error))
        raise


def _hooked(parameters: Iterable[tuple[str, Tensor]]) -> str | None:
    tables = ("_backward_hooks", "_post_accumulate_grad_hooks")
    return next((name for name, p in parameters if any(getattr(p, table, None) for table in tables)), None)


def _no_gradient(error: RuntimeError) -> str:
    return (
        f"the loss has no gradient ({error}). It must be differentiable, and targets of the type of the outputs where "
        "the loss compares them."
    )
