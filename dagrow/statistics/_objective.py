"""The user's loss on the user's batches, evaluated on the model as it is or on a preview of it.

Nothing here leaves a trace: modes, buffers, gradients and random states are as they were found.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import Dataset, IterableDataset

from dagrow._model_state import Others, preserve_state
from dagrow.errors import BatchError, DagrowError, LossError
from dagrow.tracing import bind

Loss = Callable[[Any, Any], Tensor]
Step = Callable[[nn.Module, Any], Tensor]


class NotFiniteError(LossError):
    """The loss is infinite or not a number."""


class Objective:
    """A loss over batches, normalised to a mean over samples.

    Args:
        model: the user's model.
        batches: any re-iterable of ``(inputs, target)``; with ``step``, of anything.
        loss: ``loss(output, target) -> scalar``, a mean or a sum over samples.
        step: ``step(model, batch) -> scalar``, instead of ``loss``.
        mode: ``"eval"`` or ``"train"``, the mode that the model runs in.
        name: what messages call the batches.

    Raises:
        BatchError: the batches cannot be read, or not twice.
        LossError: the loss cannot be called, or there is none, or there are two.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[object],
        loss: Loss | None = None,
        *,
        step: Step | None = None,
        mode: str = "eval",
        name: str = "batches",
    ) -> None:
        if (loss is None) == (step is None):
            raise LossError(
                "give either loss=, called as loss(output, target), or step=, called as step(model, batch)."
            )
        if not callable(loss if step is None else step):
            kind = type(loss if step is None else step).__name__
            raise LossError(
                f"the {'loss' if step is None else 'step'} is a {kind}, which cannot be called; give loss=, called as "
                "loss(output, target), such as torch.nn.functional.mse_loss, or step=, called as step(model, batch)."
            )
        if mode not in ("eval", "train"):
            raise LossError(f"mode={mode!r} is neither 'eval' nor 'train'.")
        _check_batches(batches, name)
        self.model, self.batches, self.mode, self.name = model, batches, mode, name
        self.function: Step = step if step is not None else _supervised(loss)
        self._reduction: str | None = None
        self.others = Others()  #: modules that the loss or the step runs beside the model

    def with_batches(self, batches: Iterable[object], name: str = "batches") -> "Objective":
        """The same loss on other batches.

        Args:
            batches: a re-iterable, of what the batches were.
            name: what messages call them.

        Returns:
            An objective of its own.
        """
        objective = Objective(self.model, batches, step=self.function, mode=self.mode, name=name)
        objective.others.modules += self.others.modules
        return objective

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        """Batches, in the same order each time: passes agree on who is in which fold.

        Yields:
            A batch and its number of samples.

        Raises:
            BatchError: there are none.
        """
        empty = True
        states = [(generator, generator.get_state()) for generator in _generators(self.batches)]
        try:
            for batch in self.batches:
                empty = False
                with self._naming_batches():
                    samples = sample_count(batch)
                yield batch, samples
        finally:
            for generator, state in states:
                generator.set_state(state)
        if empty:
            raise BatchError(
                f"{self.name} is empty: not one batch came out. Give at least one; and if it held some before, it can "
                "be read only once: give a list or a DataLoader, which can be read again."
            )

    @contextmanager
    def _naming_batches(self) -> Iterator[None]:
        """Errors say which batches they are about, where there are others beside those that are measured."""
        try:
            yield
        except DagrowError as error:
            if self.name != "batches":
                error.args = (f"{self.name}: {error}",)
            raise

    def value(self, batch: object) -> Tensor:
        """The user's own scalar for one batch.

        Args:
            batch: one of the batches, or another like them.

        Returns:
            A tensor without dimensions.
        """
        with self._naming_batches():
            return self._value(batch)

    def _value(self, batch: object) -> Tensor:
        try:
            value = self.function(self.model, batch)
        except DagrowError:
            raise
        except Exception as error:
            raise BatchError(self._failure(batch, error)) from error
        if not isinstance(value, Tensor) or value.numel() != 1:
            kind = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise LossError(
                f"the loss returned {kind}; it must return a tensor with one number, the mean or the sum over the "
                "samples of the batch."
            )
        if not torch.isfinite(value):
            raise NotFiniteError(
                f"the loss is {value.item()} on a batch of {_description(batch)}; growth needs finite losses. Look for "
                "such values in the batch and in the model's parameters, or lower the learning rate."
            )
        return value.reshape(())

    def _failure(self, batch: object, error: Exception) -> str:
        kinds = sorted({f"{p.dtype} on {p.device}".removeprefix("torch.") for p in self.model.parameters()})
        return (
            f"the model or the loss failed on a batch of {_description(batch)} ({type(error).__name__}: {error}). The "
            f"model's parameters are {', '.join(kinds)}; check that the batch has the shapes, types and device that "
            "the model takes and the loss compares."
        )

    def scale(self, samples: int) -> float:
        """The factor from the user's scalar for a batch to a mean over its samples.

        Args:
            samples: of the batch.

        Returns:
            1 for a mean, 1 / samples for a sum.
        """
        return 1.0 if self.reduction == "mean" else 1.0 / samples

    @property
    def reduction(self) -> str:
        """Whether the user's loss is a "mean" or a "sum" over samples, found by repeating a batch."""
        self.probe()
        assert self._reduction is not None
        return self._reduction

    def probe(self) -> None:
        """Finds the reduction out, once: to be called before hooks hang or the model's state is saved."""
        if self._reduction is None:
            with preserve_state(self.model, self.others, weights=True), torch.no_grad():
                self.model.eval()
                self._reduction = self._probe_reduction()

    def _probe_reduction(self) -> str:
        for batch, n in self:
            versions = [parameter._version for parameter in self.model.parameters()]
            value = float(self.value(batch))
            if versions != [parameter._version for parameter in self.model.parameters()]:
                raise LossError(
                    "evaluating the loss changes the model's weights; give a loss or a step that computes the loss and "
                    "leaves backward() and optimizer.step() to the training loop."
                )
            if value == 0:
                continue
            ratio = float(self.value(_doubled(batch, n))) / value
            if abs(ratio - 1) < 1e-3:
                return "mean"
            if abs(ratio - 2) < 1e-3:
                return "sum"
            raise LossError(
                f"repeating a batch multiplies the loss by {ratio:.4g}; a mean over samples gives 1, a sum gives 2. "
                "Return one of the two (a penalty on the weights goes with a mean), and draw no random numbers in eval "
                "mode."
            )
        return "mean"

    def mean(self) -> float:
        """The loss, in eval mode unless asked otherwise.

        Returns:
            A mean over all samples of all batches.
        """
        self.probe()
        total, count = 0.0, 0
        with preserve_state(self.model, self.others), torch.no_grad():
            self.model.train(self.mode == "train")
            for batch, n in self:
                total += float(self.value(batch)) * self.scale(n) * n
                count += n
        self.others.complete = True
        return total / count


