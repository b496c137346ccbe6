"""The demo: a network that nobody sized, its twin of random neurons, and its final architecture from scratch."""

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from dagrow.graph import trace
from dagrow.growing import AfterEpoch, EveryEpochs, Grower, History, NothingToAdd, RoundRobin, grow
from dagrow.operators import AddNeurons
from dagrow.pictures import Grown
from dagrow.reporting._data import Dataset, Samples

HIDDEN = ("hidden1", "hidden2")
NEVER = EveryEpochs(first=10**9)


@dataclass(frozen=True)
class Config:
    """What is equal between the trainings.

    Attributes:
        epochs: of training.
        growing: after how many of them, from the first, growth may be asked for.
        patience: growth is over when no layer was worth a neuron after this many epochs in a row.
        batch: samples per step.
        measured: the most samples that growth looks at.
        start: hidden widths of a network that grows.
        lr: of Adam; everything else as PyTorch has it.
        seed: of weights, batches and random neurons.
    """

    epochs: int = 30
    growing: int = 20
    patience: int = 2
    batch: int = 32
    measured: int = 6000
    start: tuple[int, ...] = (1, 1)
    lr: float = 1e-3
    seed: int = 0


@dataclass
class Training:
    """One network in training.

    Attributes:
        history: a record for each epoch.
        scores: loss and accuracy on the training and test parts, at first and after each epoch and its growths.
        falls: of the loss on the validation part at each growth.
        refused: how many growths lowered it at no amplitude, so that the neurons came in with zero fan-out.
        seconds: all included.
    """

    name: str
    history: History = field(default_factory=History)
    scores: list[dict[str, float]] = field(default_factory=list)
    falls: list[float] = field(default_factory=list)
    refused: int = 0
    seconds: float = 0.0

    @property
    def widths(self) -> tuple[int, ...]:
        """Of the hidden layers at the end."""
        return tuple(self.history[-1].widths[name] for name in HIDDEN)

    @property
    def parameters(self) -> list[int]:
        """At first and after each epoch."""
        return [sum(link.parameters for link in self.history.snapshots[0].links), *(r.parameters for r in self.history)]

    @property
    def work(self) -> int:
        """Parameters in training, summed over epochs: proportional to the operations of the training steps."""
        return sum(self.parameters[:-1])

    def reached(self, accuracy: float) -> int | None:
        """The first epoch after which the test accuracy was at least this."""
        return next((epoch for epoch, score in enumerate(self.scores) if score["test accuracy"] >= accuracy), None)


Listener = Callable[[Training], None]


def _ignore(training: Training) -> None:
    return None


def compare(data: Dataset, config: Config, started: Listener = _ignore, trained: Listener = _ignore) -> list[Training]:
    """Three networks: grown, grown with as many random neurons at the same times, and from scratch at the final size.

    Args:
        data: what to learn.
        config: what is equal between them.
        started: hears of each of them at first.
        trained: hears of it after each of its epochs.

    Returns:
        The three, trained.
    """
    grown = _Trainee("grown", data, config, config.start, grows=True).train({}, started, trained)
    random = twin_of(grown, data, config, started, trained)
    scratch = _Trainee("from scratch", data, config, grown.widths).train({}, started, trained)
    return [grown, random, scratch]


def twin_of(
    grown: Training, data: Dataset, config: Config, started: Listener = _ignore, trained: Listener = _ignore
) -> Training:
    """The same start, and as many random neurons at the same places and times."""
    growths = {record.epoch: record.grown for record in grown.history}
    return _Trainee("random neurons", data, config, config.start).train(growths, started, trained)


class _Trainee:
    """A network, its optimizer, and its grower, which also keeps the records of a network that does not grow."""

    def __init__(self, name: str, data: Dataset, config: Config, widths: Sequence[int], grows: bool = False) -> None:
        self.training, self.data, self.config = Training(name), data, config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.model = _network(data.features, widths, data.classes)
        self.dag = trace(self.model, data.train.inputs[:2])
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=config.lr)
        self.shuffle = torch.Generator().manual_seed(config.seed)
        self.measured, self.validation = (
            list(zip(s.inputs[: config.measured].split(1000), s.target[: config.measured].split(1000), strict=True))
            for s in (data.train, data.validation)
        )
        schedule = EveryEpochs() if grows else NEVER
        stop = [NothingToAdd(config.patience), AfterEpoch(config.growing)] if grows else []
        self.grower = Grower(
            self.dag, cross_entropy, schedule=schedule, policy=RoundRobin(), stop=stop, optimizer=self.optimizer
        )

    def train(self, repeated: Mapping[int, Sequence[Grown]], started: Listener, trained: Listener) -> Training:
        """Trains for all epochs; ``repeated`` growths, by epoch, become as many random neurons at the same places."""
        training, begun = self.training, time.perf_counter()
        training.history = self.grower.history
        started(training)
        training.scores.append(self._scores())
        for epoch in range(1, self.config.epochs + 1):
            self._epoch()
            for grown in repeated.get(epoch, ()):
                self._add_random(grown)
            receipt = self.grower.step(epoch, self.measured, self.validation)
            training.falls += [part.loss_before - part.loss_after for part in receipt.parts]
            training.history = self.grower.history
            training.scores.append(self._scores())
            training.seconds = time.perf_counter() - begun
            trained(training)
        return training

    def _epoch(self) -> None:
        train = self.data.train
        for batch in torch.randperm(len(train), generator=self.shuffle).split(self.config.batch):
            self.optimizer.zero_grad()
            cross_entropy(self.model(train.inputs[batch]), train.target[batch]).backward()
            self.optimizer.step()

    def _add_random(self, grown: Grown) -> None:
        """As many random neurons at the same place; with zero fan-out if no amplitude lowers the loss."""
        for init in ("random", "zero"):
            operator = AddNeurons(k=grown.neurons, init=init, axes=(grown.where,), seed=self.config.seed)
            receipt = grow(
                self.dag, self.measured, cross_entropy, [operator], validation=self.validation, optimizer=self.optimizer
            )
            if receipt.parts:
                self.training.falls.append(receipt.loss_before - receipt.loss_after)
                self.training.refused += init == "zero"
                return

    def _scores(self) -> dict[str, float]:
        return {**_score("train", self.model, self.data.train), **_score("test", self.model, self.data.test)}


@torch.no_grad()
def _score(part: str, model: nn.Module, samples: Samples) -> dict[str, float]:
    output = model(samples.inputs)
    accuracy = (output.argmax(1) == samples.target).double().mean()
    return {f"{part} loss": float(cross_entropy(output, samples.target)), f"{part} accuracy": float(accuracy)}


def _network(features: int, widths: Sequence[int], classes: int) -> nn.Sequential:
    first, second, output = (nn.Linear(*sizes) for sizes in pairwise((features, *widths, classes)))
    return nn.Sequential(OrderedDict(hidden1=first, act1=nn.SELU(), hidden2=second, act2=nn.SELU(), output=output))
