"""The demo: a trained network that has stopped improving, and what to do with a budget too small to start over."""

import copy
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import skip_init

from dagrow.graph import trace
from dagrow.growing import enlarge, grow
from dagrow.operators import AddNeurons
from dagrow.reporting._data import Dataset, Samples

CONTINUED, SCRATCH, RANDOM, COPIES, ENLARGED = "small", "from scratch", "random", "copies", "dagrow"
ARMS = (ENLARGED, SCRATCH, RANDOM, COPIES, CONTINUED)
LOOK, PATIENCE, LEAST, CUT, END = 100, 3, 0.005, 0.3, 0.02  #: how the small network is trained, see stopped_improving
MEASURED = 1000  #: samples that growing looks at, at most

Batch = tuple[Tensor, Tensor]
Init = Literal["copy", "random", "zero"]


@dataclass(frozen=True)
class Config:
    """What is equal between the arms, and the learning rates, which are not.

    Attributes:
        rates: of Adam, by arm, for each of the budgets. Those of the demo were found on other seeds than it shows.
        budgets: further steps, as parts of those that the small network took.
        widths: hidden ones of the small network.
        factor: of each width.
        batch: samples per step.
        first: rate of Adam for the small network.
        held: part of the further steps at the full rate; after that it falls to zero along half a cosine.
        noise: on the fan-in of copies, in standard deviations of the layer's weights; equal units would stay equal.
        most: steps of the small network.
    """

    rates: Mapping[str, tuple[float, ...]]
    budgets: tuple[float, ...] = (0.025, 0.05, 0.075, 0.1)
    widths: tuple[int, ...] = (8, 8, 8, 8)
    factor: float = 2.0
    batch: int = 100
    first: float = 5e-3
    held: float = 0.4
    noise: float = 0.3
    most: int = 20_000

    @property
    def large(self) -> tuple[int, ...]:
        """The widths that ``enlarge`` makes."""
        return tuple(math.floor(self.factor * width + 0.5) for width in self.widths)


#: by validation error on the seeds 100 to 103, arm by arm and budget by budget: tests/benchmarks/demo.py
DIGITS = Config(
    {
        ENLARGED: (0.005, 0.005, 0.005, 0.005),
        SCRATCH: (0.02, 0.02, 0.02, 0.02),
        RANDOM: (0.005, 0.01, 0.005, 0.01),
        COPIES: (0.005, 0.02, 0.02, 0.02),
        CONTINUED: (0.005, 0.005, 0.01, 0.01),
    }
)
#: likewise, of the rates up to 0.02 and on the seeds 100 and 101
MNIST = Config(
    {
        ENLARGED: (0.0025, 0.0025, 0.0025, 0.0025),
        SCRATCH: (0.01, 0.0025, 0.0025, 0.0025),
        RANDOM: (0.01, 0.0025, 0.005, 0.0025),
        COPIES: (0.02, 0.02, 0.02, 0.02),
        CONTINUED: (0.01, 0.005, 0.0025, 0.0025),
    }
)


@dataclass
class Outcome:
    """What an arm comes to.

    Attributes:
        seconds: to make the network that it starts from.
        step: seconds of one further step, on average.
        errors: on the test part, in per cent: at once, and after each budget.
    """

    seconds: float
    step: float = math.nan
    errors: list[float] = field(default_factory=list)


@dataclass
class Run:
    """All arms with one seed.

    Attributes:
        steps: that the small network took.
        arms: by name.
    """

    seed: int
    steps: int
    arms: dict[str, Outcome] = field(default_factory=dict)

    def is_ahead(self, arm: str, budget: int) -> bool:
        """Whether an arm has a lower test error than each of the others, after a budget by its number from 1."""
        return all(self.arms[arm].errors[budget] < o.errors[budget] for name, o in self.arms.items() if name != arm)


Listener = Callable[[str, float], None]  #: what is done, and the part of the run that is done


def _ignore(doing: str, done: float) -> None:
    return None


def run(data: Dataset, config: Config, seed: int, listener: Listener = _ignore) -> Run:
    """A small network, trained until it stops improving, and then every arm with every budget.

    Args:
        data: what to learn.
        config: what is equal between the arms.
        seed: of weights, batches and random neurons.
        listener: hears of each part of the work.

    Returns:
        What came out.
    """
    listener("the small network", 0.0)
    small, steps = stopped_improving(data, config, seed)
    found, count = Run(seed, steps), len(ARMS) * len(config.budgets)
    for number, arm in enumerate(ARMS):
        begun = time.perf_counter()
        start = start_of(arm, small, data, config, seed)
        outcome = found.arms[arm] = Outcome(time.perf_counter() - begun)
        outcome.errors.append(score(start, data.test)[1])
        begun = time.perf_counter()
        for place, budget in enumerate(config.budgets):
            listener(arm, 0.3 + 0.7 * (number * len(config.budgets) + place) / count)
            model = further(start, data, config, round(budget * steps), config.rates[arm][place], seed)
            outcome.errors.append(score(model, data.test)[1])
        outcome.step = (time.perf_counter() - begun) / sum(round(budget * steps) for budget in config.budgets)
    return found


