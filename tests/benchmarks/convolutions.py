"""What growing a convolution costs: time and memory of the statistics over a plain forward and backward pass.

    python tests/benchmarks/convolutions.py

Two 3x3 convolutions 64-64-64 on images of 16x16, batch 64, one thread, in CPU time, side by side in one process:
medians of ratios over repeats. Where gromo is installed, its growing convolutions do the same. Memory is the peak of
the resident set over what was there before, in a second process that gives freed memory back at once (Linux only).
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

import dagrow
from dagrow.growing._candidate_runs import previewed
from dagrow.statistics import Objective, measure

WIDTH, SIZE, BATCH = 64, 16, 64
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def loss(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()


def seconds(function: Callable[[], object]) -> float:
    start = time.thread_time()
    function()
    return time.thread_time() - start


def megabytes(function: Callable[[], object]) -> float:
    """Peak of the resident set while a function runs, above what it was before."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    function()
    return _status("VmHWM") - before


def _status(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def ours(model: nn.Module, data: list[tuple[Tensor, Tensor]], folds: int) -> dict[str, Callable[[], object]]:
    """The passes of one proposal: two of statistics, one of the preview; and the solve between them."""
    dag, objective = dagrow.trace(model, data[0][0]), Objective(model, data, loss)
    objective.probe()
    candidates = dagrow.AddNeurons(k=8, folds=folds).candidates(dag)
    waiting = [candidate.steps(objective) for candidate in candidates]
    pairs = [pair for steps in waiting for pair in next(steps).pairs]
    m = measure(dag, objective, pairs, folds=folds)
    more = [pair for steps in waiting for pair in steps.send(m).pairs]
    n = measure(dag, objective, more, folds=folds)
    previews = [steps.send(n) for steps in waiting]

    def solves() -> None:
        """Both solutions again, by steps that name the features of the second anew."""
        waiting = [candidate.steps(objective) for candidate in candidates]
        for steps in waiting:
            next(steps)
        again = [pair for steps in waiting for pair in steps.send(m).pairs]
        names = {
            old: new for pair, other in zip(more, again, strict=True) for old, new in zip(pair, other, strict=True)
        }
        sums = {(names[x], names[y]): total for (x, y), total in n.sums.items()}
        second = replace(n, sums=sums, positions={names[f]: count for f, count in n.positions.items()})
        for steps in waiting:
            steps.send(second)

    return {
        "first pass": lambda: measure(dag, objective, pairs, folds=folds),
        "second pass": lambda: measure(dag, objective, more, folds=folds),
        "preview": lambda: previewed(dag, objective, previews, folds),
        "solves": solves,
    }


def theirs(x: Tensor, y: Tensor) -> Iterator[tuple[str, Callable[[], object]]]:
    """A pass of statistics in the peer's growing convolutions, where it is installed."""
    try:
        from gromo.modules import conv2d_growing_module as peer
    except ImportError:
        return
    for name in ("Restricted", "Full"):
        kind = getattr(peer, f"{name}Conv2dGrowingModule")
        shape = {"kernel_size": 3, "padding": 1, "input_size": (SIZE, SIZE)}
        first = kind(WIDTH, WIDTH, post_layer_function=nn.ReLU(), **shape)
        second = kind(WIDTH, WIDTH, previous_module=first, allow_growing=True, **shape)
        second.init_computation()

        def update(first: nn.Module = first, second: nn.Module = second) -> None:
            first.zero_grad()
            second.zero_grad()
            loss(second(first(x)), y).backward()
            second.update_computation(update_covariance_loss_gradient=False)

        yield f"peer, {name.lower()}", update


def setting() -> tuple[nn.Module, Tensor, Tensor, Callable[[], object]]:
    """The model, its data, and a plain forward and backward pass."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.ReLU(), nn.Conv2d(WIDTH, WIDTH, 3, padding=1))
    x, y = torch.randn(2, BATCH, WIDTH, SIZE, SIZE)

    def plain() -> None:
        model.zero_grad()
        loss(model(x), y).backward()

    plain()
    return model, x, y, plain


def times(repeats: int = 9) -> None:
    model, x, y, plain = setting()
    for folds in (1, 4):
        parts = ours(model, [(x, y)], folds)
        ratios: dict[str, list[float]] = {name: [] for name in parts}
        for _ in range(repeats):
            base = (seconds(plain) + seconds(plain)) / 2
            for name, part in parts.items():
                ratios[name].append(seconds(part) / base)
        sums = [sum(both) for both in zip(ratios["first pass"], ratios["second pass"], strict=True)]
        each = ", ".join(f"{name} {statistics.median(values):.2f}" for name, values in ratios.items())
        print(f"folds {folds}: statistics {statistics.median(sums):.2f} times plain ({each})")
    for name, update in theirs(x, y):
        update()
        quotients = [seconds(update) / seconds(plain) for _ in range(3)]
        print(f"{name}: statistics {statistics.median(quotients):.2f} times plain")


def memory() -> None:
    model, x, y, plain = setting()
    space = statistics.median(megabytes(plain) for _ in range(3))
    for folds in (1, 4):
        parts = ours(model, [(x, y)], folds)
        model.zero_grad()
        peaks = ", ".join(f"{name} {megabytes(part) / space:.2f}" for name, part in parts.items() if name != "solves")
        print(f"folds {folds}: peak memory over that of plain: {peaks}")
    for name, update in theirs(x, y):
        update()
        print(f"{name}: peak memory {megabytes(update) / space:.2f} times plain")


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if MALLOC.items() <= os.environ.items():
        memory()
    else:
        times()
        subprocess.run([sys.executable, *sys.argv], env={**os.environ, **MALLOC}, check=True)


if __name__ == "__main__":
    main()
