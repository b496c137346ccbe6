"""One pass over batches that gathers moments."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from dagrow._model_state import preserve_state
from dagrow.axes import IndexMap
from dagrow.errors import GrowthError, LossError
from dagrow.graph import Dag
from dagrow.solvers import Moments, Pair
from dagrow.statistics._accumulator import MomentAccumulator
from dagrow.statistics._backward import gradients_at, run_backward, runs_again, watch
from dagrow.statistics._captures import Batch, Capture
from dagrow.statistics._features import Feature
from dagrow.statistics._gradient_check import GradientCheck
from dagrow.statistics._hooks import ForwardProbe, LayerHooks
from dagrow.statistics._objective import Objective
from dagrow.statistics._trials import Trial

Place = tuple[str, str]  #: "input" or "output", and the name of a layer


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
    does not depend on the model, is not finite, or takes weights by another way than layers' outputs (LossError).

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
    check = GradientCheck(dag, objective, hooks, sums.pairs)
    with preserve_state(objective.model), hooks, torch.inference_mode(False), torch.enable_grad():
        objective.model.train(objective.mode == "train")
        if hooks.input_goals:  # gradients reach activations behind weights that are frozen, too
            for parameter in objective.model.parameters():
                parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
        for batch, n in objective:
            check.begin()
            with ForwardProbe(objective.model) as probe:
                loss = objective.value(batch)
            forward = forward and probe.ran
            captures = hooks.captures(loss, -objective.scale(n) * n)
            value = float(loss.detach()) * objective.scale(n) * n
            del loss  # with all that its graph holds
            check.end(batch, captures, n, -objective.scale(n) * n)
            sums.add(Batch(captures, n, seen, folds), value)
            del captures
            seen += n
    return sums.moments(forward)


class CaptureHooks(LayerHooks):
    """Keeps what layers read, and finds the goals there and at what they write.

    Attributes:
        goals, input_goals: layers at whose outputs and inputs goals are found.
        weights: parameters whose gradients are found beside them.
        weight_gradients: those of the last batch.
        trial: what is done instead, while a batch is tried.
    """

    def __init__(
        self, dag: Dag, features: Iterable[Feature], read: Mapping[str, IndexMap], written: Mapping[str, IndexMap]
    ) -> None:
        features = list(features)
        layers = [dag.layer(name) for name in sorted({edge for feature in features for edge in feature.edges})]
        super().__init__(dag.model, layers, self._capture)
        self.model = dag.model
        self.goals = {edge for feature in features for edge in feature.goals}
        self.input_goals = {edge for feature in features for edge in feature.input_goals}
        self.weights: Sequence[Tensor] = ()
        self.weight_gradients: Sequence[Tensor | None] = ()
        self.trial: Trial | None = None
        self._layers = {
            layer.name: (layer.module, layer.rule, read.get(layer.name), written.get(layer.name)) for layer in layers
        }
        self._captures: dict[str, Capture] = {}
        self._hidden = False  #: whether a layer ran without a graph
        self._depends = False  #: whether the loss depends on weights, whatever reaches the goals
        self._runs_again: bool | None = None  #: whether layers run in the backward pass too; not known before one
        self._arrived: dict[Place, Tensor] | None = None  #: gradients in a backward pass, while it runs

    def remove(self) -> None:
        super().remove()
        self._captures = {}

    def _capture(self, name: str, inputs: Tensor, output: Tensor) -> Tensor | None:
        if self.trial is not None:
            return self.trial(name, output)
        if self._arrived is not None:
            self._watch(self._edges(name, inputs, output))
            return None
        if torch._C._functorch.is_functorch_wrapped_tensor(output):
            raise LossError(
                f"the loss or step runs {name} inside a transform of torch.func (vmap, grad, jvp, ...), where tensors "
                "exist for its time alone. Call the model itself, on a whole batch: model(inputs)."
            )
        if name in self._captures:
            raise GrowthError(
                f"{name} ran twice on a batch, but once when the model was traced. Call the model once in a step; "
                "if the model calls it more often for more samples, as where it cuts a batch into chunks, give batches "
                "as small as the example; if the model itself has changed, trace it again."
            )
        detached = inputs.detach() if inputs.layout is torch.strided else inputs.detach().to_dense()
        capture = Capture(*self._layers[name], detached, detached._version, output.shape)
        self._captures[name] = capture
        self._hidden = self._hidden or not torch.is_grad_enabled()
        edges = self._edges(name, inputs, output)
        capture.input_gradient, capture.output_gradient = edges.get(("input", name)), edges.get(("output", name))
        if name not in self.goals:
            return None
        if output.requires_grad:
            return None
        leaf = output.detach().requires_grad_()
        capture.output_gradient = get_gradient_edge(leaf)
        return leaf.clone()  # what follows may work in place, which leaves do not allow

    def _edges(self, name: str, inputs: Tensor, output: Tensor) -> dict[Place, GradientEdge]:
        """Where autograd finds the gradients that goals are made of."""
        places = {("input", name): (inputs, self.input_goals), ("output", name): (output, self.goals)}
        return {
            place: get_gradient_edge(tensor)
            for place, (tensor, names) in places.items()
            if name in names and tensor.requires_grad
        }

    def captures(self, loss: Tensor, scale: float) -> dict[str, Capture]:
        """What the batch left, with its goals, which are found by one backward pass.

        Args:
            loss: of the batch.
            scale: from its gradient to the goals of single samples.

        Returns:
            Layer -> what was left there.

        Raises:
            GrowthError: some layers did not run.
            LossError: none of them ran.
        """
        missing = set(self._layers) - set(self._captures)
        if missing and not self._captures:
            raise LossError("the loss does not depend on the model: none of its layers ran. Call the model in it.")
        if missing:
            raise GrowthError(
                f"{', '.join(sorted(missing))} did not run on a batch; "
                "the model takes another way than when it was traced."
            )
        captures, self._captures = self._captures, {}
        if not (self.goals or self.input_goals):
            return captures
        gradients = self._gradients(loss, captures)
        for capture in captures.values():  # nor do they hold on to the graph
            capture.output_gradient = capture.input_gradient = None
        self._depends = self._depends or any(gradient is not None for gradient in self.weight_gradients)
        if not (gradients or self._depends):
            raise LossError(
                "the loss does not depend on the model: no gradient reaches its layers. Compute it from the model's "
                "output, without detach(), item() or torch.no_grad()."
            )
        for name in self.goals:
            gradient = gradients.get(("output", name))
            zero = captures[name].inputs.new_zeros(captures[name].output_shape)
            captures[name].output_goal = zero if gradient is None else gradient.detach() * scale
        for name in self.input_goals:
            gradient = gradients.get(("input", name))
            zero = torch.zeros_like(captures[name].inputs)
            captures[name].input_goal = zero if gradient is None else gradient.detach() * scale
        return captures

    def _gradients(self, loss: Tensor, captures: Mapping[str, Capture]) -> dict[Place, Tensor]:
        """Those that arrive; notes those of weights. Layers that run again meanwhile leave nothing else."""
        ends = {("input", name): captures[name].input_gradient for name in sorted(self.input_goals)}
        ends |= {("output", name): captures[name].output_gradient for name in sorted(self.goals)}
        edges = {place: edge for place, edge in ends.items() if edge is not None}
        if self._runs_again is None:
            self._runs_again = runs_again(loss, self._hidden)
        self._arrived = {}
        try:
            if self._runs_again:
                self._watch(edges)
                run_backward(loss, self.model)
                self.weight_gradients = [weight.grad for weight in self.weights]
                self.model.zero_grad(set_to_none=True)
            else:
                found = gradients_at(loss, [*edges.values()], self.weights)
                self.weight_gradients = found[len(edges) :]
                arrived = zip(edges, found, strict=False)
                self._arrived = {place: gradient for place, gradient in arrived if gradient is not None}
            return self._arrived
        finally:
            self._arrived = None

    def _watch(self, edges: Mapping[Place, GradientEdge]) -> None:
        assert self._arrived is not None
        for place, edge in edges.items():
            watch(edge, partial(self._arrived.__setitem__, place))
