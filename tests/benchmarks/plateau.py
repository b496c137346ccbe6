"""A trained network that has stopped improving, made larger: test error after a budget of further steps, arm by arm.

    python tests/benchmarks/plateau.py --cifar DIR --out plateau.jsonl --jobs 2 --table docs/measurements.md

A small network is trained until its validation loss stops falling, which takes it N steps. Then every arm has the same
number of further steps, a part of N, with Adam from its own rate, held for 40 % of them and falling to zero after. The
rates are chosen on seeds of their own, arm by arm, at the budget of half of N. The folder holds ``data_batch_1.bin`` of
the binary CIFAR-10 with a ``test_batch*.bin``, gzipped or not; without it only the digits of scikit-learn are run. Runs
that are in the results file already are skipped. Not a test.
"""

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import cnn
import torch
from common import mean, options, paired, plus_minus, read, source_version, study, table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import dagrow
from dagrow import AddNeurons

SCRIPT = "tests/benchmarks/plateau.py"
BUDGETS = (0.05, 0.15, 0.5, 1.5)  #: parts of N
TUNED_AT, TUNING_SEEDS, RATES = 0.5, (100, 101), (1e-3, 3e-3, 1e-2, 3e-2)
FACTOR, HELD = 4, 0.4  #: of widths; part of the steps at the full rate
EVERY, PATIENCE, LEAST, MOST = 50, 6, 0.005, 5_000  #: steps between looks; looks without a fall by this part; steps

Data = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """Data and a small network.

    Attributes:
        build: a network of some widths, from a seed.
        data: training and test data, from the folder of CIFAR-10.
        widths: those of the small one; the last axis grows first.
        axes: their names.
        batch: samples a step.
        rate: of the small one.
    """

    build: Callable[[Sequence[int], int], nn.Sequential]
    data: Callable[[str], tuple[Data, Data]]
    widths: tuple[int, ...]
    axes: tuple[str, ...]
    batch: int
    rate: float


@cache
def digits(_: str) -> tuple[Data, Data]:
    """The digits of scikit-learn; every fifth is for tests."""
    inputs, target = load_digits(return_X_y=True)
    x, y, is_test = torch.tensor(inputs / 16).float(), torch.tensor(target), torch.arange(len(target)) % 5 == 0
    return (x[~is_test], y[~is_test]), (x[is_test], y[is_test])


