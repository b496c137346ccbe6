"""The user's loss on the user's batches, evaluated on the model as it is or on a preview of it.

Nothing here leaves a trace: modes, buffers, gradients and random states are as they were found. Random numbers that a
loss draws are the same whenever it is evaluated on a batch: each batch has a seed of its own, by its place.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Unpack
from zlib import crc32

import torch
from torch import Tensor, nn

from dagrow._model_state import Others, all_or_nothing, drawn_so_far, preserve_state, rewinding, seed_everything
from dagrow._progress import progress_bar, show_batch
from dagrow.errors import BatchError, DagrowError, LossError
from dagrow.statistics._batches import (
    RAISED,
    Place,
    add_note,
    batch_count,
    check_batches,
    epoch_seed,
    failure,
    generators_of,
    mark_of,
    numbered,
    sample_count,
)
from dagrow.statistics._findings import Findings
from dagrow.statistics._limits import Limits
from dagrow.statistics._options import MeasureOptions, Reduction, check_options
from dagrow.statistics._purity import FirstLoss, Untouched, check_same
from dagrow.statistics._reached import modules_reached
from dagrow.statistics._reduction import Recording, ReductionProbe
from dagrow.statistics._steps import Loss, Step, check_callable, checked_scalar, supervised


@dataclass
class _Shared:
    """What objectives with the same loss have in common."""

    seed: int
    reduction: Reduction | None
    differentiating: bool = False  #: whether the loss takes derivatives itself, which no_grad() forbids


class Objective:
    """A loss over batches, normalised to a mean over samples.

    Args:
        model: the user's model.
        batches: any re-iterable of ``(inputs, target)``; with ``step``, of anything.
        loss: ``loss(output, target) -> scalar``, a mean or a sum over samples, or one number of the batch.
        step: ``step(model, batch) -> scalar``, instead of ``loss``.
        mode: ``"eval"`` or ``"train"``, the mode that the model runs in.
        name: what messages call the batches.
        options: see :class:`MeasureOptions`.

    Attributes:
        batch_dim: the dimension along which samples lie.
        groups: what samples go into one fold, or None.
        max_batches: how many batches are read at most, or None.
        progress: whether a progress bar may show.
        limits: how much memory and time measuring may take.
        findings: how the loss depends on weights, as far as layers have been measured.
        others: modules that the loss or the step runs beside the model.

    Raises:
        BatchError: the batches cannot be read, or not twice.
        LossError: the loss cannot be called, or there is none, or there are two.
        GrowthError, TypeError: an option is not one.
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
        **options: Unpack[MeasureOptions],
    ) -> None:
        check_callable(loss, step)
        if mode not in ("eval", "train"):
            raise LossError(f"mode={mode!r} is neither 'eval' nor 'train'.")
        check_options(options)
        check_batches(batches, name)
        self.model, self.batches, self.mode, self.name, self.options = model, batches, mode, name, options
        self.batch_dim, self.groups = options.get("batch_dim", 0), options.get("groups")
        self.max_batches, self.limits = options.get("max_batches"), Limits.of(options)
        self.progress, self.findings = options.get("progress", True), Findings()
        self.function: Step = step if step is not None else supervised(loss, self.batch_dim)
        self._shared = _Shared(epoch_seed(), options.get("reduction"))
        self.others, self._place, self._probed = Others(modules_reached(self.function)), Place(), False
        self._seeds_all = True  # of numpy and Python, too, where something draws from them, as far as is known
        self._samples, self._batches = 0, 0  # of the last pass
        self._seeded: tuple[int, ...] = (0,)
        self._first: FirstLoss | None = None  # if it is still to be compared

    def with_batches(self, batches: Iterable[object], name: str = "batches") -> "Objective":
        """The same loss on other batches.

        Args:
            batches: a re-iterable, of what the batches were.
            name: what messages call them.

        Returns:
            An objective of its own.
        """
        return self._like(self.model, batches, name)

    def with_model(self, model: nn.Module) -> "Objective":
        """The same loss on the same batches, of another model.

        Args:
            model: such as a copy of this one.

        Returns:
            An objective of its own.
        """
        return self._like(model, self.batches, self.name)

    def _like(self, model: nn.Module, batches: Iterable[object], name: str) -> "Objective":
        other = Objective(model, batches, step=self.function, mode=self.mode, name=name, **self.options)
        other._shared, other.others.modules, other.limits = self._shared, list(self.others.modules), self.limits
        return other

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        """Batches, in the same order each time, with the same random numbers. Inside :func:`preserve_state`.

        Returns:
            An iterator over batches with their numbers of samples.
        """
        return self.read(self._shared.seed, self.max_batches)

    def read(self, seed: int | None = None, most: int | None = None) -> Iterator[tuple[Any, int]]:
        """Batches, to train on.

        Args:
            seed: of what a loader draws; by default it draws what comes, and goes on there.
            most: the largest number of batches.

        Returns:
            An iterator over batches with their numbers of samples.
        """
        states = [] if seed is None else [(owner, owner.get_state()) for owner in generators_of(self.batches)]

        def restore() -> None:
            for generator, state in states:
                generator.set_state(state)

        with all_or_nothing(restore):
            if seed is not None:
                self._seed(seed, 0)
            try:
                source = iter(self.batches)
            except BaseException as error:
                add_note(error, f"{RAISED}where {self.name} were to be read")
                raise
        return self._read(source, restore, seed, most)

    def _read(
        self, source: Iterator[Any], restore: Callable[[], None], seed: int | None, most: int | None
    ) -> Iterator[tuple[Any, int]]:
        seen, rewind = Place(), rewinding(self.others)
        self._place, total = seen, 0
        count = batch_count(self.batches, most)
        try:
            for number, batch in numbered(source, self.name, most, count, training=seed is None):
                show_batch(number, count, self.name)
                samples = sample_count(batch, self.batch_dim)
                self._place = seen = Place(number, samples, seen.first or samples)
                total += samples
                yield batch, samples
                if seed is not None:
                    rewind()
                    self._seed(seed, 2 * number + 2)
        except DagrowError as error:
            self._name_batches(error)
            raise
        finally:
            restore()
        if not total:
            raise BatchError(
                f"{self.name} is empty: not one batch came out. Give at least one; and if it held some before, it can "
                "be read only once: give a list or a DataLoader, which can be read again."
            )
        self._samples, self._batches = total, seen.number + 1

    def _name_batches(self, error: DagrowError) -> None:
        """Errors say which batches they are about, where there are others beside those that are measured."""
        if self.name != "batches" and not str(error).startswith(self.name):
            error.args = (f"{self.name}: {error}",)

    def hold(self, turn: int = 0) -> None:
        """Seeds the random generators for the batch that was read last: every evaluation of it begins there.

        Args:
            turn: of evaluations with other random numbers.
        """
        self._seed(self._shared.seed, 2 * self._place.number + 1, turn)

    def _seed(self, *numbers: int) -> None:
        self._seeded = numbers
        seed_everything(crc32(repr(numbers).encode()), others=self._seeds_all)

    def value(self, batch: object) -> Tensor:
        """The user's own scalar for the batch that was read last. Inside :func:`preserve_state`.

        Args:
            batch: that one, or another like it.

        Returns:
            A tensor without dimensions.
        """
        self.hold()
        return self.drawn_value(batch)

    def drawn_value(self, batch: object, how: str = "") -> Tensor:
        """The same with random numbers as they come, as for training.

        Args:
            batch: as for :meth:`value`.
            how: it differs from the batch that was read, for notes.

        Returns:
            A tensor without dimensions.
        """
        try:
            with torch.enable_grad() if self._shared.differentiating else nullcontext():
                return checked_scalar(self.function(self.model, batch), batch)
        except BaseException as error:
            self._add_note(error, batch, how)
            raise

    @contextmanager
    def noting(self, batch: object, how: str = "") -> Iterator[None]:
        """Exceptions of the user's code get a note on the batch that was read last, and stay what they are.

        Args:
            batch: that one, or another like it.
            how: it differs from that one, for the note.
        """
        try:
            yield
        except BaseException as error:
            self._add_note(error, batch, how)
            raise

    def _add_note(self, error: BaseException, batch: object, how: str) -> None:
        if isinstance(error, DagrowError):
            self._name_batches(error)
        else:
            add_note(error, failure(self.model, batch, f"{self.name}, counted from 0{how}", self._place))

    def scale(self, samples: int) -> float:
        """The factor from the user's scalar for a batch to a mean over its samples.

        Args:
            samples: of the batch.

        Returns:
            1 / samples for a sum, else 1.
        """
        return 1.0 / samples if self.reduction == "sum" else 1.0

    def reported(self, mean: float) -> float:
        """A mean over samples as the user's loss states it: the user's scalars, averaged over batches.

        Args:
            mean: over the samples of the pass that was made last.

        Returns:
            For a sum that times the samples of a batch, else the same; batches count by their samples.
        """
        return mean * self._samples / self._batches if self.reduction == "sum" else mean

    @property
    def reduction(self) -> Reduction:
        """Whether the user's loss is a "mean" or a "sum" over samples, or one number of the "batch"."""
        self.probe()
        assert self._shared.reduction is not None
        return self._shared.reduction

    def probe(self, *, once: bool = False) -> None:
        """Finds the reduction out, once: to be called before hooks hang or the model's state is saved.

        Args:
            once: whether the first batch is not evaluated again, as its loss will be handed to :meth:`check_first`.
        """
        if not self._probed:
            with preserve_state(self.model, self.others, weights=True), torch.no_grad():
                self.model.eval()
                self._shared.reduction = self._probe_reduction(once)
            self._probed = True

    def check_first(self, batch: object, loss: Tensor) -> None:
        """Compares the loss of the first batch in eval mode with what it was; LossError if it is another one.

        Args:
            batch: the first one; of others, and later, nothing is compared.
            loss: its own.
        """
        if self._first is not None:
            first, self._first = self._first, None
            with torch.no_grad():
                first.check(batch, loss, lambda: self._value_alone(batch))

    def _probe_reduction(self, once: bool) -> Reduction:
        found, first = self._shared.reduction, None
        for batch, samples in self:
            if found is not None and first is not None:
                if not once:
                    self._value_alone(batch)
                break
            recording = Recording(self.model)
            value = self._checked_value(batch, recording)
            first = first or (batch, self._place, value, FirstLoss(value, batch))
            found = found or self._told(batch, samples, recording, value)
        assert first is not None
        batch, self._place, value, self._first = first
        if not once:
            check_same(value, self._value_alone(batch) if mark_of(batch) == self._first.mark else value)
            self._first = None
        return found or "mean"

    def _told(self, batch: object, samples: int, recording: Recording, value: Tensor) -> Reduction | None:
        """What a batch tells of the loss, if anything."""
        probe = ReductionProbe(self._evaluate, batch, samples, self.batch_dim, recording, float(value))
        with preserve_state(self.model, self.others):
            finding = probe.finding()
        if finding is not None and finding.reduction is None:
            check_same(value, self._value_alone(batch))
            raise LossError(
                f"{finding.why}. Say what the loss is with reduction=: 'mean' or 'sum' where it is one over the "
                "samples of a batch, perhaps with a penalty that does not depend on them; 'batch' where it is one "
                "number of the whole batch, as a contrastive loss is."
            )
        return None if finding is None else finding.reduction

    def _value_alone(self, batch: object) -> Tensor:
        with preserve_state(self.model, self.others):
            return self.value(batch)

    def _checked_value(self, batch: object, recording: Recording) -> Tensor:
        """The loss of a batch, which leaves the model as it is."""
        read = self._draws_others()
        with preserve_state(self.model, self.others), recording.recorded():
            model = Untouched(self.model)
            value = self._first_value(batch, recording)
            drawn = read or self._draws_others()
            model.check()
        if not self._place.number:
            self._seeds_all = drawn
        return value

    def _draws_others(self) -> bool:
        """Whether numpy or Python have drawn since the generators were seeded last."""
        now = drawn_so_far()[1]
        self._seed(*self._seeded)
        return drawn_so_far()[1] != now

    def _first_value(self, batch: object, recording: Recording) -> Tensor:
        try:
            return self.value(batch)
        except RuntimeError as error:
            if type(error) is not RuntimeError or "require grad" not in str(error):
                raise
        recording.outputs.clear()
        self._shared.differentiating = True
        return self.value(batch)

    def _evaluate(self, batch: object, turn: int) -> tuple[Tensor, bool]:
        """The loss of a batch, and whether it draws random numbers."""
        self.hold(turn)
        before = drawn_so_far()
        value = self.drawn_value(batch, ", or on it repeated, to tell a mean from a sum")
        return value, drawn_so_far() != before

    def mean(self) -> float:
        """The loss, in eval mode unless asked otherwise.

        Returns:
            A mean over all samples of all batches.
        """
        total, count = 0.0, 0
        with progress_bar(self.progress):
            self.probe()
            with preserve_state(self.model, self.others), torch.no_grad():
                self.model.train(self.mode == "train")
                for batch, n in self:
                    total += float(self.value(batch)) * self.scale(n) * n
                    count += n
        self.others.complete = True
        return total / count
