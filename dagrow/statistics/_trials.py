"""Running a batch once more with other weights, or something else at outputs of layers, to see what the loss does."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import combinations
from math import inf
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dagrow._model_state import ModelState, replaced
from dagrow.errors import NotFiniteError
from dagrow.statistics._backward import gradients_of
from dagrow.statistics._batches import is_of_own_class
from dagrow.statistics._objective import Objective

STEPS = {torch.float64: (1e-5, 1e-6, 1e-4), torch.float32: (1e-3, 1e-2, 1e-4)}  #: tried amplitudes, the best first
CHANGE = {torch.float64: 1e-6, torch.float32: 1e-3}  #: of the loss, relative, that is small and still seen
APART = {torch.float64: 1e-3, torch.float32: 5e-2}  #: slopes that differ by less, relative, are the same
DIGITS = 100  #: a difference of losses has to be so many times what their type tells apart

Trial = Callable[[str, Tensor], Tensor | None]  #: from a layer's name and output to what replaces the output


@dataclass(frozen=True)
class Ray:
    """A direction in which weights move.

    Attributes:
        weights: by their names in the model.
        directions: by which they move.
        slope: of the loss along them, as autograd has it.
        layers: whose weights they are.
    """

    weights: Mapping[str, Tensor]
    directions: Mapping[str, Tensor]
    slope: float
    layers: frozenset[str]

    @property
    def precision(self) -> torch.dtype | None:
        """The coarsest type; None where there is one without steps."""
        dtypes = {direction.dtype for direction in self.directions.values()}
        if not dtypes <= STEPS.keys():
            return None
        return torch.float32 if torch.float32 in dtypes else torch.float64

    def amplitudes(self, dtype: torch.dtype, loss: float) -> list[float]:
        """Those that are tried, the best first: a small one, and smaller where the loss would change much."""
        first, *others = STEPS[dtype]
        return [min(first, CHANGE[dtype] * abs(loss / self.slope)) or first, *others]


class Hooks(Protocol):
    """What hangs at layers while a batch is measured.

    Attributes:
        goals: layers at whose outputs goals are found.
        weights: parameters whose gradients are found beside them.
        weight_gradients: what was found.
        trial: what is done instead while a batch is tried; None while it is measured.
    """

    goals: set[str]
    weights: Sequence[Tensor]
    weight_gradients: Sequence[Tensor | None]
    trial: Trial | None


class Trials:
    """Runs of one batch, each as if it were the first.

    Args:
        objective: the loss.
        hooks: at the layers.
        before: the model and the random generators before the batch ran.
        batch: what has run.
    """

    def __init__(self, objective: Objective, hooks: Hooks, before: ModelState, batch: object) -> None:
        self.objective, self.hooks, self.before, self.batch = objective, hooks, before, batch

    def loss(self, trial: Trial, context: AbstractContextManager[object]) -> Tensor:
        """The loss in a trial.

        Args:
            trial: what replaces outputs.
            context: in which the step runs.

        Returns:
            The loss.
        """
        self.before.restore()
        self.hooks.trial = trial
        try:
            with context:
                return self.objective.value(self.batch)
        finally:
            self.hooks.trial = None

    def gradients_beside(self, weights: Sequence[Tensor], rolled: bool) -> Sequence[Tensor | None] | None:
        """Gradients of weights by all other ways than the outputs of layers.

        Args:
            weights: parameters.
            rolled: whether the outputs are those of other samples.

        Returns:
            A gradient for each, or None where the step fails.
        """

        def cut(_: str, output: Tensor) -> Tensor:
            other = output.detach()
            return (other.roll(1, 0) if rolled and other.ndim else other).requires_grad_().clone()

        try:
            return gradients_of(self.loss(cut, torch.enable_grad()), weights)
        except Exception as error:  # a step may not run without the graph of what the layers compute
            if is_of_own_class(error):
                raise
            return None

    def derivatives(self) -> tuple[str, ...]:
        """What functions of torch take derivatives inside the loss."""
        spy = _Derivatives()
        self.loss(lambda *_: None, spy)
        return tuple(dict.fromkeys(spy.taken))

    def contradict(self, ray: Ray, before: float) -> bool:
        """Whether finite differences agree with each other, but not with a slope.

        Args:
            ray: along which weights move.
            before: the loss. Where a difference from it agrees with the slope, that is enough.

        Returns:
            True if the loss has another slope; not where rounding, or a loss that is drawn at random, hides it.
        """
        slope, dtype = ray.slope, ray.precision
        if not slope or dtype is None:
            return False
        found, allowed = list[float](), APART[dtype] * abs(slope)
        for amplitude in ray.amplitudes(dtype, before):
            losses, digits = [self._moved(ray, amplitude)], DIGITS * torch.finfo(dtype).eps
            is_clear = amplitude * abs(slope) >= digits * max(abs(before), abs(losses[0]))
            if is_clear and abs((losses[0] - before) / amplitude - slope) <= allowed:
                return False
            losses.append(self._moved(ray, -amplitude))
            if 2 * amplitude * abs(slope) < digits * max(map(abs, losses)):
                continue  # it would drown in rounding
            found.append((losses[0] - losses[1]) / (2 * amplitude))
            if abs(found[-1] - slope) <= allowed:
                return False
        return any(abs(a - b) <= allowed for a, b in combinations(found, 2))

    def _moved(self, ray: Ray, by: float) -> float:
        """The loss where weights have moved; infinite if it is not finite."""

        @contextmanager
        def moved() -> Iterator[None]:
            with torch.no_grad():
                tensors = {name: ray.weights[name] + by * direction for name, direction in ray.directions.items()}
                with replaced(self.objective.model, tensors):
                    yield

        try:
            return float(self.loss(lambda *_: None, moved()).detach())
        except NotFiniteError:
            return inf


class _Derivatives(TorchFunctionMode):
    """Notes functions that differentiate."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if func is torch.autograd.grad or func is torch.Tensor.backward or func is torch.autograd.backward:
            self.taken.append(f"torch.autograd.{name}")
        elif name == "_make_dual":
            self.taken.append("torch.autograd.forward_ad")
        return func(*args, **(kwargs or {}))
