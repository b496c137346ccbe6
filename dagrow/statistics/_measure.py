"""One pass over batches that gathers moments."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from dagrow._model_state import preserve_state
from dagrow.axes import IndexMap
from dagrow.errors import GrowthError, LossError
from dagrow.graph import Dag
from dagrow.solvers import Moments, Pair
from dagrow.statistics._accumulator import MomentAccumulator
from dagrow.statistics._calls import joined_calls
from dagrow.statistics._captures import Batch, Capture
from dagrow.statistics._features import Feature
from dagrow.statistics._groups import GroupNumbers
from dagrow.statistics._hooks import ForwardProbe, LayerHooks
from dagrow.statistics._objective import Objective
from dagrow.statistics._sample_order import SampleOrder


def measure(
    dag: Dag,
    objective: Objective,
    pairs: Iterable[Pair],
    *,
    folds: int = 4,
    dtype: torch.dtype = torch.float64,
    read: Mapping[str, IndexMap] | None = None,
    written: Mapping[str, IndexMap] | None = None,
) -> Moments:
    """Runs the model on every batch, forward and back to pre-activations, and sums products of features.

    What does not fit is refused: samples that are not the first dimension, are fewer than folds or have other sizes
    than the example (BatchError), a model that takes another way than when it was traced (GrowthError), a loss that
    does not depend on the model or is not finite (LossError).

    Args:
        dag: the model's.
        objective: the loss and the batches.
        pairs: the features whose products are summed.
        folds: samples go round-robin into this many folds.
        dtype: of the sums; products over FLUSH_ROWS rows, or one batch, are taken in the activations' own. Those of
            convolutions are large and few, and are summed in their own type, which keeps memory small.
        read: layer -> which of its input channels are new, in a preview of a grown network.
        written: layer -> which of its output channels are.

    Returns:
        The moments; they know whether the model's own forward ran on every batch: a step may run its layers in another
        way.
    """
    sums, seen, forward = MomentAccumulator(pairs, folds, dtype), 0, True
    objective.probe()
    order, groups = SampleOrder.of(dag, objective), GroupNumbers(objective)
    hooks = CaptureHooks(dag, sums.features, read or {}, written or {})
    with preserve_state(objective.model), hooks, torch.inference_mode(False), torch.enable_grad():
        objective.model.train(objective.mode == "train")
        if hooks.input_goals:  # gradients reach activations behind weights that are frozen, too
            for parameter in objective.model.parameters():
                parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
        for batch, n in objective:
            units = groups.of(batch, n)
            with hooks.paused():
                order.start(objective, batch, n, units)
            with ForwardProbe(objective.model) as probe:
                loss = objective.value(batch)
            forward = forward and probe.ran
            with objective.noting(batch):
                calls = hooks.captures(loss, -objective.scale(n) * n)
            value = float(loss.detach()) * objective.scale(n) * n
            del loss  # with all that its graph holds
            views = joined_calls(calls)
            with hooks.paused():
                views = [order.arranged(view, objective, batch, n, units) for view in views]
            sums.add([Batch(view, n, seen, folds) for view in views], value, units)
            del calls, views
            seen += n
    groups.check_all_read()
    return sums.moments(forward)


class CaptureHooks(LayerHooks):
    """Keeps what layers read, and finds the goals there and at what they write."""

    def __init__(
        self, dag: Dag, features: Iterable[Feature], read: Mapping[str, IndexMap], written: Mapping[str, IndexMap]
    ) -> None:
        features = list(features)
        layers = [dag.layer(name) for name in sorted({edge for feature in features for edge in feature.edges})]
        super().__init__(dag.model, layers, self._capture)
        self.goals = {edge for feature in features for edge in feature.goals}
        self.input_goals = {edge for feature in features for edge in feature.input_goals}
        self._layers = {
            layer.name: (layer.module, layer.rule, read.get(layer.name), written.get(layer.name)) for layer in layers
        }
        self._calls: dict[str, list[Capture]] = defaultdict(list)
        self._is_paused = False

    def remove(self) -> None:
        super().remove()
        self._calls.clear()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing is kept inside."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    def _capture(self, name: str, inputs: Tensor, output: Tensor) -> Tensor | None:
        if self._is_paused:
            return None
        detached = inputs.detach() if inputs.layout is torch.strided else inputs.detach().to_dense()
        capture = Capture(*self._layers[name], detached, detached._version, output.shape)
        self._calls[name].append(capture)
        if name in self.input_goals and inputs.requires_grad:
            capture.input_gradient = get_gradient_edge(inputs)
        if output.requires_grad:
            capture.output_gradient = get_gradient_edge(output)
            return None
        if name not in self.goals:
            return None
        leaf = output.detach().requires_grad_()
        capture.output_gradient = get_gradient_edge(leaf)
        return leaf.clone()  # what follows may work in place, which leaves do not allow

    def captures(self, loss: Tensor, scale: float) -> dict[str, list[Capture]]:
        """What the batch left, with its goals, which are found by one backward pass.

        Args:
            loss: of the batch.
            scale: from its gradient to the goals of single samples.

        Returns:
            Layer -> what each of its calls left there.

        Raises:
            GrowthError: some layers did not run.
            LossError: none of them ran.
        """
        missing = set(self._layers) - set(self._calls)
        if missing and not self._calls:
            raise LossError("the loss does not depend on the model: none of its layers ran. Call the model in it.")
        if missing:
            raise GrowthError(
                f"{', '.join(sorted(missing))} did not run on a batch; "
                "the model takes another way than when it was traced."
            )
        calls = {name: self._calls.pop(name) for name in sorted(self._layers)}
        several = any(len(captures) > 1 for captures in calls.values())  # of which those count that the loss sees
        outputs = [each for name in calls if several or name in self.goals for each in calls[name]]
        inputs = [each for name in sorted(self.input_goals) for each in calls[name]]
        ends = [*(each.output_gradient for each in outputs), *(each.input_gradient for each in inputs)]
        gradients = _gradients(loss, ends, required=bool(self.goals or self.input_goals))
        for capture, gradient in zip(outputs, gradients, strict=False):
            capture.seen = gradient is not None
            goal = capture.inputs.new_zeros(capture.output_shape) if gradient is None else gradient.detach() * scale
            capture.output_goal = goal
        for capture, gradient in zip(inputs, gradients[len(outputs) :], strict=True):
            capture.input_goal = torch.zeros_like(capture.inputs) if gradient is None else gradient.detach() * scale
        return calls


def _gradients(loss: Tensor, ends: Sequence[GradientEdge | None], required: bool) -> Sequence[Tensor | None]:
    """The gradient at each end; None where none arrives."""
    some = [end for end in ends if end is not None]
    if not ends:
        return ()
    found = torch.autograd.grad(loss, some, allow_unused=True) if some and loss.requires_grad else ()
    if required and all(gradient is None for gradient in found):
        raise LossError(
            "the loss does not depend on the model: no gradient reaches its layers. Compute it from the model's "
            "output, without detach(), item() or torch.no_grad()."
        )
    gradients = iter(found)
    return [None if end is None else next(gradients, None) for end in ends]
