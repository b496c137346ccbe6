"""MNIST: a 784-1-1-10 network grown to 784-110-61-10, by every way to make neurons, with equal training.

    python tests/benchmarks/mnist.py --data DIR --out results.jsonl --jobs 2 --table docs/mnist.md

DIR holds the four files of MNIST (train-images-idx3-ubyte.gz, ...). Runs that are in the results file already are
skipped. Not a test: pytest does not collect it.
"""

import gzip
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import FlopCount, mean, options, paired, plus_minus, read, source_version, study, table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import dagrow
from dagrow import AddNeurons, MoveWeights

SCRIPT = "tests/benchmarks/mnist.py"
HIDDEN = (110, 61)
STEPS = 8  #: growth steps; at each both axes grow, the later one first
EPOCHS = 1  #: of training before each growth step
LAST_EPOCHS = 2  #: of training after the last one
BATCH, RATE = 128, 1e-3
HELD_OUT = 5_000  #: training images that nobody trains on; they choose amplitudes
MEASURED = 6_000  #: training images for the statistics of one growth, drawn anew for each
COUNTED = 0  #: the seed with which the FLOPs of growths are counted
AXES = ("fc1", "fc2")
CONSUMER = {"fc1": "fc2", "fc2": "fc3"}


@dataclass(frozen=True)
class Variant:
    """One way to get a network.

    Attributes:
        neurons: the operator, but for k, axes and seed; None trains ``hidden`` from scratch.
        move: whether the consumer's own weights move first.
        open: whether the number of neurons is left open: each axis is asked once at each step.
        hidden: widths at the start.
    """

    label: str
    neurons: AddNeurons | None = None
    move: bool = False
    open: bool = False
    hidden: tuple[int, int] = (1, 1)


def _optimal(solver: Any, folds: int) -> AddNeurons:
    return AddNeurons(k=1, solver=solver, folds=folds)


VARIANTS: dict[str, Variant] = {
    "sequential_cv": Variant("sequential, cross-validated (the default)", _optimal("sequential", 4)),
    "sequential": Variant("sequential, not cross-validated", _optimal("sequential", 1)),
    "joint_cv": Variant("joint, cross-validated", _optimal("joint", 4)),
    "joint": Variant("joint, not cross-validated", _optimal("joint", 1)),
    "unprojected_cv": Variant("unprojected, cross-validated", _optimal("unprojected", 4)),
    "unprojected": Variant("unprojected, not cross-validated", _optimal("unprojected", 1)),
    "features_cv": Variant(
        "random fan-in, fitted fan-out, cross-validated", AddNeurons(k=1, init="random_features", folds=4)
    ),
    "features": Variant(
        "random fan-in, fitted fan-out, not cross-validated", AddNeurons(k=1, init="random_features", folds=1)
    ),
    "random": Variant("random", AddNeurons(k=1, init="random", folds=1)),
    "gradmax": Variant("GradMax", AddNeurons(k=1, init="gradmax", folds=1)),
    "move_sequential_cv": Variant("move, then sequential, cross-validated", _optimal("sequential", 4), move=True),
    "move_joint_cv": Variant("move, then joint, cross-validated", _optimal("joint", 4), move=True),
    "move_features_cv": Variant(
        "move, then random fan-in, fitted fan-out, cross-validated",
        AddNeurons(k=1, init="random_features", folds=4),
        move=True,
    ),
    "move_random": Variant("move, then random", AddNeurons(k=1, init="random", folds=1), move=True),
    "sequential_r0001": Variant("sequential, ridge=0.0001", AddNeurons(k=1, ridge=1e-4)),
    "sequential_r01": Variant("sequential, ridge=0.01", AddNeurons(k=1, ridge=1e-2)),
    "sequential_r1": Variant("sequential, ridge=1", AddNeurons(k=1, ridge=1.0)),
    "open": Variant("open: sequential, cross-validated, k=None", AddNeurons(k=None), open=True),
    "zero": Variant("zero fan-out", AddNeurons(k=1, init="zero", folds=1)),
    "scratch": Variant(f"from scratch, {HIDDEN[0]} and {HIDDEN[1]}", hidden=HIDDEN),
    "scratch_small": Variant("from scratch, 33 and 25 (about where the open run ends)", hidden=(33, 25)),
    "scratch_large": Variant("from scratch, 1000 and 1000", hidden=(1000, 1000)),
}
DEFAULT = "sequential_cv"

Data = tuple[Tensor, Tensor]


def _images(path: Path) -> Tensor:
    raw = gzip.decompress(path.read_bytes())
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=16).reshape(-1, 784).astype(np.float32)) / 255


def _labels(path: Path) -> Tensor:
    return torch.from_numpy(np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=8).astype(np.int64))


