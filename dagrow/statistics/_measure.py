"""One pass over batches that gathers moments."""

import time
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
from dagrow.statistics._batches import batch_count, mark_of
from dagrow.statistics._calls import Calls, joined_calls
from dagrow.statistics._captures import Capture, Writers
from dagrow.statistics._features import Feature
from dagrow.statistics._gradient_check import GradientCheck
from dagrow.statistics._groups import GroupNumbers
from dagrow.statistics._hooks import ForwardProbe, LayerHooks
from dagrow.statistics._kept_captures import KeptCaptures, LeftBatch
from dagrow.statistics._objective import Objective
from dagrow.statistics._sample_order import SampleOrder
from dagrow.statistics._trials import Trial

Place = tuple[str, str, int]  #: "input" or "output", the name of a layer, and which of its calls


def measure(
    dag: Dag,
    objective: Objective,
    pairs: Iterable[Pair],
    *,
    folds: int = 4,
    dtype: torch.dtype = torch.float64,
    read: Mapping[str, IndexMap] | None = None,
    written: Mapping[str, IndexMap] | None = None,
    units: Mapping[Writers, slice] | None = None,
    kept: KeptCaptures | None = None,
    preview: Iterable[Hashable] = (),
    later: Iterable[Feature] = (),
) -> Moments:
    """Runs the model on every batch, forward and back to pre-activations, and sums products of features.

    What does not fit is refused: samples that are not the first dimension, are fewer than folds or have other sizes
    than the example (BatchError), a model that takes another way than when it was traced (GrowthError), a loss that
    does not depend on the model, is not finite, or takes weights by another way than layers' outputs (LossError), and
    what would take too much memory or time (LimitError).

    Args:
        dag: the model's.
        objective: the loss and the batches.
        pairs: the features whose products are summed.
        folds: samples go round-robin into this many folds.
        dtype: of the sums; products over FLUSH_ROWS rows, or one batch, are taken in the activations' own. Those of
            convolutions are large and few, and are summed in their own type, which keeps memory small.
        read: layer -> which of its input channels are new, in a preview of a grown network.
        written: layer -> which of its output channels are.
        units: of the new units of an axis those that some producers write, where several previews are of that axis.
        kept: what earlier passes left, and what this one leaves; the model runs only where that is not enough.
        preview: what is in the network, besides what it is.
        later: features that later passes need.

    Returns:
        The moments; they know whether the model's own forward ran on every batch: a step may run its layers in another
        way.
    """
    kept, preview, pairs = kept or KeptCaptures(), frozenset(preview), list(pairs)
    known = batch_count(objective.batches, objective.max_batches)
    count, is_known = known or objective.max_batches, known is not None
    sums = MomentAccumulator(pairs, folds, dtype, objective.limits, count, is_known=is_known)
    found = kept.find(preview, sums.features)
    if found is not None:
        for batch in found:
            sums.take(batch)
        return sums.moments()
    try:
        hooks = CaptureHooks(dag, [*sums.features, *later], read or {}, written or {}, units)
        _Run(dag, objective, sums, [*sums.features, *later], kept, preview).through(hooks)
    except _OtherBatchesError:
        kept.drop()
        return measure(dag, objective, pairs, folds=folds, dtype=dtype, read=read, written=written, units=units)
    return sums.moments()


class _OtherBatchesError(Exception):
    """A loader gives other batches than in an earlier pass."""


