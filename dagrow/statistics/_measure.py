"""One pass over batches that gathers moments."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from dagrow._model_state import preserve_state
from dagrow.axes import IndexMap
from dagrow.errors import BatchError, GrowthError, LossError
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
    preview: Mapping[str, Tensor] | None = None,
    read: Mapping[str, IndexMap] | None = None,
    written: Mapping[str, IndexMap] | None = None,
) -> Moments:
    """One pass over the batches.

    Args:
        pairs: what to measure.
        folds: samples go round-robin into this many folds.
        dtype: accumulators' type; products over FLUSH_ROWS rows, or one batch, are taken in the activations' own.
            Those of convolutions are large and few, and are summed in their own type, which keeps memory small.
        preview: parameters and buffers to replace, for a look at a grown network.
        read, written: layer -> which of its input and output channels are new in the preview.
    """
    sums = MomentAccumulator(pairs, folds, dtype)
    features = {f for pair in sums.pairs for f in pair}
    forward = _pass(dag, objective, features, folds, sums.add, preview, read or {}, written or {})
    return sums.moments(forward)


def collect(dag: Dag, objective: Objective, features: Iterable[Feature]) -> dict[Feature, Tensor]:
    """The rows of features by sample ``[n, s, d]`` in float64, kept whole, from one pass over the batches.

    Raises:
        BatchError: samples of different batches have different numbers of positions.
    """
    parts: dict[Feature, list[Tensor]] = {feature: [] for feature in features}

    def keep(batch: Batch, loss: float) -> None:
        for feature, found in parts.items():
            rows = feature.rows(batch).double()
            found.append(rows.view(batch.samples, -1, rows.shape[1]))

    _pass(dag, objective, parts, 1, keep, None, {}, {})
    for feature, found in parts.items():
        sizes = sorted({part.shape[1] for part in found})
        if len(sizes) > 1:
            raise BatchError(
                f"layer {', '.join(feature.edges)} has {' or '.join(map(str, sizes))} positions in a sample, from "
                "batch to batch; give batches of samples of one size."
            )
    return {feature: torch.cat(found) for feature, found in parts.items()}


def _pass(
    dag: Dag,
    objective: Objective,
    features: Iterable[Feature],
    folds: int,
    take: Callable[[Batch, float], None],
    preview: Mapping[str, Tensor] | None,
    read: Mapping[str, IndexMap],
    written: Mapping[str, IndexMap],
) -> bool:
    """Runs the model on every batch, forward and back to pre-activations, and hands over what it leaves at layers.

    Returns whether the model's own forward ran on every batch: a step may run its layers in another way.
    """
    objective.probe()
    watch, seen, forward = _BatchHooks(dag, features, read, written), 0, True
    with preserve_state(objective.model), watch, torch.inference_mode(False), torch.enable_grad():
        objective.model.train(objective.mode == "train")
        if watch.wishes:  # gradients reach activations behind weights that are frozen, too
            for parameter in objective.model.parameters():
                parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
        for batch, n in objective:
            with ForwardProbe(objective.model) as entered:
                loss = objective.value(batch, preview)
            forward = forward and entered.ran
            captures = watch.harvest(loss, -objective.scale(n) * n)
            value = float(loss.detach()) * objective.scale(n) * n
            del loss  # with all that its graph holds
            take(Batch(captures, n, seen, folds), value)
            del captures
            seen += n
    return forward


class _BatchHooks(LayerHooks):
    """Catches what layers read and the goals at what they write."""

    def __init__(
        self, dag: Dag, features: Iterable[Feature], read: Mapping[str, IndexMap], written: Mapping[str, IndexMap]
    ) -> None:
        features = list(features)
        layers = [dag.layer(name) for name in sorted({edge for feature in features for edge in feature.edges})]
        super().__init__(dag.model, layers, self.caught)
        self.goals = {edge for feature in features for edge in feature.goals}
        self.wishes = {edge for feature in features for edge in feature.wishes}
        self.watched = {
            layer.name: (layer.module, layer.rule, read.get(layer.name), written.get(layer.name)) for layer in layers
        }
        self.found: dict[str, Capture] = {}

    def remove(self) -> None:
        super().remove()
        self.found = {}

    def caught(self, name: str, inputs: Tensor, output: Tensor) -> Tensor | None:
        if name in self.found:
            raise GrowthError(
                f"{name} ran twice on a batch, but once when the model was traced. Call the model once in a step; "
                "if the model itself has changed, trace it again."
            )
        source, inputs = inputs, inputs.detach()
        self.found[name] = Capture(*self.watched[name], inputs, inputs._version, output.shape)
        if name in self.wishes and source.requires_grad:
            self.found[name].arrived = get_gradient_edge(source)
        if name not in self.goals:
            return None
        if not output.requires_grad:
            leaf = output.detach().requires_grad_()
            self.found[name].written = get_gradient_edge(leaf)
            return leaf.clone()  # what follows may work in place, which leaves do not allow
        self.found[name].written = get_gradient_edge(output)
        return None

    def harvest(self, loss: Tensor, scale: float) -> dict[str, Capture]:
        """Goals by one backward pass. ``scale`` turns the gradient of the batch's loss into per-sample goals."""
        missing = set(self.watched) - set(self.found)
        if missing and not self.found:
            raise LossError("the loss does not depend on the model: none of its layers ran. Call the model in it.")
        if missing:
            raise GrowthError(
                f"{', '.join(sorted(missing))} did not run on a batch; "
                "the model takes another way than when it was traced."
            )
        for name in self.wishes:  # unless a gradient arrives
            self.found[name].wish = torch.zeros_like(self.found[name].inputs)
        goals = [self.found[name] for name in sorted(self.goals)]
        wishes = [self.found[name] for name in sorted(self.wishes) if self.found[name].arrived is not None]
        ends = [*(capture.written for capture in goals), *(capture.arrived for capture in wishes)]
        gradients = _gradients(loss, [end for end in ends if end is not None])
        for capture, gradient in zip(goals, gradients, strict=False):
            capture.goal = capture.inputs.new_zeros(capture.shape) if gradient is None else gradient.detach() * scale
        for capture, gradient in zip(wishes, gradients[len(goals) :], strict=True):
            capture.wish = capture.wish if gradient is None else gradient.detach() * scale
        found, self.found = self.found, {}
        return found


def _gradients(loss: Tensor, outputs: Sequence[GradientEdge]) -> Sequence[Tensor | None]:
    if not outputs:
        return ()
    try:
        gradients = torch.autograd.grad(loss, outputs, allow_unused=True) if loss.requires_grad else ()
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
