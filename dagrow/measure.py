"""One pass over batches that gathers moments. The only place that hangs hooks."""

import functools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from dagrow.axes import Landing
from dagrow.dag import Dag
from dagrow.errors import BatchError, GrowthError, LossError
from dagrow.features import Capture, Feature, Goal
from dagrow.linalg import add_gram, complete
from dagrow.moments import Moments, Pair, distinct
from dagrow.objective import Objective
from dagrow.undisturbed import undisturbed

__all__ = ["measure"]

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
        preview: parameters and buffers to replace, for a look at a grown network.
        read, written: layer -> which of its input and output channels are new in the preview.
    """
    pairs = distinct(pairs)
    objective.probe()
    watch = _Watch(dag, {f for pair in pairs for f in pair}, read or {}, written or {})
    with undisturbed(objective.model), watch, torch.inference_mode(False), torch.enable_grad():
        sums = _Sums(pairs, folds, dtype)
        objective.model.train(objective.mode == "train")
        for batch, n in objective:
            loss = objective.value(batch, preview)
            captures = watch.harvest(loss, -objective.scale(n) * n)
            sums.add(n, {f: f.rows(captures, n) for f in sums.features}, float(loss.detach()) * objective.scale(n) * n)
            del loss, captures
        return sums.moments()


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
                lambda _m, args, output, name=name: self.catch(name, args, output),
                prepend=True,  # before the user's
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
            raise GrowthError(
                f"{name} ran twice on a batch, but once when the model was traced. Call the model once in a step; "
                "if the model itself has changed, trace it again."
            )
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
        self.loss, self.seen = 0.0, 0
        self.totals: dict[Pair, Tensor] = {}
        self.waiting: list[tuple[int, dict[Feature, Tensor]]] = []
        self.rows = 0
        self.positions: dict[Feature, int] = defaultdict(int)
        self.resolution = 0.0

    def add(self, n: int, rows: Mapping[Feature, Tensor], loss: float) -> None:
        """Rows of a batch of n samples, ``[n s, d]`` for each feature."""
        kind = functools.reduce(torch.promote_types, (values.dtype for values in rows.values()), torch.float32)
        rows = {feature: values.to(kind) for feature, values in rows.items()}
        for feature, values in rows.items():
            if len(values) % n:
                raise BatchError(
                    f"a layer sees {len(values)} rows for {n} samples; samples must be the first dimension."
                )
            self.positions[feature] += len(values)
            self.resolution = max(self.resolution, torch.finfo(values.dtype).eps)
        for x, y in self.pairs:
            if len(rows[x]) != len(rows[y]):
                raise BatchError(
                    f"layer {', '.join(x.edges)} has {len(rows[x]) // n} positions in a sample of this batch, layer "
                    f"{', '.join(y.edges)} {len(rows[y]) // n}, otherwise than in the example; trace with such a batch."
                )
        self.waiting.append((self.seen, {f: values.view(n, -1, values.shape[1]) for f, values in rows.items()}))
        self.loss, self.seen = self.loss + loss, self.seen + n
        self.rows += max(len(values) for values in rows.values())
        if self.rows >= FLUSH_ROWS * self.folds:
            self.flush()

    def flush(self) -> None:
        """Multiplies what is waiting."""
        for fold in range(self.folds):
            joined = {f: self.joined(f, fold) for f in self.features}
            for x, y in self.pairs:
                if (x, y) not in self.totals:
                    shape = self.folds, joined[x].shape[1], joined[y].shape[1]
                    self.totals[x, y] = joined[x].new_zeros(shape, dtype=self.dtype)
                total = self.totals[x, y][fold]
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

    def moments(self) -> Moments:
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
        return Moments(counts, self.totals, positions, self.resolution, self.loss / self.seen)

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
