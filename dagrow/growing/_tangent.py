"""The tangent space of the whole network: which part of the functional gradient all parameters together can follow.

With ``v = -dL/df`` at the network's own output ``f(x; theta)`` and ``J = df/dtheta``, the expressivity bottleneck is

    min over dtheta of  E |v - J dtheta|^2

Layer by layer this is a small regression; over all parameters it is solved by conjugate gradients on the normal
equations ``E J^T J dtheta = E J^T v``, with Jacobian products only, so that neither J nor any vector of the data's
length is ever held.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Unpack

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call

from dagrow._model_state import ModelState, preserve_state
from dagrow._progress import with_progress
from dagrow._text import Printable, render
from dagrow.errors import LossError, check_real, check_whole
from dagrow.graph import Dag
from dagrow.growing._bottlenecks import Bottlenecks, bottlenecks
from dagrow.statistics import Loss, MeasureOptions, Objective, bind, drawn

WINDOW = 10  #: iterations over which progress is judged
KEPT = 2**25  #: numbers kept to keep slopes orthogonal, 256 MiB


@dataclass(frozen=True)
class Tangent(Printable):
    """What all trainable parameters together can follow of the network's functional gradient.

    Attributes:
        goal: ``E|v|^2`` at the network's output.
        explained: the part that the best joint move follows; a lower bound if not converged.
        bottleneck: the rest, ``E|v - J dtheta|^2``.
        iterations: of conjugate gradients.
        converged: whether further iterations would have changed the figures by less than the tolerance.
        samples: the number of samples.
        edges: beside it the figures of each layer: its own goal, and what its own weights follow of it.
    """

    goal: float
    explained: float
    bottleneck: float
    iterations: int
    converged: bool
    samples: int
    edges: Bottlenecks = field(repr=False)

    @property
    def share(self) -> float:
        """The part of the goal that is out of reach, 0 to 1."""
        return self.bottleneck / self.goal if self.goal else 0.0

    def __str__(self) -> str:
        how = "converged" if self.converged else "not converged, so more may be within reach"
        table = Table(
            "output",
            "goal",
            "all weights follow",
            "bottleneck",
            "share",
            title_justify="left",
            title=f"{self.samples} samples, {self.iterations} iterations, {how}",
        )
        figures = (f"{x:.4g}" for x in (self.goal, self.explained, self.bottleneck))
        table.add_row("network", *figures, f"{self.share:.1%}")
        return f"{render(table)}\n{self.edges}"


@with_progress
def tangent(
    dag: Dag,
    batches: Iterable[Any],
    loss: Loss,
    *,
    mode: str = "eval",
    iterations: int = 200,
    tolerance: float = 1e-3,
    **options: Unpack[MeasureOptions],
) -> Tangent:
    """Measures which part of its functional gradient the network can follow. Changes nothing.

    Each iteration is one pass over the batches, at about the cost of two training epochs on them.

    Args:
        dag: what :func:`dagrow.trace` returned. Parameters with ``requires_grad=False`` do not count.
        batches: any re-iterable of ``(inputs, target)``.
        loss: ``loss(output, target)``, a mean or a sum over samples; the output is a tensor of any shape.
        mode: the mode that the model runs in, ``"eval"`` or ``"train"``.
        iterations: at most this many.
        tolerance: stops when ten iterations together explain less than this part of the goal.
        options: how batches are measured, see :class:`dagrow.statistics.MeasureOptions`.

    Returns:
        Figures of the whole network, and beside them those of each layer.

    Raises:
        BatchError: the batches do not fit.
        LossError: the loss or the model's output does not.
        GrowthError: the dag is no longer that of its model, or a setting is negative.
    """
    check_whole("tangent", 0, iterations=iterations)
    check_real("tangent", 0, tolerance=tolerance)
    batches = drawn(batches, options)
    edges = bottlenecks(dag, batches, loss, mode=mode, **options)
    jacobian = _Jacobian(dag, batches, loss, mode, options)
    goal, slope = jacobian.goal()
    best = _conjugate_gradients(jacobian, slope, goal, iterations, tolerance)
    bottleneck = jacobian.residual(best.move) if best.iterations else goal
    return Tangent(goal, goal - bottleneck, bottleneck, best.iterations, best.converged, jacobian.samples, edges)


class _Jacobian:
    """``J = df/dtheta`` over all batches, by its products. Vectors of parameters are flat and float64.

    Random draws (dropout in train mode) are the same whenever a batch is run.
    """

    def __init__(self, dag: Dag, batches: Iterable[Any], loss: Loss, mode: str, options: MeasureOptions) -> None:
        self.model, self.loss, self.samples = dag.model, loss, 0
        self.objective = Objective(self.model, batches, None if loss is None else self._at_output, mode=mode, **options)
        self.parameters = {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}
        self.size = sum(p.numel() for p in self.parameters.values())
        self.names = _names(self.model, {*self.parameters, *dict(self.model.named_buffers())})
        self.resolution = max([1e3 * torch.finfo(p.dtype).eps for p in self.parameters.values()], default=0.0)
        self.output: Tensor | None = None

    def goal(self) -> tuple[float, Tensor]:
        """``E |v|^2`` and ``E J^T v [theta]``."""
        energy, slope, samples = 0.0, torch.zeros(self.size, dtype=torch.float64), 0
        with self._running():
            for batch, n in self.objective:
                v = self._goal(batch, n)
                energy += float(v.double().square().sum())
                slope += self._pull(batch, v)
                samples += n
        self.samples, self.objective.others.complete = samples, True
        return energy / samples, slope / samples

    def gram(self, move: Tensor) -> tuple[float, Tensor]:
        """``E |J dtheta|^2`` and ``E J^T J dtheta [theta]``."""
        energy, pulled = 0.0, torch.zeros_like(move)
        with self._running():
            for batch, _ in self.objective:
                pushed = self._push(batch, move)
                energy += float(pushed.double().square().sum())
                pulled += self._pull(batch, pushed)
        return energy / self.samples, pulled / self.samples

    def residual(self, move: Tensor) -> float:
        """``E |v - J dtheta|^2``, summed as it stands."""
        energy = 0.0
        with self._running():
            for batch, n in self.objective:
                v = self._goal(batch, n)
                energy += float((v.double() - self._push(batch, move).double()).square().sum())
        return energy / self.samples

    @contextmanager
    def _running(self) -> Iterator[None]:
        self.objective.probe()
        with preserve_state(self.model, self.objective.others), torch.inference_mode(False), torch.enable_grad():
            self.model.train(self.objective.mode == "train")
            yield

    def _at_output(self, output: object, target: object) -> Tensor:
        """The user's loss as a function of the output alone."""
        if not isinstance(output, Tensor) or not output.is_floating_point():
            kind = f"a tensor of {output.dtype}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
            raise LossError(
                f"the model returned {kind}; the tangent space is that of one tensor of real numbers. "
                "Trace a model that returns only the tensor that the loss reads."
            )
        self.output = output.detach().requires_grad_(torch.is_grad_enabled())
        return self.loss(self.output, target)

    def _goal(self, batch: Any, samples: int) -> Tensor:
        """``v`` of a batch, in the output's own shape."""
        value = self.objective.value(batch)
        if not value.requires_grad:
            raise LossError("the loss does not depend on the model: no gradient reaches its output.")
        assert self.output is not None
        (gradient,) = torch.autograd.grad(value, self.output)
        return gradient * (-self.objective.scale(samples) * samples)

    def _output(self, batch: Any, parameters: Mapping[str, Tensor]) -> Tensor:
        self.objective.hold()
        args, kwargs = bind(batch[0])
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        tensors = {**buffers, **parameters}
        values = {name: tensors[first] for name, first in self.names.items()}
        with self.objective.noting(batch):
            return functional_call(self.model, values, args, kwargs, tie_weights=False)

    def _leaves(self) -> dict[str, Tensor]:
        return {name: p.detach().requires_grad_() for name, p in self.parameters.items()}

    def _push(self, batch: Any, move: Tensor) -> Tensor:
        """``J dtheta``, in the output's shape: forward mode, or reverse mode twice where a layer has no other."""
        direction, before = self._shaped(move), ModelState(self.model)
        try:
            with forward_ad.dual_level(), torch.no_grad():
                duals = {name: forward_ad.make_dual(p, direction[name]) for name, p in self.parameters.items()}
                output, pushed = forward_ad.unpack_dual(self._output(batch, duals))
                return torch.zeros_like(output) if pushed is None else pushed
        except (NotImplementedError, RuntimeError) as error:
            if type(error) not in (NotImplementedError, RuntimeError):
                raise  # of the user's own
            before.restore()
            return self._push_in_reverse(batch, direction)

    def _push_in_reverse(self, batch: Any, direction: Mapping[str, Tensor]) -> Tensor:
        """``J dtheta = d <J^T u, dtheta> / du``."""
        leaves = self._leaves()
        output = self._output(batch, leaves)
        u = torch.zeros_like(output, requires_grad=True)
        pulled = torch.autograd.grad(output, list(leaves.values()), u, create_graph=True, materialize_grads=True)
        along = sum(((g * direction[name]).sum() for name, g in zip(leaves, pulled, strict=True)), u.new_zeros(()))
        return torch.autograd.grad(along, u)[0]

    def _pull(self, batch: Any, values: Tensor) -> Tensor:
        """``J^T u [theta]``."""
        leaves = self._leaves()
        if not leaves:
            return torch.zeros(0, dtype=torch.float64)
        output = self._output(batch, leaves)
        if not output.requires_grad:  # no trainable parameter reaches it
            return torch.zeros(self.size, dtype=torch.float64)
        gradients = torch.autograd.grad(output, list(leaves.values()), values, materialize_grads=True)
        return torch.cat([gradient.reshape(-1).cpu().double() for gradient in gradients])

    def _shaped(self, move: Tensor) -> dict[str, Tensor]:
        parts = move.split([p.numel() for p in self.parameters.values()])
        return {n: part.view(p.shape).to(p) for (n, p), part in zip(self.parameters.items(), parts, strict=True)}