@cache
def load(folder: str) -> tuple[Data, Data]:
    """The 60,000 training and the 10,000 test images, normalised by the training images' mean and deviation."""
    root = Path(folder)
    train, test = (_images(root / f"{part}-images-idx3-ubyte.gz") for part in ("train", "t10k"))
    centre, scale = train.mean(), train.std()
    labels = [_labels(root / f"{part}-labels-idx1-ubyte.gz") for part in ("train", "t10k")]
    return ((train - centre) / scale, labels[0]), ((test - centre) / scale, labels[1])


def build(hidden: tuple[int, int], seed: int) -> nn.Module:
    """An MLP with SELU and LeCun-normal weights."""
    torch.manual_seed(seed)
    widths = (784, *hidden, 10)
    layers = [nn.Linear(i, o) for i, o in pairwise(widths)]
    for layer in layers:
        nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
        nn.init.zeros_(layer.bias)
    names = ("fc1", "act1", "fc2", "act2", "fc3")
    return nn.Sequential(OrderedDict(zip(names, (layers[0], nn.SELU(), layers[1], nn.SELU(), layers[2]), strict=True)))


def step_flops(model: nn.Module, samples: int) -> int:
    """Matrix products of a training step: forward, weight gradients, and input gradients but for the first layer."""
    sizes = [layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Linear)]
    return 2 * samples * (3 * sum(sizes) - sizes[0])


@dataclass
class Run:
    """A network in training. Every seed has its own split, order of batches and samples, the same for all variants.

    Counting FLOPs takes time, so that it is done with one seed only, and that seed's times are left out of the tables.
    """

    variant: Variant
    seed: int
    train: Data
    model: nn.Module = field(init=False)
    flops: dict[str, float] = field(default_factory=lambda: {"training": 0.0, "growth": 0.0})
    wall: dict[str, float] = field(default_factory=lambda: {"training": 0.0, "growth": 0.0})
    cpu: dict[str, float] = field(default_factory=lambda: {"training": 0.0, "growth": 0.0})
    growths: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model = build(self.variant.hidden, self.seed)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=RATE, fused=True)
        self.counted = self.seed == COUNTED
        self.order = torch.Generator().manual_seed(1_000 + self.seed)
        self.draws = torch.Generator().manual_seed(2_000 + self.seed)
        split = torch.randperm(len(self.train[1]), generator=torch.Generator().manual_seed(3_000 + self.seed))
        self.held_out, self.kept = self.batches(split[:HELD_OUT]), split[HELD_OUT:]
        self.dag = dagrow.trace(self.model, self.train[0][:2]) if self.variant.neurons else None

    def batches(self, indices: Tensor, size: int = 1_000) -> list[Data]:
        x, y = self.train
        return [(x[part], y[part]) for part in indices.split(size)]

    def clocked(self, what: str) -> "Clock":
        return Clock(self, what)

    def epochs(self, count: int) -> None:
        """Trains on all images that are not held out."""
        with self.clocked("training"):
            for _ in range(count):
                order = self.kept[torch.randperm(len(self.kept), generator=self.order)]
                for part in order.split(BATCH):
                    self.optimizer.zero_grad()
                    cross_entropy(self.model(self.train[0][part]), self.train[1][part]).backward()
                    self.optimizer.step()
                    self.flops["training"] += step_flops(self.model, len(part))

    def width(self, axis: str) -> int:
        return self.model.get_submodule(axis).out_features  # type: ignore[return-value]

    def grow(self, step: int, axis: str, k: int | None) -> int:
        """Asks for k neurons (None: as many as are worth it). Returns how many there are more."""
        assert self.dag is not None
        assert self.variant.neurons is not None
        neurons = replace(self.variant.neurons, k=k, axes=(axis,), seed=self.seed)
        operators = [MoveWeights(edges=(CONSUMER[axis],)), neurons] if self.variant.move else [neurons]
        drawn = self.kept[torch.randperm(len(self.kept), generator=self.draws)[:MEASURED]]
        before = self.width(axis)
        with self.clocked("growth"), FlopCount() if self.counted else nullcontext() as count:
            receipt = dagrow.grow(
                self.dag,
                self.batches(drawn),
                cross_entropy,
                operators,
                validation=self.held_out,
                optimizer=self.optimizer,
            )
        self.flops["growth"] += count.total if count else 0.0
        added = self.width(axis) - before
        where = {"step": step, "axis": axis, "asked": k, "added": added, "fan_out": self.largest_fan_out()}
        self.growths.append({**where, **_described(receipt)})
        return added

    def largest_fan_out(self) -> float:
        """The largest norm of the weights out of a hidden neuron (about 1 at a LeCun-normal initialisation)."""
        layers = [self.model.get_submodule(name) for name in CONSUMER.values()]
        return max(float(layer.weight.detach().norm(dim=0).max()) for layer in layers)

    def fill(self, axis: str, k: int) -> None:
        """Neurons with fan-out zero, where none was worth adding and widths are to be equal."""
        assert self.dag is not None
        with self.clocked("growth"):
            operator = AddNeurons(k=k, init="zero", axes=(axis,), folds=1, seed=self.seed)
            dagrow.grow(self.dag, self.held_out[:1], cross_entropy, [operator], optimizer=self.optimizer)

    def step(self, number: int) -> None:
        """One growth step of both axes, the later one first."""
        for axis, final in reversed(list(zip(AXES, HIDDEN, strict=True))):
            if self.variant.open:
                self.grow(number, axis, None)
                continue
            k = round(1 + (final - 1) * number / STEPS) - self.width(axis)
            missing = k - self.grow(number, axis, k)
            if missing:
                self.fill(axis, missing)

    def loss(self, data: Data) -> tuple[float, float]:
        """Mean loss and accuracy."""
        with torch.no_grad():
            output = self.model(data[0])
        return float(cross_entropy(output, data[1])), float((output.argmax(1) == data[1]).float().mean())