def stopped_improving(data: Dataset, config: Config, seed: int) -> tuple[nn.Sequential, int]:
    """The small network, and the steps that it took.

    Its rate is cut whenever the validation loss, looked at every 100 steps, has not fallen by 0.5 % for more than three
    looks, until it is below 2 % of what it was.

    Args:
        data: what to learn.
        config: the rate at first, the widths and the batches.
        seed: of weights and batches.

    Returns:
        The network and the number of steps.
    """
    model, batches = network(data, config.widths, seed), _batches(data.train, config.batch, seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.first, fused=True)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=CUT, patience=PATIENCE, threshold=LEAST)
    steps = 0
    while steps < config.most and optimizer.param_groups[0]["lr"] > END * config.first:
        for _ in range(LOOK):
            _step(model, optimizer, next(batches))
        steps += LOOK
        plateau.step(score(model, data.validation)[0])
    return model, steps


def start_of(arm: str, small: nn.Sequential, data: Dataset, config: Config, seed: int) -> nn.Sequential:
    """The network that an arm starts from; the small one stays as it is."""
    if arm == CONTINUED:
        return small
    assert arm in ARMS
    if arm == SCRATCH:
        return network(data, config.large, seed + 10_000)
    model = copy.deepcopy(small)
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed))[:MEASURED]
    measured = _parts(Samples(data.train.inputs[order], data.train.target[order]))
    dag, validation = trace(model, data.train.inputs[:2]), _parts(data.validation)
    if arm == ENLARGED:
        enlarge(dag, measured, cross_entropy, config.factor, validation=validation)
        return model
    for number, (width, large) in enumerate(zip(config.widths, config.large, strict=True), 1):
        name = f"hidden{number}"
        inits: tuple[Init, ...] = ("copy",) if arm == COPIES else ("random", "zero")
        for init in inits:  # zero where no amplitude lowers the loss
            operator = AddNeurons(k=large - width, init=init, axes=(name,), folds=1, seed=seed)
            if grow(dag, measured, cross_entropy, [operator], validation=validation).parts:
                break
        if arm == COPIES:
            _add_noise(model.get_submodule(name), width, config.noise, seed)
    return model


@torch.no_grad()
def _add_noise(layer: nn.Module, width: int, noise: float, seed: int) -> None:
    """On the rows from ``width`` on."""
    assert isinstance(layer, nn.Linear)
    rows, generator = layer.weight[width:], torch.Generator().manual_seed(seed)
    rows += noise * layer.weight.std() * torch.randn(rows.shape, generator=generator)


def further(start: nn.Sequential, data: Dataset, config: Config, steps: int, rate: float, seed: int) -> nn.Sequential:
    """A copy of ``start`` after so many steps with a schedule of their own."""
    model, batches = copy.deepcopy(start), _batches(data.train, config.batch, seed + 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, fused=True)
    held = config.held * steps

    def part(step: int) -> float:
        return (1 + math.cos(math.pi * max(0.0, (step - held) / (steps - held or 1)))) / 2

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, part)
    for _ in range(steps):
        _step(model, optimizer, next(batches))
        schedule.step()
    return model


def network(data: Dataset, widths: tuple[int, ...], seed: int) -> nn.Sequential:
    """Hidden layers with ReLU, and weights as He et al. 2015 draw them."""
    layers, generator = OrderedDict[str, nn.Module](), torch.Generator().manual_seed(seed)
    for number, sizes in enumerate(pairwise((data.features, *widths, data.classes)), 1):
        layer = skip_init(nn.Linear, *sizes)
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
        nn.init.zeros_(layer.bias)
        last = number > len(widths)
        layers |= {"output": layer} if last else {f"hidden{number}": layer, f"act{number}": nn.ReLU()}
    return nn.Sequential(layers)


def _batches(samples: Samples, size: int, seed: int) -> Iterator[Batch]:
    """Without end, epoch by epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for part in torch.randperm(len(samples), generator=generator).split(size):
            yield samples.inputs[part], samples.target[part]


def _parts(samples: Samples) -> list[Batch]:
    return list(zip(samples.inputs.split(1000), samples.target.split(1000), strict=True))


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    optimizer.zero_grad()
    cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.step()


@torch.no_grad()
def score(model: nn.Module, samples: Samples) -> tuple[float, float]:
    """Loss, and error in per cent."""
    output = model(samples.inputs)
    error = (output.argmax(1) != samples.target).double().mean()
    return float(cross_entropy(output, samples.target)), 100 * float(error)
