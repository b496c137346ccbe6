"""One pass over batches that gathers moments."""

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from dagrow.captures import Batch, Capture
from dagrow.dag import Dag
from dagrow.errors import BatchError, GrowthError, LossError
from dagrow.features import Feature
from dagrow.landings import Landing
from dagrow.linalg import add_gram, complete
from dagrow.moments import Moments, Pair, distinct
from dagrow.objective import Objective
from dagrow.products import product
from dagrow.undisturbed import undisturbed
from dagrow.watch import Entered, Watch

__all__ = ["collect", "measure"]

FLUSH_ROWS = 2048  #: rows are collected up to this number before they are multiplied
ALIGNED = 16  #: rows start at multiples of so many entries, which makes products faster


def measure(
    dag: Dag, objective: Objective, pairs: Iterable[Pair], *, folds: int = 4, dtype: torch.dtype = torch.float64,
    preview: Mapping[str, Tensor] | None = None, read: Mapping[str, Landing] | None = None,
    written: Mapping[str, Landing] | None = None,
) -> Moments:  # fmt: skip
    """One pass over the batches.

    Args:
        pairs: what to measure.
        folds: samples go round-robin into this many folds.
        dtype: accumulators' type; products over FLUSH_ROWS rows, or one batch, are taken in the activations' own.
            Those of convolutions are large and few, and are summed in their own type, which keeps memory small.
        preview: parameters and buffers to replace, for a look at a grown network.
        read, written: layer -> which of its input and output channels are new in the preview.
    """
    sums = _Sums(distinct(pairs), folds, dtype)
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
    dag: Dag, objective: Objective, features: Iterable[Feature], folds: int, take: Callable[[Batch, float], None],
    preview: Mapping[str, Tensor] | None, read: Mapping[str, Landing], written: Mapping[str, Landing],
) -> bool:  # fmt: skip
    """Runs the model on every batch, forward and back to pre-activations, and hands over what it leaves at layers.

    Returns whether the model's own forward ran on every batch: a step may run its layers in another way.
    """
    objective.probe()
    watch, seen, forward = _Watch(dag, features, read, written), 0, True
    with undisturbed(objective.model), watch, torch.inference_mode(False), torch.enable_grad():
        objective.model.train(objective.mode == "train")
        if watch.wishes:  # gradients reach activations behind weights that are frozen, too
            for parameter in objective.model.parameters():
                parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
        for batch, n in objective:
            with Entered(objective.model) as entered:
                loss = objective.value(batch, preview)
            forward = forward and entered.ran
            captures = watch.harvest(loss, -objective.scale(n) * n)
            value = float(loss.detach()) * objective.scale(n) * n
            del loss  # with all that its graph holds
            take(Batch(captures, n, seen, folds), value)
            del captures
            seen += n
    return forward