def _check_batches(batches: object, name: str) -> None:
    if isinstance(batches, Dataset) and not isinstance(batches, IterableDataset):
        raise BatchError(
            f"{name} is a {type(batches).__name__}, which holds single samples; give batches of them: "
            "torch.utils.data.DataLoader(dataset, batch_size=...)."
        )
    if isinstance(batches, (Tensor, Mapping, str)) or not isinstance(batches, Iterable):
        raise BatchError(f"{name} is a {type(batches).__name__}; give a list of (inputs, target) or a DataLoader.")
    if isinstance(batches, Iterator):
        raise BatchError(
            f"{name} is a {type(batches).__name__}, which can be read only once; give a list, list({name}), or a "
            "DataLoader."
        )


def _generators(batches: object) -> list[torch.Generator]:
    """The random generators of a loader's own."""
    generators = [getattr(owner, "generator", None) for owner in (batches, getattr(batches, "sampler", None))]
    return [generator for generator in generators if isinstance(generator, torch.Generator)]


def _supervised(loss: Loss | None) -> Step:
    assert loss is not None

    def step(model: nn.Module, batch: object) -> Tensor:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise BatchError(
                f"a batch is {_description(batch)}; it must be (inputs, target). One batch alone goes into a list, "
                "[(inputs, target)]; for other batches, give step=, called as step(model, batch)."
            )
        n, target = sample_count(batch), batch[1]
        if isinstance(target, Tensor) and target.ndim and len(target) % n:
            raise BatchError(
                f"a batch has {n} inputs and {len(target)} targets: {_description(batch)}. Give as many of each."
            )
        args, kwargs = bind(batch[0])
        return loss(model(*args, **kwargs), target)

    return step


def sample_count(batch: object) -> int:
    """The size of the first dimension of a batch's first tensor.

    Args:
        batch: any nest of tensors.

    Returns:
        The number of samples.

    Raises:
        BatchError: there are none, or no tensor to tell.
    """
    for leaf in tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.ndim:
            if not len(leaf):
                raise BatchError(f"a batch has no samples: {_description(batch)}.")
            return len(leaf)
    raise BatchError(f"a batch holds no tensor with a sample dimension: {_description(batch)}.")


def _doubled(batch: object, n: int) -> object:
    """The batch followed by itself."""

    def twice(leaf: object) -> object:
        return torch.cat([leaf, leaf]) if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == n else leaf

    return tree_map(twice, batch)


def _description(batch: object) -> str:
    """Shapes and types of a batch, for messages."""

    def describe(leaf: object) -> str:
        if not isinstance(leaf, Tensor):
            return type(leaf).__name__
        return f"{tuple(leaf.shape)} {str(leaf.dtype).removeprefix('torch.')}"

    return str(tree_map(describe, batch))