@dataclass
class Clock:
    """Adds the time spent inside to a run."""

    run: Run
    what: str

    def __enter__(self) -> None:
        self.started = time.perf_counter(), time.process_time()

    def __exit__(self, *_: object) -> None:
        self.run.wall[self.what] += time.perf_counter() - self.started[0]
        self.run.cpu[self.what] += time.process_time() - self.started[1]


def _described(receipt: dagrow.Receipt) -> dict[str, Any]:
    parts = [part for part in (receipt.parts or (receipt,)) if part.growth is not None]
    return {
        "loss_before": receipt.loss_before,
        "loss_after": receipt.loss_after,
        "parts": [
            {
                "operator": type(part.growth.operator).__name__,
                "neurons": part.neurons,
                "gamma": part.gamma,
                "gain": part.gain,
                "heldout_gain": part.growth.heldout_gain,
                "heldout_error": part.growth.heldout_error,
                "drop": part.drop,
                "notes": list(part.growth.notes),
            }
            for part in parts
            if part.growth is not None
        ],
    }


def run(task: tuple[str, str, int]) -> dict[str, Any]:
    """One variant with one seed, from initialisation to the test images."""
    folder, name, seed = task
    torch.set_num_threads(1)
    train, test = load(folder)
    state = Run(VARIANTS[name], seed, train)
    for number in range(1, STEPS + 1):
        state.epochs(EPOCHS)
        if state.dag is not None:
            state.step(number)
    state.epochs(LAST_EPOCHS)
    losses = {
        "test": state.loss(test),
        "train": state.loss((train[0][state.kept], train[1][state.kept])),
        "held_out": state.loss(tuple(torch.cat(part) for part in zip(*state.held_out, strict=True))),  # type: ignore[arg-type]
    }
    return {
        "variant": name,
        "seed": seed,
        "version": source_version(),
        "widths": [state.width(axis) for axis in AXES],
        **{f"{part}_loss": loss for part, (loss, _) in losses.items()},
        **{f"{part}_accuracy": accuracy for part, (_, accuracy) in losses.items()},
        "fan_out": state.largest_fan_out(),
        "wall": state.wall,
        "cpu": state.cpu,
        "flops": state.flops,
        "growths": state.growths,
    }


def results(runs: Sequence[dict[str, Any]]) -> str:
    """The tables, from the results file and nothing else."""
    by_name = {name: [r for r in runs if r["variant"] == name] for name in VARIANTS}
    by_name = {name: group for name, group in by_name.items() if group}
    ordered = sorted(by_name.items(), key=lambda item: mean(r["test_loss"] for r in item[1]))
    return "\n\n".join(
        [
            f"{len(runs)} runs; column n counts the seeds of each variant. Package sources "
            f"{', '.join(sorted({r['version'] for r in runs}))}. Best test loss first; mean ± standard deviation.",
            _table([_row(name, group) for name, group in ordered]),
            "Differences to the default, seed by seed (mean ± standard error over seeds; below 0 is less loss):",
            _comparison(dict(ordered)),
            "Along the way: by how much a growth itself lowers the loss of the images set aside (mean over growths), "
            "and that loss before some steps, an epoch of training after the growth before:",
            _along({name: group for name, group in ordered if VARIANTS[name].neurons is not None}),
            *(_open(name, by_name[name]) for name in by_name if VARIANTS[name].open),
        ]
    )


