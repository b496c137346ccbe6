"""A small CNN with BatchNorm grown from 2, 2, 2 channels, on MNIST and on a part of CIFAR-10, with equal training.

    python tests/benchmarks/cnn.py --mnist DIR --cifar DIR --out results.jsonl --jobs 2 --table docs/cnn.md

The folders hold the original files: MNIST's four IDX files, and ``data_batch_1.bin`` of the binary CIFAR-10 with a
``test_batch*.bin``, gzipped or not. Runs that are in the results file already are skipped. Not a test.
"""

import gzip
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import mean, options, paired, plus_minus, read, source_version, study, table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import dagrow
from dagrow import AddNeurons
from dagrow.reporting import mnist

SCRIPT = "tests/benchmarks/cnn.py"
FINAL = (16, 24, 32)  #: channels at the end, where growths are asked for a number
START = (2, 2, 2)
STEPS = 5  #: growth steps; at each all axes grow, the last one first
LAST_EPOCHS = 4  #: of training after the last step; one before each step
TRAINED, HELD_OUT, MEASURED, BATCH, RATE = 9_000, 1_000, 2_000, 100, 2e-3
AXES = ("conv1", "conv2", "conv3")

Data = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Variant:
    """One way to get a network: ``neurons`` without k, axes and seed; None trains the start widths from scratch."""

    label: str
    neurons: AddNeurons | None = None
    start: tuple[int, ...] = START
    open: bool = False


VARIANTS = {
    "svd": Variant("svd, cross-validated (the default)", AddNeurons(k=1)),
    "als": Variant("als, cross-validated", AddNeurons(k=1, solver="als")),
    "features": Variant("random fan-in, fitted fan-out, cross-validated", AddNeurons(k=1, init="random_features")),
    "random": Variant("random", AddNeurons(k=1, init="random", folds=1)),
    "zero": Variant("zero fan-out", AddNeurons(k=1, init="zero", folds=1)),
    "open": Variant("open: svd, k=None", AddNeurons(), open=True),
    "scratch": Variant("the final architecture from scratch", start=FINAL),
    "small": Variant("the first architecture, never grown"),
}
DEFAULT = "svd"


def _cifar(path: Path) -> Data:
    content = path.read_bytes()
    content = gzip.decompress(content) if path.suffix == ".gz" else content
    records = np.frombuffer(content, np.uint8).reshape(-1, 3073)
    return torch.from_numpy(records[:, 1:].astype(np.float32) / 255).view(-1, 3, 32, 32), torch.from_numpy(
        records[:, 0].astype(np.int64)
    )


@cache
def load(kind: str, folder: str) -> tuple[Data, Data]:
    """10,000 training images and the test images, normalised by channel."""
    if kind == "mnist":
        dataset = mnist(folder)
        train = (
            dataset.train.inputs[: TRAINED + HELD_OUT].view(-1, 1, 28, 28),
            dataset.train.target[: TRAINED + HELD_OUT],
        )
        test = dataset.test.inputs.view(-1, 1, 28, 28), dataset.test.target
    else:
        root = Path(folder)
        train, test = (_cifar(sorted(root.glob(name))[0]) for name in ("data_batch_1.bin*", "test_batch*.bin*"))
    centre, scale = train[0].mean((0, 2, 3), keepdim=True), train[0].std((0, 2, 3), keepdim=True)
    return ((train[0] - centre) / scale, train[1]), ((test[0] - centre) / scale, test[1])


def build(channels: int, widths: Sequence[int], seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: dict[str, nn.Module] = {}
    for number, width in enumerate(widths, start=1):
        layers |= {
            f"conv{number}": nn.Conv2d(channels, width, 3, padding=1),
            f"norm{number}": nn.BatchNorm2d(width),
            f"relu{number}": nn.ReLU(),
            f"pool{number}": nn.MaxPool2d(2) if number < len(widths) else nn.AdaptiveAvgPool2d(1),
        }
        channels = width
    model = nn.Sequential()
    for name, layer in {**layers, "flat": nn.Flatten(), "head": nn.Linear(channels, 10)}.items():
        model.add_module(name, layer)
    return model


class Run:
    """A network in training. Every seed has its own split, order and samples, the same for all variants."""

    def __init__(self, kind: str, variant: Variant, seed: int, train: Data) -> None:
        self.variant, self.seed, self.train = variant, seed, train
        self.model = build(train[0].shape[1], variant.start, seed)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=RATE)
        self.order, self.draws = (torch.Generator().manual_seed(start + seed) for start in (1_000, 2_000))
        split = torch.randperm(len(train[1]), generator=torch.Generator().manual_seed(3_000 + seed))
        self.held_out, self.kept = split[:HELD_OUT], split[HELD_OUT:]
        self.dag = dagrow.trace(self.model, train[0][:2]) if variant.neurons else None
        self.seconds = {"training": 0.0, "growth": 0.0}
        self.growths: list[dict[str, Any]] = []

    def batches(self, indices: Tensor) -> list[Data]:
        return [(self.train[0][part], self.train[1][part]) for part in indices.split(BATCH)]

    def epochs(self, count: int) -> None:
        start = time.process_time()
        self.model.train()
        for _ in range(count):
            for x, y in self.batches(self.kept[torch.randperm(len(self.kept), generator=self.order)]):
                self.optimizer.zero_grad()
                cross_entropy(self.model(x), y).backward()
                self.optimizer.step()
        self.seconds["training"] += time.process_time() - start

    def step(self, number: int) -> None:
        """All axes grow, the last one first; where fewer channels are worth it than asked for, zeros make up for it."""
        start = time.process_time()
        for axis, first, final in reversed(list(zip(AXES, START, FINAL, strict=True))):
            k = round(first + (final - first) * number / STEPS) - self.width(axis)
            added = self.grow(axis, None if self.variant.open else k)
            if not self.variant.open and added < k:
                self.grow(axis, k - added, AddNeurons(k=1, init="zero", folds=1))
        self.seconds["growth"] += time.process_time() - start

    def grow(self, axis: str, k: int | None, neurons: AddNeurons | None = None) -> int:
        assert self.dag is not None
        neurons = neurons or self.variant.neurons
        assert neurons is not None
        drawn = self.kept[torch.randperm(len(self.kept), generator=self.draws)[:MEASURED]]
        receipt = dagrow.grow(
            self.dag,
            self.batches(drawn),
            cross_entropy,
            [replace(neurons, k=k, axes=(axis,), seed=self.seed)],
            validation=self.batches(self.held_out),
            optimizer=self.optimizer,
        )
        growth = {"axis": axis, "asked": k, "added": receipt.neurons, "init": neurons.init}
        self.growths.append({**growth, "before": receipt.loss_before, "after": receipt.loss_after})
        return receipt.neurons

    def width(self, axis: str) -> int:
        return self.model.get_submodule(axis).out_channels  # type: ignore[return-value]

    def loss(self, data: Data) -> tuple[float, float]:
        """Mean loss and accuracy."""
        self.model.eval()
        with torch.no_grad():
            output = torch.cat([self.model(part) for part in data[0].split(1_000)])
        return float(cross_entropy(output, data[1])), float((output.argmax(1) == data[1]).float().mean())