def _names(model: nn.Module, names: set[str]) -> dict[str, str]:
    """Every place of a module that holds a tensor (shared ones have several) -> the first name of the tensor."""
    first: dict[int, str] = {}
    places: dict[str, str] = {}
    # a module that is used twice counts once: functional_call would not put its tensors back under two names
    for path, module in model.named_modules():
        for leaf, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            name = f"{path}.{leaf}" if path else leaf
            if first.setdefault(id(tensor), name) in names:
                places[name] = first[id(tensor)]
    return places


@dataclass(frozen=True)
class _Solution:
    move: Tensor
    iterations: int
    converged: bool


class _Basis:
    """Earlier slopes, to which later ones stay orthogonal: without rounding they would be so by themselves."""

    def __init__(self, size: int) -> None:
        self.limit, self.slopes = max(1, KEPT // max(1, size)), torch.zeros(0, size, dtype=torch.float64)

    def add(self, slope: Tensor) -> None:
        if len(self.slopes) < self.limit:
            self.slopes = torch.cat([self.slopes, slope[None] / slope.norm()])

    def without(self, slope: Tensor) -> Tensor:
        for _ in range(2):
            slope = slope - self.slopes.T @ (self.slopes @ slope)
        return slope


def _conjugate_gradients(
    jacobian: _Jacobian, slope: Tensor, goal: float, iterations: int, tolerance: float
) -> _Solution:
    """Minimises ``E |v - J x|^2`` from ``slope = E J^T v``; a step lowers it by ``step * |slope|^2``."""
    # the slope at x is E J^T (v - J x); slopes are kept orthogonal, so that in exact arithmetic and here too there are
    # no more iterations than directions that J can follow
    move, direction, square, residual = torch.zeros_like(slope), slope.clone(), float(slope @ slope), goal
    smallest, basis = jacobian.resolution**2 * square, _Basis(len(slope))
    recent: deque[float] = deque([goal], maxlen=WINDOW)
    for count in range(iterations):
        if square <= smallest or sum(recent) <= tolerance * goal:
            return _Solution(move, count, True)
        energy, pulled = jacobian.gram(direction)
        if energy <= 0 or square**2 > residual * energy:  # rounding is all that is left of the slope
            return _Solution(move, count, True)
        basis.add(slope)
        step = square / energy
        move, slope = move + step * direction, basis.without(slope - step * pulled)
        recent.append(step * square)
        residual -= step * square
        before, square = square, float(slope @ slope)
        direction = slope + (square / before) * direction
    return _Solution(move, iterations, square <= smallest or sum(recent) <= tolerance * goal)
