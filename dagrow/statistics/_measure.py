"""One pass over batches that gathers moments."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from dagrow._model_state import preserve_state
from dagrow.axes import IndexMap
from dagrow.errors import GrowthError, LossError
from dagrow.graph import Dag
from dagrow.solvers import Moments, Pair
from dagrow.statistics._accumulator import MomentAccumulator
from dagrow.statistics._captures import Batch, Capture
from dagrow.statistics._features import Feature
from dagrow.statistics._hooks import ForwardProbe, LayerHooks
from dagrow.statistics._objective import Objective


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
    hooks = CaptureHooks(dag, sums.features, read or {}, written or {})
    with preserve_state(objective.model), hooks, torch.inference_mode(False), torch.enable_grad():
        objective.model.train(objective.mode == "train")
        if hooks.input_goals:  # gradients reach activations behind weights that are frozen, too
            for parameter in objective.model.parameters():
                parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
        for batch, n in objective:
            with ForwardProbe(objective.model) as probe:
                loss = objective.value(batch)
            forward = forward and probe.ran
            captures = hooks.captures(loss, -objective.scale(n) * n, ran=probe.ran)
            value = float(loss.detach()) * objective.scale(n) * n
            del loss  # with all that its graph holds
            sums.add(Batch(captures, n, seen, folds), value)
            del captures
            seen += n
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
        self._captures: dict[str, Capture] = {}

    def remove(self) -> None:
        super().remove()
        self._captures = {}

    def _capture(self, name: str, inputs: Tensor, output: Tensor) -> Tensor | None:
        if name in self._captures:
            raise GrowthError(
                f"{name} ran twice on a batch, but once when the model was traced. Call the model once in a step; "
                "if the model calls it more often for more samples, as where it cuts a batch into chunks, give batches "
                "as small as the example; if the model itself has changed, trace it again."
            )
        detached = inputs.detach() if inputs.layout is torch.strided else inputs.detach().to_dense()
        capture = Capture(*self._layers[name], detached, detached._version, output.shape)
        self._captures[name] = capture
        if name in self.input_goals and inputs.requires_grad:
            capture.input_gradient = get_gradient_edge(inputs)
        if name not in self.goals:
            return None
        if output.requires_grad:
            capture.output_gradient = get_gradient_edge(output)
            return None
        leaf = output.detach().requires_grad_()
        capture.output_gradient = get_gradient_edge(leaf)
        return leaf.clone()  # what follows may work in place, which leaves do not allow

    def captures(self, loss: Tensor, scale: float, *, ran: bool = False) -> dict[str, Capture]:
        """What the batch left, with its goals, which are found by one backward pass.

        Args:
            loss: of the batch.
            scale: from its gradient to the goals of single samples.
            ran: whether the model's own forward ran.

        Returns:
            Layer -> what was left there.

        Raises:
            GrowthError: some layers did not run.
            LossError: none of them ran.
        """
        missing = set(self._layers) - set(self._captures)
        if missing and not self._captures and not ran:
            raise LossError("the loss does not depend on the model: none of its layers ran. Call the model in it.")
        if missing:
            raise GrowthError(
                f"{', '.join(sorted(missing))} did not run on a batch; "
                "the model takes another way than when it was traced."
            )
        captures, self._captures = self._captures, {}
        outputs = [captures[name] for name in sorted(self.goals)]
        inputs = [captures[name] for name in sorted(self.input_goals)]
        reached = [capture for capture in inputs if capture.input_gradient is not None]
        ends = [*(capture.output_gradient for capture in outputs), *(capture.input_gradient for capture in reached)]
        gradients = _gradients(loss, [end for end in ends if end is not None])
        for capture, gradient in zip(outputs, gradients, strict=False):
            goal = capture.inputs.new_zeros(capture.output_shape) if gradient is None else gradient.detach() * scale
            capture.output_goal = goal
        for capture in inputs:  # unless a gradient arrives
            capture.input_goal = torch.zeros_like(capture.inputs)
        for capture, gradient in zip(reached, gradients[len(outputs) :], strict=True):
            if gradient is not None:
                capture.input_goal = gradient.detach() * scale
        return captures


def _gradients(loss: Tensor, ends: Sequence[GradientEdge]) -> Sequence[Tensor | None]:
    if not ends:
        return ()
    try:
        gradients = torch.autograd.grad(loss, ends, allow_unused=True) if loss.requires_grad else ()
    except RuntimeError as error:
        raise LossError(
            f"the loss has no gradient ({error}). It must be differentiable, and targets of the type of the outputs "
            "where the loss compares them."
        ) from error
    if all(gradient is None for gradient in gradients):
        raise LossError(
            "the loss does not depend on the model: no gradient reaches its layers. Compute it from the model's "
            "output, without detach(), item() or torch.no_grad()."
        )
    return gradients