def run(task: tuple[str, str, str, int]) -> dict[str, Any]:
    kind, folder, name, seed = task
    torch.set_num_threads(1)
    train, test = load(kind, folder)
    state = Run(kind, VARIANTS[name], seed, train)
    for number in range(1, STEPS + 1):
        state.epochs(1)
        if state.dag is not None:
            state.step(number)
    state.epochs(LAST_EPOCHS)
    loss, accuracy = state.loss(test)
    return {
        "data": kind,
        "variant": name,
        "seed": seed,
        "version": source_version(),
        "test_loss": loss,
        "test_accuracy": accuracy,
        "widths": [state.width(axis) for axis in AXES],
        "seconds": state.seconds,
        "growths": state.growths,
    }


def results(runs: Sequence[dict[str, Any]]) -> str:
    """The tables, from the results file and nothing else."""
    titles = {"mnist": "MNIST, 9,000 training images", "cifar": "CIFAR-10, 9,000 training images, 1,000 test images"}
    parts = [f"{len(runs)} runs. Package sources {', '.join(sorted({r['version'] for r in runs}))}."]
    for kind, title in titles.items():
        by_variant = {name: [r for r in runs if (r["data"], r["variant"]) == (kind, name)] for name in VARIANTS}
        rows = sorted(
            (_row(name, group, by_variant[DEFAULT]) for name, group in by_variant.items() if group),
            key=lambda row: row[2],
        )
        if rows:
            head = (
                "variant",
                "n",
                "test loss",
                "test error, %",
                "loss less the default's",
                "fall at a growth",
                "channels",
                "training, CPU s",
                "growth, CPU s",
            )
            parts += [f"### {title}", table(head, rows)]
    return "\n\n".join(parts)


def _row(name: str, runs: Sequence[dict[str, Any]], base: Sequence[dict[str, Any]]) -> list[str]:
    losses, standard = ({r["seed"]: r["test_loss"] for r in group} for group in (runs, base))
    difference, error, _ = paired(losses, standard)
    falls = [1 - g["after"] / g["before"] for r in runs for g in r["growths"]]
    return [
        VARIANTS[name].label,
        str(len(runs)),
        plus_minus([r["test_loss"] for r in runs], 4),
        plus_minus([100 * (1 - r["test_accuracy"]) for r in runs], 2),
        "-" if name == DEFAULT else f"{difference:+.4f} ± {error:.4f}",
        f"{100 * mean(falls):.1f} %" if falls else "-",
        ", ".join(f"{mean(r['widths'][i] for r in runs):.0f}" for i in range(3)),
        *(f"{mean(r['seconds'][what] for r in runs):.0f}" for what in ("training", "growth")),
    ]


def tasks(folders: dict[str, str], names: Sequence[str], seeds: Sequence[int], done: set[tuple]) -> Iterator[tuple]:
    """What remains to be run, seed by seed, so that a table made half-way is fair."""
    every = ((kind, folder, name, seed) for seed in seeds for kind, folder in folders.items() for name in names)
    return (task for task in every if (task[0], task[2], task[3]) not in done)


def main() -> None:
    parser = options(__doc__, VARIANTS, seeds="0-4")
    parser.add_argument("--mnist", help="folder with the four files of MNIST")
    parser.add_argument("--cifar", help="folder with data_batch_1.bin and a test_batch of CIFAR-10")
    arguments = parser.parse_args()
    done = {(r["data"], r["variant"], r["seed"]) for r in read(arguments.out)}
    folders = {kind: folder for kind, folder in (("mnist", arguments.mnist), ("cifar", arguments.cifar)) if folder}
    study(arguments, run, tasks(folders, arguments.variants, arguments.seeds, done), SCRIPT, results)


if __name__ == "__main__":
    main()