class _Watch(Watch):
    """Catches what layers read and the goals at what they write."""

    def __init__(
        self, dag: Dag, features: Iterable[Feature], read: Mapping[str, Landing], written: Mapping[str, Landing]
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


def _kind(values: Tensor) -> torch.dtype:
    """The type that products are taken in: at least single precision."""
    return torch.promote_types(values.dtype, torch.float32)


class _Sums:
    """Accumulators. Rows of layers without space wait in a buffer, so that products are large and few; images are
    products enough."""

    def __init__(self, pairs: Sequence[Pair], folds: int, dtype: torch.dtype) -> None:
        self.pairs, self.folds, self.dtype = pairs, folds, dtype
        self.loss, self.seen = 0.0, 0
        self.totals: dict[Pair, Tensor] = {}
        self.waiting: list[tuple[int, dict[Feature, Tensor]]] = []
        self.rows = 0
        self.positions: dict[Feature, int] = defaultdict(int)
        self.resolution = 0.0

    def add(self, batch: Batch, loss: float) -> None:
        """A batch of n samples."""
        for feature in dict.fromkeys(f for pair in self.pairs for f in pair):
            feature.check(batch)
            count = feature.count(batch)
            if count % batch.samples or any(
                batch[e].spatial and len(batch[e].inputs) % batch.samples for e in feature.edges
            ):
                raise BatchError(
                    f"a layer sees {count} rows for {batch.samples} samples; samples must be the first dimension."
                )
            self.positions[feature] += count
        self.check_rows(batch)
        for capture in batch.captures.values():
            self.resolution = max(self.resolution, torch.finfo(_kind(capture.inputs)).eps)
        self.loss, self.seen = self.loss + loss, self.seen + batch.samples
        images = [pair for pair in self.pairs if any(batch[edge].spatial for f in pair for edge in f.edges)]
        for pair in images:  # many rows a batch: products enough, and kept as they come
            found = product(*pair, batch)
            if pair in self.totals:
                self.totals[pair] += found
            else:
                self.totals[pair] = found
        self.wait([pair for pair in self.pairs if pair not in images], batch)

    def check_rows(self, batch: Batch) -> None:
        for x, y in self.pairs:
            if x.count(batch) != y.count(batch):
                n = batch.samples
                raise BatchError(
                    f"layer {', '.join(x.edges)} has {x.count(batch) // n} positions in a sample of this batch, layer "
                    f"{', '.join(y.edges)} {y.count(batch) // n}, otherwise than in the example; trace with such a "
                    "batch."
                )

    def total(self, pair: Pair, dx: int, dy: int, device: torch.device) -> Tensor:
        """The sums of a pair ``[F, dx, dy]``."""
        if pair not in self.totals:
            self.totals[pair] = torch.zeros(self.folds, dx, dy, dtype=self.dtype, device=device)
        return self.totals[pair]

    def wait(self, pairs: Sequence[Pair], batch: Batch) -> None:
        """Puts the rows ``[n s, d]`` of pairs into the buffer."""
        found = {f: f.rows(batch) for pair in pairs for f in pair}
        kind = functools.reduce(torch.promote_types, (values.dtype for values in found.values()), torch.float32)
        rows = {f: values.to(kind).view(batch.samples, -1, values.shape[1]) for f, values in found.items()}
        if rows:
            self.waiting.append((batch.seen, rows))
            self.rows += max(values.shape[:2].numel() for values in rows.values())
        if self.rows >= FLUSH_ROWS * self.folds:
            self.flush()

    def flush(self) -> None:
        """Multiplies what is waiting."""
        features = list(self.waiting[0][1])
        for fold in range(self.folds):
            joined = {f: self.joined(f, fold) for f in features}
            for x, y in self.pairs:
                if x not in joined or y not in joined:
                    continue
                total = self.total((x, y), joined[x].shape[1], joined[y].shape[1], joined[x].device)[fold]
                if x == y:
                    add_gram(total, joined[x])
                else:
                    total += joined[x].T @ joined[y]
            del joined  # before the next fold's
        self.waiting, self.rows = [], 0

    def joined(self, feature: Feature, fold: int) -> Tensor:
        """The fold's rows of all waiting batches; samples go round-robin into folds."""
        parts = [rows[feature][(fold - start) % self.folds :: self.folds] for start, rows in self.waiting]
        counts, width = [part.shape[:2].numel() for part in parts], parts[0].shape[2]
        out = parts[0].new_empty(sum(counts), -(-width // ALIGNED) * ALIGNED)[:, :width]
        for part, rows in zip(parts, out.split(counts), strict=True):
            rows.unflatten(0, part.shape[:2]).copy_(part)
        return out

    def moments(self, forward: bool) -> Moments:
        if self.seen < self.folds:
            raise BatchError(f"there are {self.seen} samples for {self.folds} folds; give more samples, or folds=1.")
        if self.waiting:
            self.flush()
        for (x, y), total in self.totals.items():
            if x == y:
                complete(total)
            self.check(x, y, total)
        counts = torch.tensor([len(range(fold, self.seen, self.folds)) for fold in range(self.folds)])
        positions = {feature: count / self.seen for feature, count in self.positions.items()}
        return Moments(counts, self.totals, positions, self.resolution, self.loss / self.seen, forward)

    @staticmethod
    def check(x: Feature, y: Feature, total: Tensor) -> None:
        """A number that is none shows in the first row or column, one that is too large on the diagonal."""
        seen = [total[:, :1], total[:, :, :1], total.diagonal(dim1=1, dim2=2)]
        if not all(bool(torch.isfinite(part).all()) for part in seen):
            raise LossError(
                f"what layers {', '.join(dict.fromkeys((*x.edges, *y.edges)))} read, or the gradients there, are not "
                "finite, or too large for their type when squared, although the loss is finite. Look for infinite "
                "inputs, for square roots and norms of zero in the loss, and scale large inputs."
            )
