"""Every layer's rows brought into the order of samples, and a warning where samples do not stay apart."""

import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from dagrow._model_state import preserve_state
from dagrow.errors import BatchError
from dagrow.graph import Dag
from dagrow.statistics._batches import is_of_own_class
from dagrow.statistics._captures import Capture
from dagrow.statistics._hooks import LayerHooks
from dagrow.statistics._objective import Objective
from dagrow.statistics._sample_layout import Replacement, SampleLayout, first_samples, layout_of, rows_changed

PART = 16  #: samples that are enough to look at, where nothing is unusual
OUTPUT, SLOPE = "", "."  #: the model's output, and the loss's slope there, among the names of layers
Seen = dict[str, list[tuple[Tensor, int]]]  #: layer -> what each call read, and the dimension of its channels
_orders: "WeakKeyDictionary[Objective, SampleOrder]" = WeakKeyDictionary()


class SampleOrder:
    """Where samples lie at each layer, as it is found with the first batch that shows it.

    Args:
        dag: the model's.
        batch_dim: where they lie in the batches.
    """

    def __init__(self, dag: Dag, batch_dim: int) -> None:
        self.dag, self.batch_dim = dag, batch_dim
        self.layouts: dict[tuple[str, tuple[int, ...]], SampleLayout] = {}
        self.batch: object = None  #: that was looked at just now
        self.changes: dict[str, list[Tensor]] = {}  #: layer -> the rows of each call that one sample changes
        self.allowed = torch.zeros(0, dtype=torch.bool)
        self.started = self.warned = False

    @classmethod
    def of(cls, dag: Dag, objective: Objective) -> "SampleOrder":
        """The same for every pass over an objective's batches."""
        if objective not in _orders:
            _orders[objective] = cls(dag, objective.batch_dim)
        return _orders[objective]

    def start(self, objective: Objective, batch: object, n: int, units: Tensor | None) -> None:
        """Looks at a batch before it is measured, if none was looked at yet.

        Args:
            objective: the loss.
            batch: n samples.
            n: their number.
            units: the number of the group that each is of.
        """
        if self.started or _is_one(n, units):
            return
        self.started = True
        if units is None and _same_target(batch, n, self.batch_dim):
            self._warn(f"all {n} samples of a batch have the same target")
        if n <= 2 * PART or not self._is_plain(objective, batch, n):
            self.look(objective, batch, n, units)

    def _is_plain(self, objective: Objective, batch: object, n: int) -> bool:
        """Whether a part of a batch shows that samples come first everywhere; if it does not, that says nothing."""
        part = first_samples(batch, n, PART, self.batch_dim)
        try:
            reasons = self._reasons(objective, part, PART, torch.arange(PART))
        except Exception as error:  # the user's step may refuse batches of other sizes
            if is_of_own_class(error):
                raise
            return False
        found = {layout_of(changed, PART, self.allowed, 0) for calls in self.changes.values() for changed in calls}
        once = all(len(calls) == 1 for calls in self.changes.values())
        if reasons or not once or found != {SampleLayout()}:
            return False
        self.layouts = {(name, (0,)): SampleLayout() for name in self.changes}
        return True

    def look(self, objective: Objective, batch: object, n: int, units: Tensor | None) -> None:
        """Finds out which rows change with one sample, and warns. No hooks of others may be at work.

        Args:
            objective: the loss.
            batch: n samples.
            n: their number.
            units: the number of the group that each is of; what one changes in its own group is expected.
        """
        self.batch = batch
        for reason in self._reasons(objective, batch, n, torch.arange(n) if units is None else units):
            self._warn(reason)

    def _reasons(self, objective: Objective, batch: object, n: int, units: Tensor) -> list[str]:
        """Notes what changes with one sample, and says how samples meet, if they do."""
        self.changes = {}
        replacement = Replacement.of(batch, n, self.batch_dim)
        if replacement is None:
            return []
        self.allowed = units == units[replacement.sample]
        try:
            after = self._run(objective, replacement.batch)
        except Exception as error:  # a batch that the user's step would never get
            if is_of_own_class(error):
                raise
            return []
        try:
            before = self._run(objective, batch)
        except torch.OutOfMemoryError:  # what two runs read does not fit
            return []
        slopes = [each for seen in (before, after) for each, _ in seen.pop(SLOPE, [])]
        self.changes = {name: _changed(before[name], calls) for name, calls in after.items() if name in before}
        for changed in self.changes.pop(OUTPUT, []):
            layout = layout_of(changed, n, self.allowed, self.batch_dim)
            if layout is None:
                return [_apart(n, "the model's output")]
            if len(slopes) == 2 and objective.reduction != "batch" and self._mixes(layout, *slopes):
                return [_apart(n, "what the loss asks of the model's output")]
        return []

    def _mixes(self, layout: SampleLayout, before: Tensor, after: Tensor) -> bool:
        """Whether the loss's slopes at other samples change with one, by more than a common factor."""
        # such a factor has a mean over what only some samples have, as tokens that are not padding
        if before.shape != after.shape or not before.is_floating_point():
            return False
        owner = torch.arange(before.shape[layout.dim]) // layout.inner % len(self.allowed)
        others = torch.nonzero(~self.allowed[owner]).flatten().to(before.device)
        old, new = (slope.double().index_select(layout.dim, others) for slope in (before, after))
        energy = float(old.square().sum())
        if not energy:
            return False
        off = (new - old * (float((old * new).sum()) / energy)).abs().max()
        return float(off) > max(1e-6, 32 * torch.finfo(before.dtype).eps) * float(old.abs().max())

    def _run(self, objective: Objective, batch: object) -> Seen:
        """What layers read in eval mode, and what the model returns, where it is called once."""
        seen: Seen = defaultdict(list)

        def note(name: str, inputs: Tensor, _: Tensor) -> None:
            dim = layers[name].rule.channel_dim(inputs.ndim)
            if dim:
                seen[name].append((inputs.detach(), dim))

        def note_output(_module: object, _args: object, output: object) -> None:
            tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.ndim]
            outputs.append(tensors[0] if tensors else None)

        layers = {layer.name: layer for layer in self.dag.layers.values()}
        outputs: list[Tensor | None] = []
        hooks = LayerHooks(objective.model, layers.values(), note)
        with preserve_state(objective.model, objective.others), hooks, torch.enable_grad():
            objective.model.eval()
            handle = objective.model.register_forward_hook(note_output)
            try:
                loss = objective.value(batch)
            finally:
                handle.remove()
        output = outputs[0] if len(outputs) == 1 else None
        if output is not None:
            seen[OUTPUT].append((output.detach()[..., None], output.ndim))
            if loss.requires_grad and output.requires_grad:
                with suppress(RuntimeError):  # a loss without a gradient is spoken of elsewhere
                    found = torch.autograd.grad(loss, output, allow_unused=True)
                    seen[SLOPE].extend((slope, slope.ndim) for slope in found if slope is not None)
        return seen

    def arranged(
        self, view: Mapping[str, Capture], objective: Objective, batch: object, n: int, units: Tensor | None
    ) -> dict[str, Capture]:
        """What layers read, and the goals there, with the rows of each sample together.

        Args:
            view: what the batch left.
            objective: the loss.
            batch: n samples.
            n: their number.
            units: the number of the group that each is of.

        Returns:
            The captures, as they are where rows have that order already.

        Raises:
            BatchError: a layer's rows are not those of n samples.
        """
        if _is_one(n, units):
            return dict(view)
        arranged = {}
        for name, capture in view.items():
            layout = self.layouts.get((name, capture.runs))
            fitting = layout and layout.resized(capture.inputs.shape[layout.dim], n)
            if fitting is None:
                if self.batch is not batch and self._changed_at(name, capture, n) is None:
                    self.look(objective, batch, n, units)
                fitting = self.layouts[name, capture.runs] = self._layout_at(name, capture, n)
            arranged[name] = capture.arranged(fitting, n)
        self.batch = None
        return arranged

    def _changed_at(self, name: str, capture: Capture, n: int) -> Tensor | None:
        """The rows of a layer that one of n samples changed, when some were looked at; None if that was not seen."""
        calls = self.changes.get(name, [])
        if len(self.allowed) != n or not calls or max(capture.runs) >= len(calls):
            return None
        changed = torch.cat([calls[run] for run in capture.runs])
        fits = changed.shape == capture.inputs.shape[: capture.channel_dim]
        return changed if fits and bool(changed.any()) else None

    def _layout_at(self, name: str, capture: Capture, n: int) -> SampleLayout:
        """From what was seen to change; where nothing was, samples come first."""
        changed, dims = self._changed_at(name, capture, n), capture.inputs.shape[: capture.channel_dim]
        if changed is not None:
            layout = layout_of(changed, n, self.allowed, self.batch_dim)
            if layout is not None:
                return layout
            self._warn(_apart(n, f"what layer {name} reads"))
        if len(dims) > self.batch_dim > 0 and dims[self.batch_dim] == n:
            return SampleLayout(self.batch_dim)
        runs = len(capture.runs)
        if dims and dims[0] % (runs * n) == 0:
            return SampleLayout(0, runs, dims[0] // (runs * n))
        if dims and dims[0] % n == 0:
            return SampleLayout(0, 1, dims[0] // n)
        raise BatchError(
            f"a layer sees {dims.numel()} rows for {n} samples; samples must be the first dimension. {name} reads "
            f"{tuple(capture.inputs.shape)}. If samples lie along another dimension of the inputs, give batch_dim=; if "
            "a batch is one whole, such as a bag or a graph, give groups=, a function from a batch to one key for each "
            "of its entries."
        )

    def _warn(self, reason: str) -> None:
        """Once for each objective."""
        if self.warned:
            return
        self.warned = True
        warnings.warn(
            f"{reason}. Samples are taken to lie along dimension {self.batch_dim} of the inputs: if it is another one, "
            "give batch_dim=; if several belong together, as nodes of a graph or measurements of one subject do, give "
            "groups=, a key for each. As it is, what is held out may depend on what is measured, and chance pass for "
            "more.",
            stacklevel=2,
        )


def _apart(n: int, what: str) -> str:
    return (
        f"samples do not stay apart: where one of the {n} samples of a batch is another one, {what} changes for others"
    )


def _same_target(batch: object, n: int, batch_dim: int) -> bool:
    """Whether the targets of a batch are the same for each sample, but not within."""
    target = batch[1] if isinstance(batch, (tuple, list)) and len(batch) == 2 else None
    if not isinstance(target, Tensor) or target.ndim <= batch_dim or target.shape[batch_dim] != n or n < 3:
        return False
    first = target.select(batch_dim, 0)
    others = (target.select(batch_dim, sample) for sample in range(1, n))
    return bool((first != first.flatten()[0]).any()) and all(torch.equal(first, other) for other in others)


def _is_one(n: int, units: Tensor | None) -> bool:
    """Whether all rows of a batch belong to one sample, or one group."""
    return n == 1 or (units is not None and bool((units == units[0]).all()))


def _changed(before: Sequence[tuple[Tensor, int]], after: Sequence[tuple[Tensor, int]]) -> list[Tensor]:
    """Which rows of each call changed; none where its sizes did."""
    pairs = zip(before, after, strict=False)
    return [rows_changed(x, y, dim) for (x, dim), (y, _) in pairs if x.shape == y.shape]
