"""From a linear map to a teacher: does growing recover a graph that nobody tells it?

    python tests/benchmarks/recovery.py --out recovery.jsonl --jobs 2 --table docs/recovery.md

The teacher has two hidden layers of tanh units and a connection past the second, with LeCun-normal weights. Its
outputs, of unit variance, are observed under noise of a standard deviation of 0.2, so that the teacher's own test loss
is about 0.04. ``dagrow.fit`` starts from one linear layer, with all ways to grow, and may end with twice the teacher's
parameters. Rivals get the same data, optimizer, schedule and number of epochs: the teacher's own architecture from
random weights, and an MLP with the parameters that growing may use. Runs that are in the results file already are
skipped.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import mean, options, plus_minus, read, source_version, study, table
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import dagrow
from dagrow import AddConnection, AddLayer, AddNeurons

SCRIPT = Path(__file__).name
INPUTS, HIDDEN, OUTPUTS, NOISE = 8, 12, 4, 0.2
TRAINED, HELD_OUT, TESTED, BATCH, MEASURED = 20_000, 2_000, 20_000, 100, 2_000
EPOCHS, RATE, FACTOR = 200, 5e-3, 2
Data = tuple[Tensor, Tensor]


class Teacher(nn.Module):
    """Two hidden layers, and a connection from the first to the output."""

    def __init__(self, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(INPUTS, hidden), nn.Linear(hidden, hidden)
        self.out, self.past = nn.Linear(hidden, OUTPUTS), nn.Linear(hidden, OUTPUTS, bias=False)
        for layer in (self.one, self.two, self.out, self.past):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        first = torch.tanh(self.one(x))
        return self.out(torch.tanh(self.two(first))) + self.past(first)


@dataclass(frozen=True)
class Task:
    """Data of one seed."""

    train: list[Data]
    measured: list[Data]
    held_out: list[Data]
    test: Data
    parameters: int  #: of the teacher
    floor: float  #: the teacher's own test loss

    @classmethod
    def of(cls, seed: int) -> "Task":
        torch.manual_seed(seed)
        teacher, x = Teacher(), torch.randn(TRAINED + HELD_OUT + TESTED, INPUTS)
        with torch.no_grad():
            signal = teacher(x)
        signal = signal / signal.std(0)
        y = signal + NOISE * torch.randn_like(signal)
        parts = [*zip(*(t.split((TRAINED, HELD_OUT, TESTED)) for t in (x, y)), strict=True)]
        train, measured = ([*zip(*(t.split(size) for t in parts[0]), strict=True)] for size in (BATCH, MEASURED))
        count = sum(p.numel() for p in teacher.parameters())
        return cls(train, measured, [parts[1]], parts[2], count, float(mse_loss(signal[-TESTED:], y[-TESTED:])))


class Shuffled:
    """Batches in another order each time they are read."""

    def __init__(self, batches: Sequence[Data], seed: int) -> None:
        self.batches, self.order = batches, torch.Generator().manual_seed(seed)

    def __iter__(self) -> Any:
        return (self.batches[i] for i in torch.randperm(len(self.batches), generator=self.order).tolist())

    def __len__(self) -> int:
        return len(self.batches)


BY_GAIN, NO_LIMIT = dagrow.ByGain(), dagrow.Budget()
OPERATORS = (AddNeurons(), AddConnection(), *(AddLayer(k, nn.Tanh()) for k in (4, 8, 16)))


@dataclass(frozen=True)
class Variant:
    """One way to get a network: how it starts, and how it grows, if it does."""

    label: str
    start: Callable[[int], nn.Module]
    schedule: dagrow.Schedule | None = None
    policy: dagrow.Policy = BY_GAIN
    per_step: dagrow.Budget = NO_LIMIT


def _linear(parameters: int) -> nn.Module:
    return nn.Sequential(nn.Linear(INPUTS, OUTPUTS))


def _mlp(parameters: int) -> nn.Module:
    """Two equal hidden layers with as many parameters as the grown network may have."""

    def layers(width: int) -> nn.Module:
        return nn.Sequential(
            nn.Linear(INPUTS, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, OUTPUTS)
        )

    def count(width: int) -> int:
        return sum(p.numel() for p in layers(width).parameters())

    return layers(max(width for width in range(1, 200) if count(width) <= FACTOR * parameters))


PLATEAU, ONE = dagrow.OnPlateau(5, 0.01), dagrow.Budget(growths=1)
VARIANTS = {
    "gain": Variant("grown on plateaus, one growth at a time, by gain", _linear, PLATEAU, per_step=ONE),
    "line_search": Variant(
        "grown on plateaus, one at a time, by line search", _linear, PLATEAU, dagrow.ByLineSearch(), ONE
    ),
    "short": Variant(
        "grown on plateaus, one at a time, by 1,000 steps of training of the best 6",
        _linear,
        PLATEAU,
        dagrow.ShortTraining(steps=1_000, top=6, lr=RATE),
        ONE,
    ),
    "teacher": Variant("the teacher's architecture from scratch", lambda _: Teacher()),
    "mlp": Variant(f"an MLP with {FACTOR} times the teacher's parameters from scratch", _mlp),
}


class Never(dagrow.Schedule):
    """For networks that do not grow."""

    def due(self, now: dagrow.Situation) -> bool:
        return False


def run(job: tuple[str, int]) -> dict[str, Any]:
    """One network, from its start to the test samples."""
    name, seed = job
    torch.set_num_threads(1)
    variant, task = VARIANTS[name], Task.of(seed)
    torch.manual_seed(10_000 + seed)
    model = variant.start(task.parameters)
    dag = dagrow.trace(model, task.test[0][:2])
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE, fused=True)
    affordable = FACTOR * task.parameters - dag.parameter_count()
    history = dagrow.fit(
        dag,
        Shuffled(task.train, seed),
        mse_loss,
        OPERATORS,
        dagrow.Budget(parameters=max(0, affordable)),
        variant.schedule or Never(),
        epochs=EPOCHS,
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS),
        validation=task.held_out,
        measured=task.measured[:5],
        policy=variant.policy,
        per_step=variant.per_step,
        stop=[dagrow.NothingToAdd(3), dagrow.AfterEpoch(EPOCHS * 3 // 5)],
    )
    with torch.no_grad():
        test = float(mse_loss(model(task.test[0]), task.test[1]))
    return {
        "variant": name,
        "seed": seed,
        "version": source_version(),
        "test_loss": test,
        "floor": task.floor,
        "ratio": test / task.floor,
        "parameters": dag.parameter_count(),
        "teacher": task.parameters,
        "edges": len(dag.edges),
        "growths": history.growths(),
        "over": history.over,
        "seconds": history[-1].seconds,
    }


def results(runs: Sequence[dict[str, Any]]) -> str:
    by_name = {name: [run for run in runs if run["variant"] == name] for name in VARIANTS}
    head = ["network", "seeds", "test loss / teacher's", "worst", "within 5 %", "parameters / teacher's", "layers"]
    rows = [
        [
            VARIANTS[name].label,
            str(len(group)),
            plus_minus([r["ratio"] for r in group], 3),
            f"{max(r['ratio'] for r in group):.3f}",
            f"{sum(r['ratio'] <= 1.05 for r in group)}/{len(group)}",
            f"{mean(r['parameters'] / r['teacher'] for r in group):.2f}",
            f"{mean(r['edges'] for r in group):.1f}",
        ]
        for name, group in by_name.items()
        if group
    ]
    versions = ", ".join(sorted({run["version"] for run in runs}))
    return f"{table(head, rows)}\n\nMeans over seeds ± standard deviations. Sources of the package: {versions}."


def main() -> None:
    arguments = options(__doc__, VARIANTS, "0-4").parse_args()
    done = {(run["variant"], run["seed"]) for run in read(arguments.out)}
    tasks = [(name, seed) for seed in arguments.seeds for name in arguments.variants if (name, seed) not in done]
    study(arguments, run, tasks, SCRIPT, results)


if __name__ == "__main__":
    main()