def mlp(widths: Sequence[int], seed: int) -> nn.Sequential:
    """Two hidden layers with ReLU."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(64, widths[0]), nn.ReLU(), nn.Linear(widths[0], widths[1]), nn.ReLU(), nn.Linear(widths[1], 10)
    )


TASKS = {
    "digits": Task(mlp, digits, (4, 4), ("0", "2"), 32, 3e-3),
    "cifar": Task(
        lambda widths, seed: cnn.build(3, widths, seed),
        lambda folder: cnn.load("cifar", folder),
        (4, 4, 4),
        cnn.AXES,
        100,
        3e-3,
    ),
}


@dataclass(frozen=True)
class Arm:
    """What is done with the small network: ``neurons`` are added, or it is trained as it is, or anew and large."""

    label: str
    neurons: AddNeurons | None = None
    samples: Literal["auto"] | None = None
    scratch: bool = False
    tuned_as: str | None = None  #: the arm whose rate it has


ZERO = AddNeurons(k=1, init="zero", folds=1)
ARMS = {
    "continue": Arm("the small one goes on"),
    "scratch": Arm("the large one from scratch", scratch=True),
    "zero": Arm("zero fan-out", ZERO),
    "random": Arm("random", AddNeurons(k=1, init="random", folds=1)),
    "default": Arm("the default, all samples", AddNeurons(k=1)),
    "auto": Arm('the default, `samples="auto"`', AddNeurons(k=1), samples="auto", tuned_as="default"),
}


class Split:
    """A seed's training, validation and test data, and its order of batches."""

    def __init__(self, task: Task, folder: str, seed: int) -> None:
        (self.x, self.y), self.test = task.data(folder)
        order = torch.randperm(len(self.y), generator=torch.Generator().manual_seed(seed))
        self.held_out, self.kept = order.tensor_split([len(order) // 10])
        self.batch, self.draws = task.batch, torch.Generator().manual_seed(1_000 + seed)

    def batches(self, indices: Tensor) -> list[Data]:
        return [(self.x[part], self.y[part]) for part in indices.split(self.batch)]

    def steps(self, count: float) -> Iterator[Data]:
        """So many random batches, epoch by epoch."""
        done = 0
        while done < count:
            for batch in self.batches(self.kept[torch.randperm(len(self.kept), generator=self.draws)]):
                if done < count:
                    yield batch
                done += 1


def take(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Data) -> None:
    """One step."""
    optimizer.zero_grad()
    cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.step()


@torch.no_grad()
def judged(model: nn.Module, data: Data) -> tuple[float, float]:
    """Loss, and error in per cent."""
    outputs = torch.cat([model.eval()(part) for part in data[0].split(1_000)])
    model.train()
    return float(cross_entropy(outputs, data[1])), 100 * float((outputs.argmax(1) != data[1]).float().mean())


def small(task: Task, split: Split, seed: int) -> tuple[nn.Sequential, int]:
    """Trained until its validation loss has stopped falling, and the steps that it took."""
    model, best, waited = task.build(task.widths, seed), math.inf, 0
    optimizer, held_out = torch.optim.Adam(model.parameters(), lr=task.rate), split.held_out
    for number, batch in enumerate(split.steps(MOST), start=1):
        take(model, optimizer, batch)
        if number % EVERY == 0:
            loss, _ = judged(model, (split.x[held_out], split.y[held_out]))
            waited = 0 if loss < best * (1 - LEAST) else waited + 1
            best = min(best, loss)
            if waited == PATIENCE:
                break
    return model, number


def enlarged(task: Task, arm: Arm, split: Split, model: nn.Sequential, seed: int) -> tuple[nn.Sequential, float]:
    """The network that an arm starts from, and the seconds that it took to make it so."""
    if arm.scratch:
        return task.build([FACTOR * width for width in task.widths], 10_000 + seed), 0.0
    model, start = copy.deepcopy(model), time.process_time()
    if arm.neurons is not None:
        dag, data = dagrow.trace(model.eval(), split.x[:2]), split.batches(split.kept)
        for axis, width in reversed([*zip(task.axes, task.widths, strict=True)]):
            for neurons in (arm.neurons, ZERO):  # zeros where fewer are worth it than are asked for
                missing = FACTOR * width - next(a.width for a in dag.axes if a.name == axis)
                if missing:
                    operator = replace(neurons, k=missing, axes=(axis,), seed=seed)
                    dagrow.grow(dag, data, cross_entropy, [operator], samples=arm.samples, progress=False)
    return model, time.process_time() - start


def run(job: tuple) -> dict[str, Any]:
    """One seed of one arm: all budgets at its rate; or, without one, the budget by which rates are chosen, at each."""
    name, variant, seed, folder, rate = job
    torch.set_num_threads(1)
    task, arm, split = TASKS[name], ARMS[variant], Split(TASKS[name], folder, seed)
    start = time.process_time()
    trained, steps = small(task, split, seed)
    spent = time.process_time() - start
    first, growing = enlarged(task, arm, split, trained, seed)
    data = (split.x[split.held_out], split.y[split.held_out]) if rate is None else split.test
    results = {
        f"{budget:g} {lr:g}": further(task, split, first, round(budget * steps), lr, data)
        for budget in ([TUNED_AT] if rate is None else [0, *BUDGETS])
        for lr in (RATES if rate is None else [rate])
    }
    known_by = {"task": name, "variant": variant, "seed": seed, "version": source_version(), "rate": rate}
    seconds = {"small": spent, "growing": growing}
    return {**known_by, "steps": steps, **seconds, "results": results, "test_loss": min(results.values())[0]}


def further(task: Task, split: Split, first: nn.Sequential, steps: int, rate: float, data: Data) -> tuple[float, float]:
    """Loss and error after so many further steps."""
    model = copy.deepcopy(first).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda number: min(1.0, (steps - number) / ((1 - HELD) * steps or 1))
    )
    split.draws.manual_seed(2_000)
    for batch in split.steps(steps):
        take(model, optimizer, batch)
        schedule.step()
    return judged(model, data)


def chosen_rates(runs: Sequence[dict[str, Any]]) -> dict[tuple[str, str], float]:
    """Task and arm -> the rate with the least validation loss."""
    tried: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for each in runs:
        if each["rate"] is None:
            tried.setdefault((each["task"], each["variant"]), []).append(each["results"])
    rates = {
        key: min(RATES, key=lambda rate: mean(found[f"{TUNED_AT:g} {rate:g}"][0] for found in results))
        for key, results in tried.items()
    }
    alike = {(name, variant): (name, ARMS[variant].tuned_as or variant) for name in TASKS for variant in ARMS}
    return {key: rates[other] for key, other in alike.items() if other in rates}


def tables(runs: Sequence[dict[str, Any]]) -> str:
    """Test errors by task, arm and budget, and the differences of ``auto`` and the default."""
    parts, rates = [], chosen_rates(runs)
    for name in TASKS:
        of_task = [each for each in runs if each["task"] == name and each["rate"] is not None]
        if not of_task:
            continue
        rows = []
        for variant, arm in ARMS.items():
            own = _own(of_task, variant, rates.get((name, variant)))
            if own:
                errors = [[_at(each, budget)[1] for each in own.values()] for budget in (0, *BUDGETS)]
                cost = mean(each["growing"] / each["small"] for each in own.values())
                cells = [plus_minus(values, 1) for values in errors]
                rows.append([arm.label, f"{rates[name, variant]:g}", *cells, f"{100 * cost:.0f} %"])
        head = ["", "rate", "at once", *(f"{100 * budget:g} % of N" for budget in BUDGETS), "growing, of N steps' time"]
        steps = mean(each["steps"] for each in of_task)
        parts.append(f"{name}, {len({each['seed'] for each in of_task})} seeds, N = {steps:.0f} on average:")
        parts += [table(head, rows), _difference(of_task, rates[name, "default"])]
    return "\n\n".join(parts)


def _at(each: dict[str, Any], budget: float) -> tuple[float, float]:
    """Loss and error of a run."""
    return each["results"][f"{budget:g} {each['rate']:g}"]


def _own(of_task: Sequence[dict[str, Any]], variant: str, rate: float | None) -> dict[int, dict[str, Any]]:
    """Seed -> the run of an arm at a rate."""
    return {each["seed"]: each for each in of_task if (each["variant"], each["rate"]) == (variant, rate)}


def _difference(of_task: Sequence[dict[str, Any]], rate: float) -> str:
    cells = []
    for budget in BUDGETS:
        auto, all_samples = (
            {seed: _at(each, budget)[1] for seed, each in _own(of_task, variant, rate).items()}
            for variant in ("auto", "default")
        )
        difference, error, _ = paired(auto, all_samples)
        cells.append(f"{difference:+.1f} ± {error:.1f}")
    return f'Error with `samples="auto"` minus that with all, paired by seed, with standard errors: {", ".join(cells)}.'


def main() -> None:
    parser = options(__doc__, ARMS, "0-4")
    parser.add_argument("--cifar", default="", help="folder of CIFAR-10; without it digits only")
    arguments = parser.parse_args()
    names = [name for name in TASKS if name != "cifar" or arguments.cifar]

    def missing(jobs: Iterator[tuple]) -> list[tuple]:
        done = {(e["task"], e["variant"], e["seed"], e["rate"]) for e in read(arguments.out)}
        return [job for job in jobs if (*job[:3], job[4]) not in done]

    pairs = [(name, variant) for name in names for variant in arguments.variants]
    tuned = [(name, variant) for name, variant in pairs if ARMS[variant].tuned_as is None]
    tuning = missing((*pair, seed, arguments.cifar, None) for pair in tuned for seed in TUNING_SEEDS)
    table_path, arguments.table = arguments.table, None
    study(arguments, run, tuning, SCRIPT, tables)
    arguments.table, rates = table_path, chosen_rates(read(arguments.out))
    jobs = missing((*pair, seed, arguments.cifar, rates[pair]) for pair in pairs for seed in arguments.seeds)
    study(arguments, run, jobs, SCRIPT, tables)


if __name__ == "__main__":
    main()
