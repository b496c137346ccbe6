"""``fit``: a plain training loop that grows."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal, Unpack

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from dagrow._progress import progress_bar, with_progress
from dagrow.errors import LossError, OptimizerError, check_whole
from dagrow.graph import Dag
from dagrow.growing._annealing import AnnealAfterGrowing
from dagrow.growing._grower import Grower
from dagrow.growing._history import History
from dagrow.growing._planning import Budget
from dagrow.growing._policies import ByLineSearch, Policy
from dagrow.growing._schedules import EveryEpochs, NothingToAdd, Schedule, StopRule
from dagrow.operators import AddNeurons, Operator
from dagrow.statistics import Loss, MeasureOptions, Objective, Step
from dagrow.surgery import Optimizers, check_steps, sequence_of


@with_progress
def fit(
    dag: Dag,
    batches: Iterable[Any],
    loss: Loss | None = None,
    operators: Sequence[Operator] = (AddNeurons(),),
    budget: Budget = Budget(),
    schedule: Schedule = EveryEpochs(),
    *,
    epochs: int,
    optimizer: Optimizers,
    scheduler: LRScheduler | Sequence[LRScheduler] | Literal["anneal"] | None = None,
    validation: Iterable[Any] | None = None,
    measured: Iterable[Any] | None = None,
    policy: Policy = ByLineSearch(),
    stop: Sequence[StopRule] = (NothingToAdd(),),
    per_step: Budget = Budget(),
    step: Step | None = None,
    mode: str = "eval",
    **options: Unpack[MeasureOptions],
) -> History:
    """Trains a model for some epochs, and grows it after each in which its schedule says so.

    An epoch is ``zero_grad``, ``backward`` and ``optimizer.step`` for every batch, in train mode; then
    ``Grower.step``. When growing ends, training goes on. A progress bar shows on terminals. An interrupt ends it
    between two changes of the model: weights and widths are those that were reached.

    Args:
        dag: what :func:`dagrow.trace` returned; its model is trained, and grows in place.
        batches: to train on, any re-iterable of ``(inputs, target)``.
        loss: ``loss(output, target)``, a mean or a sum over samples.
        operators: ways to grow; those of all compete at all places.
        budget: what may be added in all.
        schedule: when to grow.
        epochs: of training, numbered from 0.
        optimizer: of the model's parameters, or a list of them; their state grows along.
        scheduler: of an optimizer's learning rates, or a list; each takes a step after each epoch. ``"anneal"`` holds
            them while it grows, and lowers them to zero after that, see :class:`AnnealAfterGrowing`.
        validation: batches that choose amplitudes, and that schedule, stop rules and policy look at.
        measured: batches that growing looks at; by default those to train on.
        policy: which growths first.
        stop: when growing is over for good; any of these, or a spent budget, ends it.
        per_step: what one step may add.
        step: ``step(model, batch)``, instead of ``loss``, for any other training step.
        mode: the mode in which is measured, ``"eval"`` or ``"train"``.
        options: how batches are measured, see :class:`dagrow.statistics.MeasureOptions`.

    Returns:
        A record for each epoch. The model's modes are as they were found.

    Raises:
        BatchError: the batches do not fit. What was trained before stays, here and below.
        LossError: the loss does not.
        GrowthError: growing was asked for what cannot be.
        OptimizerError: the optimizer or its scheduler does not fit.
    """
    check_whole("fit", 1, epochs=epochs)
    if optimizer is None or optimizer == []:
        raise OptimizerError(f"fit(optimizer={optimizer}): give the torch.optim.Optimizer that trains the model.")
    grower = Grower(
        dag,
        loss,
        operators,
        budget,
        schedule,
        policy=policy,
        stop=stop,
        per_step=per_step,
        optimizer=optimizer,
        step=step,
        mode=mode,
        **options,
    )
    for each in sequence_of(optimizer):
        check_steps(each)
    schedulers = () if scheduler == "anneal" else _checked_schedulers(scheduler, optimizer)
    objective = Objective(dag.model, batches, step=grower.function, mode=mode, **options)
    _probe(objective, validation=validation, measured=measured)
    if scheduler == "anneal":  # nothing is refused any more, and it sets rates at once
        schedulers = tuple(AnnealAfterGrowing(each, grower, epochs) for each in sequence_of(optimizer))
    modes = {module: module.training for module in dag.model.modules()}
    try:
        with progress_bar() as bar:
            for epoch in range(epochs):
                bar.update("training", epoch, epochs, _line(grower.history))
                train_loss = _epoch(objective, sequence_of(optimizer))
                grower.step(epoch, batches if measured is None else measured, validation, train_loss=train_loss)
                _anneal(schedulers, grower.history)
    finally:
        for module in dag.model.modules():
            module.training = modes.get(module, modes[dag.model])
    return grower.history


def _checked_schedulers(scheduler: object, optimizer: Optimizers) -> tuple[LRScheduler, ...]:
    schedulers = () if scheduler is None else tuple(scheduler) if isinstance(scheduler, (list, tuple)) else (scheduler,)
    for each in schedulers:
        if not isinstance(each, LRScheduler):
            raise OptimizerError(
                f"fit(scheduler={each!r}): give one of torch.optim.lr_scheduler, made for the optimizer; 'anneal', or "
                "None."
            )
        if each.optimizer not in sequence_of(optimizer):
            raise OptimizerError("fit(scheduler=...): it belongs to another optimizer than the one that was given.")
    return schedulers


def _probe(objective: Objective, **others: Iterable[Any] | None) -> None:
    """Finds out before any training whether a batch of each can be used."""
    objective.probe()
    for name, batches in others.items():
        if batches is not None:
            objective.with_batches(batches, name).probe()


def _anneal(schedulers: Sequence[LRScheduler], history: History) -> None:
    for scheduler in schedulers:
        if isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step(history[-1].loss)
        else:
            scheduler.step()


def _epoch(objective: Objective, optimizers: Sequence[Optimizer]) -> float:
    """Trains on every batch once. The loss, of each batch before its own step."""
    total, count = 0.0, 0
    objective.model.train()
    with torch.enable_grad():
        for batch, samples in objective.read():
            for optimizer in optimizers:
                optimizer.zero_grad()
            value = objective.drawn_value(batch)
            if not value.requires_grad:
                raise LossError(
                    "the loss does not depend on the model's trainable parameters. Compute it from the model's output, "
                    "without detach(), item() or torch.no_grad()."
                )
            value.backward()
            for optimizer in optimizers:
                optimizer.step()
            total += float(value.detach()) * objective.scale(samples) * samples
            count += samples
    return objective.reported(total / count)


def _line(history: History) -> str:
    if not len(history):
        return "training"
    last = history[-1]
    return f"loss {last.loss:.4g}, {last.parameters:,} parameters{'' if history.over else ', growing'}"
