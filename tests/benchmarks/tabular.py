"""Tables: a network grown from a linear map against the best of 12 fixed MLPs, at equal training FLOPs.

    python tests/benchmarks/tabular.py --uci DIR --california FILE --out tabular.jsonl --jobs 2 --table docs/tabular.md

DIR has a folder for each of the UCI sets (``data.csv.gz``, the target last, and ``test_mask.csv.gz``, column k the test
rows of split k), FILE is the housing table. Inputs and target are standardised by the training rows; a tenth of these
is set aside, for amplitudes and for the weights that are kept: those of the lowest loss on it, for every network.

All networks get the FLOPs that 3,000 steps of the largest MLP take, with Adam, batches of 64 and a cosine over what
they have used up, but no more than 30,000 steps, after which the smallest have long converged. FLOPs of training are
those of matrix products (three times the forward pass, as counted from the graph); of growth all that its passes and
factorisations take, counted as they run. There are four ways to grow (``GROWN``), all by gain, in the first half of the
FLOPs or steps: they look for places every 300 or 600 steps. Runs that are in the results file already are skipped.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from common import FlopCount, mean, options, paired, plus_minus, read, source_version, study, table
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import dagrow
from dagrow import AddConnection, AddLayer, AddNeurons

SCRIPT = Path(__file__).name
WIDTHS, DEPTHS = (16, 64, 128, 256), (1, 2, 3)
LARGEST_STEPS, MOST_STEPS, LOOK = 3_000, 30_000, 300
BATCH, RATE, MEASURED, JUDGED = 64, 2e-3, 1_500, 1_000
UCI = ("yacht", "energy", "concrete", "bike", "kin40k")
Data = tuple[Tensor, Tensor]


EVERY_OTHER, ONE, NO_LIMIT = dagrow.EveryEpochs(2, first=1), dagrow.Budget(growths=1), dagrow.Budget()


@dataclass(frozen=True)
class Growing:
    """One way to grow."""

    label: str
    operators: tuple[dagrow.Operator, ...]
    schedule: dagrow.Schedule = EVERY_OTHER
    growths: int | None = 3  #: in all
    per_step: dagrow.Budget = ONE
    anew: bool = False  #: whether what was grown is trained from random weights, on the FLOPs that are left


SMALL = AddNeurons(), AddLayer(16, nn.ReLU()), AddConnection()
FOLDED = AddNeurons(), AddLayer(64, nn.ReLU(), exact=4), AddConnection(exact=4)
UNFOLDED = (
    AddNeurons(64, folds=1, ridge=0.1),
    AddLayer(64, nn.ReLU(), folds=1, ridge=0.1, exact=4),
    AddConnection(folds=1, ridge=0.1, exact=4),
)
GROWN = {
    "plans": Growing("layers of 16, whole plans", SMALL, dagrow.EveryEpochs(), None, NO_LIMIT),
    "folded": Growing("three times a layer of 64, if significant", FOLDED),
    "unfolded": Growing("three times a layer of 64, significant or not", UNFOLDED),
    "anew": Growing("the same, then trained anew", UNFOLDED, anew=True),
}


# ---------------------------------------------------------------- tables


@cache
def load(name: str, place: str) -> tuple[Tensor, Tensor | None]:
    """Rows with the target last, and the test rows of each split, if they are given."""
    if name != "california":
        folder = Path(place) / name
        rows, mask = (pd.read_csv(folder / f"{part}.csv.gz", header=None) for part in ("data", "test_mask"))
        return torch.tensor(rows.to_numpy("float64")), torch.tensor(mask.to_numpy("int64")) == 1
    frame = pd.get_dummies(pd.read_csv(place), columns=["ocean_proximity"])
    frame = frame.fillna(frame.median())
    target = frame.pop("median_house_value")
    return torch.tensor(frame.assign(target=target).to_numpy("float64")), None


@dataclass(frozen=True)
class Task:
    """Training rows, rows set aside, and test rows, standardised."""

    train: Data
    held_out: Data
    test: Data

    @classmethod
    def of(cls, name: str, place: str, split: int) -> "Task":
        rows, mask = load(name, place)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(split))
        tested = mask[order, split] if mask is not None else torch.arange(len(rows)) < len(rows) // 5
        test, rest = rows[order[tested]], rows[order[~tested]]
        heldout, train = rest[: len(rest) // 10], rest[len(rest) // 10 :]
        centre, scale = train.mean(0), train.std(0)
        scale = torch.where(scale > 0, scale, 1)
        parts = [((part - centre) / scale).float() for part in (train, heldout, test)]
        return cls(*((part[:, :-1], part[:, -1:]) for part in parts))  # type: ignore[arg-type]

    @property
    def inputs(self) -> int:
        return self.train[0].shape[1]


def mlp(inputs: int, width: int, depth: int) -> nn.Sequential:
    """Depth 0 is a linear map."""
    layers: list[nn.Module] = []
    for a, b in pairwise([inputs, *[width] * depth]):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width if depth else inputs, 1))


def flops_of_step(dag: dagrow.Dag, samples: int) -> int:
    """Forward, and twice as much backward."""
    return 3 * samples * dag.flop_count()


# ---------------------------------------------------------------- one network


class Run:
    """A network in training, with what it has used of its FLOPs."""

    def __init__(self, task: Task, model: nn.Module, seed: int) -> None:
        self.task, self.model = task, model
        self.dag = dagrow.trace(model, task.train[0][:2])
        self.batch = min(BATCH, len(task.train[0]) // 4)
        largest = dagrow.trace(mlp(task.inputs, max(WIDTHS), max(DEPTHS)), task.train[0][:2])
        self.budget, self.limit = LARGEST_STEPS * flops_of_step(largest, self.batch), largest.parameter_count()
        self.used = {"training": 0.0, "growth": 0.0}
        self.optimizer = torch.optim.Adam(model.parameters(), lr=RATE, fused=True)
        self.order = torch.Generator().manual_seed(seed)
        self.best, self.kept, self.steps, self.begun = math.inf, copy.deepcopy(model), 0, 0.0

    @property
    def share(self) -> float:
        """The part of the FLOPs, or of the steps, that is used up."""
        return max(sum(self.used.values()) / self.budget, self.steps / MOST_STEPS)

    def train(self) -> None:
        """Some steps; keeps the weights with the lowest loss on what is set aside."""
        x, y = self.task.train
        cost = flops_of_step(self.dag, self.batch)
        self.model.train()
        for _ in range(LOOK):
            if self.share >= 1:
                break
            done = (self.share - self.begun) / (1 - self.begun)
            for group in self.optimizer.param_groups:
                group["lr"] = RATE * (1 + math.cos(math.pi * done)) / 2
            at = torch.randint(len(x), (self.batch,), generator=self.order)
            self.optimizer.zero_grad()
            mse_loss(self.model(x[at]), y[at]).backward()
            self.optimizer.step()
            self.used["training"] += cost
            self.steps += 1
        if (loss := self.loss(self.task.held_out)) < self.best:
            self.best, self.kept = loss, copy.deepcopy(self.model)

    def loss(self, data: Data, model: nn.Module | None = None) -> float:
        model = model or self.model
        model.eval()
        with torch.no_grad():
            return float(mse_loss(model(data[0]), data[1]))

    def grow(self, how: Growing) -> dagrow.Grower:
        """Trains to the end, and grows in the first half."""
        budget = dagrow.Budget(parameters=self.limit - self.dag.parameter_count(), growths=how.growths)
        grower = dagrow.Grower(
            self.dag,
            mse_loss,
            how.operators,
            budget,
            how.schedule,
            policy=dagrow.ByGain(),
            stop=[dagrow.NothingToAdd(8)],
            per_step=how.per_step,
            optimizer=self.optimizer,
        )
        judged = [tuple(part[:JUDGED] for part in self.task.held_out)]
        look = 0
        while self.share < 1:
            self.train()
            if self.share < 0.5 and not grower.over:
                at = torch.randperm(len(self.task.train[0]), generator=self.order)[:MEASURED]
                measured = [*zip(*(part[at].split(100) for part in self.task.train), strict=True)]
                with FlopCount() as count:
                    grower.step(look, measured, judged)
                self.used["growth"] += count.total
                look += 1
                if how.anew and grower.over:
                    self.restart()
        return grower

    def restart(self) -> None:
        """From random weights."""
        for module in self.model.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=RATE, fused=True)
        self.best, self.begun = math.inf, self.share


def run(job: tuple[str, str, str, int]) -> dict[str, Any]:
    """One network on one split of one table."""
    name, place, variant, split = job
    torch.set_num_threads(1)
    task = Task.of(name, place, split)
    torch.manual_seed(split)
    width, depth = (0, 0) if variant in GROWN else map(int, variant.split("x"))
    state = Run(task, mlp(task.inputs, width, depth), split)
    grower = state.grow(GROWN[variant]) if variant in GROWN else None
    while state.share < 1:
        state.train()
    return {
        "data": name,
        "variant": variant,
        "seed": split,
        "version": source_version(),
        "test_loss": state.loss(task.test, state.kept),
        "held_out": state.best,
        "train_loss": state.loss(task.train, state.kept),
        "parameters": state.dag.parameter_count(),
        "steps": state.steps,
        "used": state.used,
        "budget": state.budget,
        "growths": grower.history.growths() if grower else [],
        "over": grower.over if grower else None,
    }


# ---------------------------------------------------------------- tables of results


def errors(runs: Sequence[dict[str, Any]]) -> dict[str, dict[int, float]]:
    """Root mean square errors of each variant, in standard deviations of the target, by split."""
    by_variant: dict[str, dict[int, float]] = {}
    for run in runs:
        by_variant.setdefault(run["variant"], {})[run["seed"]] = run["test_loss"] ** 0.5
    return by_variant


def picked(runs: Sequence[dict[str, Any]]) -> dict[int, float]:
    """The error of the MLP whose loss on what is set aside is lowest, by split."""
    fixed: dict[int, list[dict[str, Any]]] = {}
    for run in runs:
        if run["variant"] not in GROWN:
            fixed.setdefault(run["seed"], []).append(run)
    chosen = {split: min(group, key=lambda run: run["held_out"]) for split, group in fixed.items()}
    return {split: run["test_loss"] ** 0.5 for split, run in chosen.items()}


def compared(runs: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    """One row a table: MLPs, and every way to grow against the best of them."""
    for name in [*UCI, "california"]:
        group = [run for run in runs if run["data"] == name]
        by = errors(group)
        ranked = sorted((variant for variant in by if variant not in GROWN), key=lambda v: mean(by[v].values()))
        if not ranked:
            continue
        best, middle = by[ranked[0]], by[ranked[len(ranked) // 2]]
        against = [(paired(by.get(way, {}), best), by.get(way, {})) for way in GROWN]
        yield [
            name,
            str(len(best)),
            f"{plus_minus([*best.values()], 4)} ({ranked[0]})",
            f"{mean(middle.values()):.4f}",
            f"{mean(picked(group).values()):.4f}",
            *(f"{mean(ours.values()):.4f} ({d:+.4f} ± {e:.4f})" if ours else "" for (d, e, _), ours in against),
        ]


def sizes(runs: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    """One row a table: growths, parameters, and the part of the FLOPs that growing took."""
    for name in [*UCI, "california"]:
        row = [name]
        for way in GROWN:
            group = [run for run in runs if (run["data"], run["variant"]) == (name, way)]
            growths, count, cost = (
                [measure(run) for run in group]
                for measure in (
                    lambda run: len(run["growths"]),
                    lambda run: run["parameters"],
                    lambda run: run["used"]["growth"] / sum(run["used"].values()),
                )
            )
            row.append(f"{mean(growths):.1f}; {mean(count):,.0f}; {mean(cost):.0%}" if group else "")
        yield row


def results(runs: Sequence[dict[str, Any]]) -> str:
    head = ["data", "splits", "best MLP", "median MLP", "MLP picked", *GROWN]
    names = "\n".join(f"- *{way}*: {how.label}." for way, how in GROWN.items())
    versions = ", ".join(sorted({run["version"] for run in runs}))
    return (
        f"{names}\n\n{table(head, compared(runs))}\n\n{table(['data', *GROWN], sizes(runs))}\n\nGrowths; parameters in "
        f"the end; the part of all FLOPs that growing took. Sources of the package: {versions}."
    )


def main() -> None:
    names = [*GROWN, *(f"{width}x{depth}" for width in WIDTHS for depth in DEPTHS)]
    parser = options(__doc__, names, "0-4")
    parser.add_argument("--uci", help="folder of the UCI sets")
    parser.add_argument("--california", help="the housing table")
    parser.add_argument("--data", type=lambda text: text.split(","), default=[*UCI, "california"])
    arguments = parser.parse_args()
    done = {(run["data"], run["variant"], run["seed"]) for run in read(arguments.out)}
    tasks = [
        (data, arguments.california if data == "california" else arguments.uci, name, split)
        for split in arguments.seeds
        for data in arguments.data
        for name in arguments.variants
        if (data, name, split) not in done
    ]
    study(arguments, run, tasks, SCRIPT, results)


if __name__ == "__main__":
    main()
