"""The demo: a network that nobody sized, its twin of random neurons, and its final architecture from scratch."""

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dagrow.graph import trace
from dagrow.growing import grow
from dagrow.operators import AddNeurons
from dagrow.reporting._data import Dataset, Samples
from dagrow.surgery import Receipt

HIDDEN = ("hidden1", "hidden2")


@dataclass(frozen=True)
class Config:
    """What is equal between the runs.

    Attributes:
        epochs: of training.
        growing: in how many of them, from the first, growth may be asked for, after each.
        patience: growth is over when no layer was worth a neuron after this many epochs in a row.
        batch: samples per step.
        measured: the most samples that growth looks at.
        start: hidden widths of a run that grows.
        lr: of Adam; everything else as PyTorch has it.
        seed: of weights, batches and random neurons.
    """

    epochs: int = 30
    growing: int = 20
    patience: int = 2
    batch: int = 32
    measured: int = 6000
    start: tuple[int, int] = (1, 1)
    lr: float = 1e-3
    seed: int = 0


@dataclass(frozen=True)
class Scores:
    """Mean loss and accuracy."""

    loss: float
    accuracy: float


@dataclass(frozen=True)
class Step:
    """One growth, and the network right after it.

    Attributes:
        gain: minus the slope of the loss in gamma, predicted.
        heldout: what a fan-out fitted on the other folds explains of each; with its standard error.
        before, after: the loss on the validation samples, right before and after.
        refused: no amplitude lowered the loss, so the neurons came in with zero fan-out.
    """

    number: int
    epoch: int
    where: str
    neurons: int
    gain: float
    heldout: float | None
    error: float | None
    gamma: float
    before: float
    after: float
    parameters: int
    train: Scores
    test: Scores
    refused: bool = False

    @property
    def fall(self) -> float:
        return self.before - self.after


@dataclass(frozen=True)
class Point:
    """The network after an epoch, and after the growth that followed it."""

    epoch: int
    widths: tuple[int, ...]
    parameters: int
    test: Scores


@dataclass
class Run:
    """One training run."""

    name: str
    points: list[Point] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    train: Scores = Scores(float("nan"), float("nan"))
    seconds: float = 0.0

    @property
    def last(self) -> Point:
        return self.points[-1]

    @property
    def fall(self) -> float:
        """By how much all growths together lowered the validation loss."""
        return sum(step.fall for step in self.steps)

    @property
    def work(self) -> float:
        """Parameters in training, summed over epochs: proportional to the operations of the training steps."""
        return sum(point.parameters for point in self.points[:-1])

    def reached(self, accuracy: float) -> int | None:
        """The first epoch after which the test accuracy was at least this."""
        return next((point.epoch for point in self.points if point.test.accuracy >= accuracy), None)


#: ``enlarge(trainee, epoch)`` yields receipts, and whether they had to come in with zero fan-out
Enlarge = Callable[["_Trainee", int], Iterator[tuple[Receipt, bool]]]


def compare(
    data: Dataset,
    config: Config,
    *,
    started: Callable[[str], None] = lambda name: None,
    stepped: Callable[[Step], None] = lambda step: None,
    trained: Callable[[], None] = lambda: None,
) -> list[Run]:
    """Three runs: grown, grown with as many random neurons at the same times, and from scratch at the final size.

    Args:
        data: what to learn.
        config: what is equal between them.
        started: told the name of each run.
        stepped: told of each growth of the first run.
        trained: called after each epoch of each run.
    """
    started("grown")
    grown = _run("grown", data, config, config.start, _Natural(config), stepped, trained)
    started("random neurons")
    random = _run("random neurons", data, config, config.start, _Scheduled(grown.steps, config.seed), _ignore, trained)
    started("from scratch")
    scratch = _run("from scratch", data, config, grown.last.widths, _never, _ignore, trained)
    return [grown, random, scratch]


def score(model: nn.Module, samples: Samples) -> Scores:
    """Loss and accuracy on samples."""
    with torch.no_grad():
        output = model(samples.inputs)
    hits = (output.argmax(1) == samples.target).double().mean()
    return Scores(float(cross_entropy(output, samples.target)), float(hits))


