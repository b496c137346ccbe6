"""Second moments of features and goals, streamed over batches. The only place that hangs hooks.

With ``E`` a mean over samples of sums over positions, and rows ``x [n s, dx]``, ``y [n s, dy]``, the moment of
``(x, y)`` is ``E x y^T [dx, dy]``. Moments add; they are kept in folds by sample, so that anything fitted on them
can be validated on samples that it has not seen, at no extra pass.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dagrow.axes import Landing
from dagrow.dag import Dag
from dagrow.errors import BatchError, GrowthError, LossError
from dagrow.features import Capture, Feature, Goal
from dagrow.linalg import gram
from dagrow.objective import Objective, Undisturbed

__all__ = ["Moments", "Pair", "measure"]

FLUSH_ROWS = 2048  #: rows are collected up to this number before they are multiplied

Pair = tuple[Feature, Feature]


@dataclass(eq=False)
class Moments:
    """Sums over samples of ``x y^T``, per fold.

    Attributes:
        counts: samples in each fold ``[F]``.
        sums: pair of features -> sums ``[F, dx, dy]``.
        positions: feature -> rows per sample.
        resolution: relative precision of the products that were summed.
        loss: mean over samples of the loss.
    """

    counts: Tensor
    sums: dict[Pair, Tensor]
    positions: dict[Feature, float]
    resolution: float
    loss: float = 0.0
    _means: dict[Pair, Tensor] = field(default_factory=dict, repr=False)

    @property
    def folds(self) -> int:
        return len(self.counts)

    @property
    def samples(self) -> int:
        return int(self.counts.sum())

    def __getitem__(self, pair: Pair) -> Tensor:
        """``E x y^T`` ``[dx, dy]``."""
        x, y = pair
        if pair not in self.sums and (y, x) in self.sums:
            return self[y, x].T
        if pair not in self._means:
            self._means[pair] = self.sums[pair].sum(0) / self.samples
        return self._means[pair]

    def __contains__(self, pair: Pair) -> bool:
        return pair in self.sums or pair[::-1] in self.sums

    def __add__(self, other: "Moments") -> "Moments":
        sums = {pair: total + other.sums[pair] for pair, total in self.sums.items()}
        share = self.samples / (self.samples + other.samples)
        positions = {f: share * count + (1 - share) * other.positions[f] for f, count in self.positions.items()}
        loss = share * self.loss + (1 - share) * other.loss
        return Moments(self.counts + other.counts, sums, positions, max(self.resolution, other.resolution), loss)

    def split(self, pairs: Iterable[Pair], dtype: torch.dtype | None = None) -> Iterator[tuple["Moments", "Moments"]]:
        """For each fold the moments of all others and its own, of some pairs only."""
        kept = {pair if pair in self.sums else pair[::-1] for pair in pairs if pair in self}
        sums = {pair: self.sums[pair].to(dtype or self.sums[pair].dtype) for pair in kept}
        totals = {pair: total.sum(0, keepdim=True) for pair, total in sums.items()}
        for fold in range(self.folds):
            own = {pair: total[fold : fold + 1] for pair, total in sums.items()}
            rest = {pair: totals[pair] - total for pair, total in own.items()}
            count = self.counts[fold : fold + 1]
            yield (
                replace(self, counts=self.counts.sum() - count, sums=rest, _means={}),
                replace(self, counts=count, sums=own, _means={}),
            )


def measure(
    dag: Dag, objective: Objective, pairs: Iterable[Pair], *, folds: int = 4, dtype: torch.dtype = torch.float64,
    preview: Mapping[str, Tensor] | None = None, read: Mapping[str, Landing] | None = None,
    written: Mapping[str, Landing] | None = None,
) -> Moments:  # fmt: skip
    """One pass over the batches.

    Args:
        pairs: what to measure.
        folds: samples go round-robin into this many folds.
        dtype: accumulators' type; products of at most FLUSH_ROWS rows are taken in the activations' own type.
        preview: parameters and buffers to replace, for a look at a grown network.
        read, written: layer -> which of its input and output channels are new in the preview.
    """
    pairs = _distinct(pairs)
    objective.probe()
    watch = _Watch(dag, {f for pair in pairs for f in pair}, read or {}, written or {})
    with Undisturbed(objective.model), watch, torch.inference_mode(False), torch.enable_grad():
        sums = _Sums(pairs, folds, dtype)
        objective.model.train(objective.mode == "train")
        for batch, n in objective:
            loss = objective.value(batch, preview)
            captures = watch.harvest(loss, -objective.scale(n) * n)
            sums.add(n, {f: f.rows(captures, n) for f in sums.features}, float(loss.detach()) * objective.scale(n) * n)
            del loss, captures
        return sums.moments()


def _distinct(pairs: Iterable[Pair]) -> list[Pair]:
    """Each pair once, in one order only."""
    kept: dict[Pair, None] = {}
    for x, y in pairs:
        if (y, x) not in kept:
            kept[x, y] = None
    return list(kept)


class _Watch:
    """Hooks that catch what layers read and the goals at what they write."""

    def __init__(
        self, dag: Dag, features: Iterable[Feature], read: Mapping[str, Landing], written: Mapping[str, Landing]
    ) -> None:
        modules = dict(dag.model.named_modules())
        names = {edge for feature in features for edge in feature.edges}
        self.goals = {edge for feature in features if isinstance(feature, Goal) for edge in feature.edges}
        self.watched = {
            name: (modules[name], dag.rule(name), read.get(name), written.get(name)) for name in sorted(names)
        }
        self.found: dict[str, Capture] = {}
        self.before = {name: set(module._forward_hooks) for name, (module, *_) in self.watched.items()}

    def __enter__(self) -> "_Watch":
        for name in self.watched:
            self.watched[name][0].register_forward_hook(
                lambda _m, args, output, name=name: self.catch(name, args, output)
            )
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.remove()
        except BaseException:  # an interrupt while cleaning up: finish the cleaning first
            self.remove()
            raise

    def remove(self) -> None:
        for name, (module, *_) in self.watched.items():
            for key in set(module._forward_hooks) - self.before[name]:
                del module._forward_hooks[key]
        self.found = {}

    def catch(self, name: str, args: tuple, output: Tensor) -> Tensor | None:
        if name in self.found:
            raise GrowthError(f"{name} ran twice on a batch, but once when the model was traced; trace it again.")
        inputs = args[0].detach()
        self.found[name] = Capture(*self.watched[name], inputs, inputs._version)
        if name not in self.goals:
            return None
        output = output if output.requires_grad else output.detach().requires_grad_()
        self.found[name].output = output
        return output.clone()  # what follows may work in place

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
        outputs = {name: output for name in self.goals if (output := self.found[name].output) is not None}
        for (name, output), gradient in zip(outputs.items(), _gradients(loss, list(outputs.values())), strict=True):
            self.found[name].goal = torch.zeros_like(output) if gradient is None else gradient.detach() * scale
        found, self.found = self.found, {}
        return found


def _gradients(loss: Tensor, outputs: Sequence[Tensor]) -> Sequence[Tensor | None]:
    if not outputs:
        return ()
    try:
        gradients = torch.autograd.grad(loss, outputs, allow_unused=True) if loss.requires_grad else ()
    except RuntimeError as error:
        raise LossError(
            f"the loss has no gradient ({error}). It must be differentiable, and targets of the type of the outputs "
            f"({outputs[0].dtype}) where the loss compares them."
        ) from error
    if all(gradient is None for gradient in gradients):
        raise LossError(
            "the loss does not depend on the model: no gradient reaches its layers. Compute it from the model's "
            "output, without detach(), item() or torch.no_grad()."
        )
    return gradients


class _Sums:
    """Accumulators with a buffer of rows, so that products are large and few."""

    def __init__(self, pairs: Sequence[Pair], folds: int, dtype: torch.dtype) -> None:
        self.pairs, self.folds, self.dtype = pairs, folds, dtype
        self.features = list(dict.fromkeys(f for pair in pairs for f in pair))
        self.counts, self.loss, self.seen = torch.zeros(folds, dtype=torch.long), 0.0, 0
        self.totals: dict[Pair, Tensor] = {}
        self.started: set[int] = set()
        self.waiting: list[dict[Feature, list[Tensor]]] = [defaultdict(list) for _ in range(folds)]
        self.rows = [0] * folds
        self.positions: dict[Feature, int] = defaultdict(int)
        self.resolution = 0.0

    def add(self, n: int, rows: Mapping[Feature, Tensor], loss: float) -> None:
        self.loss += loss
        rows = {f: values.float() if values.dtype.itemsize < 4 else values for f, values in rows.items()}
        for feature, values in rows.items():
            if len(values) % n:
                raise BatchError(
                    f"a layer sees {len(values)} rows for {n} samples; samples must be the first dimension."
                )
            self.positions[feature] += len(values)
            self.resolution = max(self.resolution, torch.finfo(values.dtype).eps)
        for fold in range(self.folds):
            first = (fold - self.seen) % self.folds
            if first >= n:
                continue
            self.counts[fold] += len(range(first, n, self.folds))
            for feature, values in rows.items():
                part = values.view(n, -1, values.shape[1])[first :: self.folds]
                self.waiting[fold][feature].append(part.reshape(-1, values.shape[1]))
            self.rows[fold] += max(len(values) for values in rows.values()) // self.folds
            if self.rows[fold] >= FLUSH_ROWS:
                self.flush(fold)
        self.seen += n

    def flush(self, fold: int) -> None:
        waiting, self.waiting[fold], self.rows[fold] = self.waiting[fold], defaultdict(list), 0
        joined = {feature: torch.cat(parts) for feature, parts in waiting.items()}
        for x, y in self.pairs:
            if x not in joined:
                continue
            product = gram(joined[x]) if x == y else joined[x].T @ joined[y]
            if (x, y) not in self.totals:
                self.totals[x, y] = product.new_empty(self.folds, *product.shape, dtype=self.dtype)
            total = self.totals[x, y][fold]
            total.add_(product) if fold in self.started else total.copy_(product)
        self.started |= {fold} if joined else set()

    def moments(self) -> Moments:
        if self.seen < self.folds:
            raise BatchError(f"there are {self.seen} samples for {self.folds} folds; give more samples, or folds=1.")
        for fold in range(self.folds):
            self.flush(fold)
        positions = {feature: count / self.seen for feature, count in self.positions.items()}
        return Moments(self.counts, self.totals, positions, self.resolution, self.loss / self.seen)