@dataclass(frozen=True, eq=False)
class _Run:
    """One pass with the model."""

    dag: Dag
    objective: Objective
    sums: MomentAccumulator
    features: Sequence[Feature]
    kept: KeptCaptures
    preview: frozenset[Hashable]

    def through(self, hooks: "CaptureHooks") -> None:
        """Through all batches, one after the other."""
        objective = self.objective
        is_same = objective.mode == "eval" and all(p.requires_grad for p in objective.model.parameters())
        objective.probe(once=is_same)  # as it is measured once more, and frozen weights would be taken for trainable
        order, groups = SampleOrder.of(self.dag, objective), GroupNumbers(objective)
        check = GradientCheck(self.dag, objective, hooks, self.sums.pairs)
        known = self._known_goals(check)
        if known is not None:
            hooks.goals = set()
        record, last = self.kept.record(self.preview, self.features), 0.0
        with preserve_state(objective.model, objective.others), hooks, torch.inference_mode(False), torch.enable_grad():
            objective.model.train(objective.mode == "train")
            if hooks.input_goals:  # gradients reach activations behind weights that are frozen, too
                for parameter in objective.model.parameters():
                    parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
            for number, (batch, n) in enumerate(objective):
                units = groups.of(batch, n)
                with hooks.paused():
                    order.start(objective, batch, n, units)
                check.begin()
                with ForwardProbe(objective.model) as probe, torch.set_grad_enabled(known is None):
                    loss = objective.value(batch)
                with hooks.paused():
                    objective.check_first(batch, loss)
                own = float(loss.detach())
                value = own * objective.scale(n) * n
                with objective.noting(batch):
                    if known is None:
                        calls = hooks.captures(loss, -objective.scale(n) * n, ran=probe.ran)
                    else:
                        calls = hooks.with_goals(_calls_of(known[number:], batch, value), ran=probe.ran)
                del loss  # with all that its graph holds
                check.end(batch, calls, -objective.scale(n) * n, own)
                views = joined_calls(calls)
                with hooks.paused():
                    views = [order.arranged(view, objective, batch, n, units) for view in views]
                left = LeftBatch(calls, views, n, value, units, probe.ran, mark_of(batch))
                record.add(left)
                self.sums.take(left)
                del calls, views, left  # before the next batch runs
                if number == 1:  # the first one was looked at, too
                    objective.limits.check_pass(time.monotonic() - last, 2, self.sums.batches)
                last = time.monotonic()
        objective.others.complete = True
        objective.limits.passes += 1
        groups.check_all_read()
        record.ended = True

    def _known_goals(self, check: GradientCheck) -> Sequence[LeftBatch] | None:
        """Those of the network as it is, where a preview needs no others."""
        if not self.preview or check.watched or self.objective.mode != "eval":
            return None
        return self.kept.goals(self.features)


def _calls_of(known: Sequence[LeftBatch], batch: object, loss: float) -> Calls:
    """What a batch left in an earlier pass. Raises _OtherBatchesError if it is not the next of those."""
    if not known or not known[0].is_of(batch, loss):
        raise _OtherBatchesError
    return known[0].calls