class _Trainee:
    """A network in training."""

    def __init__(self, data: Dataset, config: Config, widths: tuple[int, ...]) -> None:
        self.data, self.config = data, config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.model = _network(data.features, widths, data.classes)
        self.dag = trace(self.model, data.train.inputs[:2])
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=config.lr)
        self.shuffle = torch.Generator().manual_seed(config.seed)

    def epoch(self) -> None:
        for inputs, target in self._batches():
            self.optimizer.zero_grad()
            cross_entropy(self.model(inputs), target).backward()
            self.optimizer.step()

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        train = self.data.train
        for chosen in torch.randperm(len(train), generator=self.shuffle).split(self.config.batch):
            yield train.inputs[chosen], train.target[chosen]

    def grow(self, operator: AddNeurons) -> Receipt:
        """Grows on training samples; the amplitude is chosen on validation samples."""
        measured = self.data.train.batches(1000, self.config.measured)
        validation = self.data.validation.batches(1000, self.config.measured)
        return grow(self.dag, measured, cross_entropy, [operator], validation=validation, optimizer=self.optimizer)

    def point(self, epoch: int) -> Point:
        widths = tuple(len(self.model.get_parameter(f"{name}.weight")) for name in HIDDEN)
        return Point(epoch, widths, self.dag.parameter_count(), score(self.model, self.data.test))

    def step(self, number: int, epoch: int, receipt: Receipt, refused: bool) -> Step:
        growth = receipt.growth
        assert growth is not None
        return Step(
            number,
            epoch,
            receipt.where,
            receipt.neurons,
            receipt.gain,
            growth.heldout_gain,
            growth.heldout_error,
            receipt.gamma,
            receipt.loss_before,
            receipt.loss_after,
            self.dag.parameter_count(),
            score(self.model, self.data.train),
            score(self.model, self.data.test),
            refused,
        )


def _network(features: int, widths: tuple[int, ...], classes: int) -> nn.Sequential:
    first, second = widths
    layers = {
        "hidden1": nn.Linear(features, first),
        "act1": nn.SELU(),
        "hidden2": nn.Linear(first, second),
        "act2": nn.SELU(),
        "output": nn.Linear(second, classes),
    }
    return nn.Sequential(OrderedDict(layers))


def _run(
    name: str,
    data: Dataset,
    config: Config,
    widths: tuple[int, ...],
    enlarge: Enlarge,
    stepped: Callable[[Step], None],
    trained: Callable[[], None],
) -> Run:
    begun, trainee, run = time.perf_counter(), _Trainee(data, config, widths), Run(name)
    run.points.append(trainee.point(0))
    for epoch in range(1, config.epochs + 1):
        trainee.epoch()
        for receipt, refused in enlarge(trainee, epoch):
            run.steps.append(trainee.step(len(run.steps) + 1, epoch, receipt, refused))
            stepped(run.steps[-1])
        run.points.append(trainee.point(epoch))
        trained()
    run.train = score(trainee.model, data.train)
    run.seconds = time.perf_counter() - begun
    return run


class _Natural:
    """Each hidden layer in turn gets as many neurons as its held-out gain supports, until there are none."""

    def __init__(self, config: Config) -> None:
        self.config, self.misses = config, 0

    def __call__(self, trainee: _Trainee, epoch: int) -> Iterator[tuple[Receipt, bool]]:
        if epoch > self.config.growing or self.misses >= self.config.patience:
            return
        self.misses += 1
        for name in HIDDEN:
            receipt = trainee.grow(AddNeurons(axes=(name,)))
            if receipt.neurons:
                self.misses = 0
                yield receipt, False


class _Scheduled:
    """As many random neurons, at the same places and times; with zero fan-out if no amplitude lowers the loss."""

    def __init__(self, schedule: Sequence[Step], seed: int) -> None:
        self.schedule, self.seed = schedule, seed

    def __call__(self, trainee: _Trainee, epoch: int) -> Iterator[tuple[Receipt, bool]]:
        for step in self.schedule:
            if step.epoch != epoch:
                continue
            receipt = trainee.grow(AddNeurons(k=step.neurons, init="random", axes=(step.where,), seed=self.seed))
            if receipt.neurons:
                yield receipt, False
            else:
                yield trainee.grow(AddNeurons(k=step.neurons, init="zero", axes=(step.where,), seed=self.seed)), True


def _never(trainee: _Trainee, epoch: int) -> Iterator[tuple[Receipt, bool]]:
    return iter(())


def _ignore(step: Step) -> None:
    return None