def _table(rows: Sequence[Sequence[str]]) -> str:
    head = (
        "variant",
        "n",
        "test loss",
        "test error, %",
        "training loss",
        "hidden widths",
        "nothing added",
        "largest fan-out",
        "wall, s",
        "growth, wall s",
        "growth, CPU s",
        "training, GFLOP",
        "growth, GFLOP",
    )
    return table(head, rows)


def _row(name: str, runs: Sequence[dict[str, Any]]) -> list[str]:
    grown = VARIANTS[name].neurons is not None
    none = mean(sum(not g["added"] for g in r["growths"]) for r in runs)
    asked = mean(len(r["growths"]) for r in runs)
    timed, counted = ([r for r in runs if (r["seed"] == COUNTED) == which] for which in (False, True))
    return [
        VARIANTS[name].label,
        str(len(runs)),
        plus_minus([r["test_loss"] for r in runs], 4),
        plus_minus([100 * (1 - r["test_accuracy"]) for r in runs], 2),
        f"{mean(r['train_loss'] for r in runs):.4f}",
        ", ".join(f"{mean(r['widths'][i] for r in runs):.0f}" for i in range(2)),
        f"{none:.1f} of {asked:.0f}" if grown else "-",
        f"{mean(r['fan_out'] for r in runs):.1f}",
        _average([sum(r["wall"].values()) for r in timed]),
        *(_average([r[clock]["growth"] for r in timed if grown]) for clock in ("wall", "cpu")),
        _average([r["flops"]["training"] / 1e9 for r in runs], 0),
        _average([r["flops"]["growth"] / 1e9 for r in counted if grown], 0),
    ]


def _average(values: Sequence[float], digits: int = 1) -> str:
    return f"{mean(values):.{digits}f}" if values else "-"


def _comparison(by_name: dict[str, list[dict[str, Any]]]) -> str:
    def column(name: str, key: str) -> dict[int, float]:
        return {r["seed"]: r[key] for r in by_name.get(name, [])}

    base, rows = column(DEFAULT, "test_loss"), []
    for name in by_name:
        if name == DEFAULT:
            continue
        losses = column(name, "test_loss")
        loss, error, n = paired(losses, base)
        accuracy, doubt, _ = paired(column(name, "test_accuracy"), column(DEFAULT, "test_accuracy"))
        lower = sum(losses[seed] < base[seed] for seed in set(losses) & set(base))
        rows.append(
            [
                VARIANTS[name].label,
                _difference(loss, error, 4),
                _difference(-100 * accuracy, 100 * doubt, 2),
                f"{lower} of {n}",
            ]
        )
    return table(("variant", "test loss", "test error, %", "seeds with less loss"), rows)


def _difference(value: float, error: float, digits: int) -> str:
    return f"{value:+.{digits}f}" + (f" ± {error:.{digits}f}" if error == error else "")


def _along(by_name: dict[str, list[dict[str, Any]]]) -> str:
    steps, rows = (2, 4, 6, 8), []
    for name, runs in by_name.items():
        growths = [growth for r in runs for growth in r["growths"]]
        fall = 100 * mean(1 - growth["loss_after"] / growth["loss_before"] for growth in growths)
        first = [growth for growth in growths if growth["axis"] == AXES[-1]]
        before = [mean(growth["loss_before"] for growth in first if growth["step"] == step) for step in steps]
        rows.append([VARIANTS[name].label, f"{round(fall, 1) + 0.0:.1f} %", *(f"{loss:.3f}" for loss in before)])
    return table(("variant", "fall at a growth", *(f"before step {step}" for step in steps)), rows)


def _open(name: str, runs: Sequence[dict[str, Any]]) -> str:
    widths = "; ".join(f"{r['widths'][0]}, {r['widths'][1]}" for r in sorted(runs, key=lambda r: r["seed"]))
    return f'Final hidden widths of "{VARIANTS[name].label}", seed by seed: {widths}.'


def tasks(folder: str, names: Sequence[str], seeds: Sequence[int], done: set[tuple[str, int]]) -> Iterator[tuple]:
    """What remains to be run, seed by seed, so that a table made half-way is fair."""
    return ((folder, name, seed) for seed in seeds for name in names if (name, seed) not in done)


def main() -> None:
    parser = options(__doc__, VARIANTS, seeds="0-9")
    parser.add_argument("--data", help="folder with the four files of MNIST; without it nothing is run")
    arguments = parser.parse_args()
    done = {(r["variant"], r["seed"]) for r in read(arguments.out)}
    study(
        arguments,
        run,
        tasks(arguments.data, arguments.variants, arguments.seeds, done) if arguments.data else (),
        SCRIPT,
        results,
    )


if __name__ == "__main__":
    main()