class CaptureHooks(LayerHooks):
    """Keeps what layers read, and finds the goals there and at what they write.

    Attributes:
        goals, input_goals: layers at whose outputs and inputs goals are found.
        weights: parameters whose gradients are found beside them.
        weight_gradients: those of the last batch.
        trial: what is done instead, while a batch is tried.
    """

    def __init__(
        self,
        dag: Dag,
        features: Iterable[Feature],
        read: Mapping[str, IndexMap],
        written: Mapping[str, IndexMap],
        units: Mapping[Writers, slice] | None = None,
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
        self._units = units or {}
        self._calls: dict[str, list[Capture]] = defaultdict(list)
        self._is_paused = False
        self._hidden = False  #: whether a layer ran without a graph
        self._depends = False  #: whether the loss depends on weights, whatever reaches the goals
        self._runs_again: bool | None = None  #: whether layers may run in the backward pass too; not known before one
        self._ran_again = False  #: whether they did, in the last one
        self._arrived: dict[Place, Tensor] | None = None  #: gradients in a backward pass, while it runs

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
        if self.trial is not None:
            return self.trial(name, output)
        if self._is_paused:
            return None
        if self._arrived is not None:
            self._ran_again = True
            self._watch(self._edges(name, inputs, output))
            return None
        if torch._C._functorch.is_functorch_wrapped_tensor(output):
            raise LossError(
                f"the loss or step runs {name} inside a transform of torch.func (vmap, grad, jvp, ...), where tensors "
                "exist for its time alone. Call the model itself, on a whole batch: model(inputs)."
            )
        detached = inputs.detach() if inputs.layout is torch.strided else inputs.detach().to_dense()
        capture = Capture(*self._layers[name], detached, detached._version, output.shape, units=self._units)
        self._calls[name].append(capture)
        self._hidden = self._hidden or not torch.is_grad_enabled()
        edges = self._edges(name, inputs, output)
        capture.input_gradient, capture.output_gradient = edges.get(("input", name, 0)), edges.get(("output", name, 0))
        if output.requires_grad:
            return None
        if name not in self.goals:
            return None
        leaf = output.detach().requires_grad_()
        capture.output_gradient = get_gradient_edge(leaf)
        return leaf.clone()  # what follows may work in place, which leaves do not allow

    def _edges(self, name: str, inputs: Tensor, output: Tensor) -> dict[Place, GradientEdge]:
        """Where autograd finds the gradients that goals are made of."""
        wanted = {("input", name, 0): inputs} if name in self.input_goals else {}
        wanted["output", name, 0] = output
        return {place: get_gradient_edge(tensor) for place, tensor in wanted.items() if tensor.requires_grad}

    def captures(self, loss: Tensor, scale: float, *, ran: bool = False) -> dict[str, list[Capture]]:
        """What the batch left, with its goals, which are found by one backward pass.

        Args:
            loss: of the batch.
            scale: from its gradient to the goals of single samples.
            ran: whether the model's own forward ran.

        Returns:
            Layer -> what each of its calls left there.

        Raises:
            GrowthError: some layers did not run.
            LossError: none of them ran.
        """
        calls = self._ran(ran)
        gradients = self._gradients(loss, calls)
        self._depends = self._depends or any(gradient is not None for gradient in self.weight_gradients)
        if (self.goals or self.input_goals) and not (gradients or self._depends):
            raise LossError(
                "the loss does not depend on the model: no gradient reaches its layers. Compute it from the model's "
                "output, without detach(), item() or torch.no_grad()."
            )
        for name, captures in calls.items():
            for call, capture in enumerate(captures):
                goals = {side: gradients.get((side, name, call)) for side in ("input", "output")}
                at_input, at_output = (None if goal is None else goal.detach() * scale for goal in goals.values())
                capture.seen = at_output is not None
                if name in self.goals or len(captures) > 1:
                    zero = capture.inputs.new_zeros(capture.output_shape)
                    capture.output_goal = zero if at_output is None else at_output
                if name in self.input_goals:
                    capture.input_goal = torch.zeros_like(capture.inputs) if at_input is None else at_input
                capture.output_gradient = capture.input_gradient = None  # nor do they hold on to the graph
        return calls

    def with_goals(self, known: Calls, *, ran: bool) -> dict[str, list[Capture]]:
        """What the batch left, with goals that are known.

        Args:
            known: what it left in the network as it is, where each layer was called once.
            ran: whether the model's own forward ran.

        Returns:
            Layer -> what its call left there.

        Raises:
            GrowthError, LossError: as for :meth:`captures`.
        """
        calls = self._ran(ran)
        for name, captures in calls.items():
            for capture, before in zip(captures, known.get(name, ()), strict=False):
                capture.output_goal, capture.output_map = before.output_goal, before.output_map
        return calls

    def _ran(self, ran: bool) -> dict[str, list[Capture]]:
        """Layer -> its calls. Raises GrowthError or LossError if there are none."""
        missing = set(self._layers) - set(self._calls)
        if missing and not self._calls and not ran:
            raise LossError(
                f"the loss does not depend on the model where it is measured: {', '.join(sorted(missing))} did not "
                "run. Call the model itself in it."
            )
        if missing:
            raise GrowthError(
                f"{', '.join(sorted(missing))} did not run on a batch; "
                "the model takes another way than when it was traced."
            )
        return {name: self._calls.pop(name) for name in sorted(self._layers)}

    def _gradients(self, loss: Tensor, calls: Mapping[str, Sequence[Capture]]) -> dict[Place, Tensor]:
        """Those that arrive; notes those of weights. Layers that run again meanwhile leave nothing else."""
        several = any(len(captures) > 1 for captures in calls.values())  # of which those count that the loss sees
        edges = dict[Place, GradientEdge]()
        for name, captures in calls.items():
            for call, capture in enumerate(captures):
                if name in self.input_goals and capture.input_gradient is not None:
                    edges["input", name, call] = capture.input_gradient
                if (several or name in self.goals) and capture.output_gradient is not None:
                    edges["output", name, call] = capture.output_gradient
        if self._runs_again is None:
            self._runs_again = bool(edges) and runs_again(loss, self._hidden)
        self._arrived, self._ran_again = {}, False
        try:
            if self._runs_again:
                self._watch(edges)
                run_backward(loss, self.model)
                if self._ran_again and several:
                    raise LossError(
                        "the model is called several times in a step, and runs layers again in the backward pass (a "
                        "checkpoint with use_reentrant=True), so that nobody knows which call runs again. Let it call "
                        "torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
                    )
                self.weight_gradients = [weight.grad for weight in self.weights]
                for parameter in self.model.parameters():
                    parameter.grad = None
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
