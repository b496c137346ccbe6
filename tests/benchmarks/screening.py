"""Screening of new connections: how often is the place that is best among all, solved exactly, among the ten that a
sketch picks, and what does that save?

    python tests/benchmarks/screening.py --trials 40

Each trial draws a network of eight layers in a row with widths from 8 to 128 and a target that a few connections of a
teacher make; all 28 places are solved exactly, and with screening, one after the other. Printed: in how many trials the
winner is among the screened, with the exact 95 % confidence interval (Clopper and Pearson); the ratios of times, and of
what the process holds at its peak beyond what it held before (each measured in a fork of its own).
"""

import argparse
import itertools
import multiprocessing
import resource
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from scipy import stats
from torch import Tensor, nn

import dagrow
from dagrow import AddConnection
from dagrow.operators.paths import EXACT


class Chain(nn.Module):
    """Layers in a row, and connections past them."""

    def __init__(self, widths: list[int], past: Sequence[tuple[int, int]] = ()) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.pairs = past
        self.past = nn.ModuleList(nn.Linear(widths[a], widths[b]) for a, b in past)

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for i, layer in enumerate(self.layers, start=1):
            total = layer(values[-1])
            for (a, b), bypass in zip(self.pairs, self.past, strict=True):
                total = total + bypass(values[a]) if b == i else total
            values.append(torch.tanh(total) if i < len(self.layers) else total)
        return values[-1]


def tiny() -> tuple[Any, ...]:
    """A small call of ``propose``."""
    x = torch.randn(20, 5)
    dag = dagrow.trace(Chain([5, 4, 4, 3]), x[:2])
    return dag, [(x, torch.randn(20, 3))], nn.functional.mse_loss, [AddConnection()]


def trial(seed: int) -> tuple[bool, float, float, int]:
    """Whether the winner was screened, the ratios of times and of memory, and the number of places."""
    torch.manual_seed(seed)
    widths = [int(w) for w in torch.randint(8, 129, (9,))]
    pairs = [(a, b) for a in range(8) for b in range(a + 2, 9)]
    chosen = [pairs[int(i)] for i in torch.randperm(len(pairs))[:4]]
    teacher, student = Chain(widths, chosen), Chain(widths)
    x = torch.randn(2000, widths[0])
    batches = list(zip(x.split(250), teacher(x).detach().split(250), strict=True))
    dag = dagrow.trace(student, x[:2])
    every, slow, large = apart(dag, batches, 1000)
    screened, fast, small = apart(dag, batches, EXACT)
    return every[0] in screened, fast / slow, small / large, len(every)


def apart(dag: dagrow.Dag, batches: Sequence[Any], exact: int) -> tuple[list[str], float, int]:
    """In a fork: the places, best first, the seconds, and the kilobytes more at the peak."""
    ours, theirs = multiprocessing.Pipe()

    def work() -> None:
        dagrow.propose(*tiny())  # what the first call loads is no part of it
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        growths = dagrow.propose(dag, batches, nn.functional.mse_loss, [AddConnection(exact=exact)])
        seconds, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        theirs.send(([growth.where for growth in growths], seconds, peak - before))

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    theirs.close()  # so that the end of a child that failed is seen
    result: tuple[list[str], float, int] = ours.recv()
    process.join()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=40)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    trials = [trial(seed) for seed in range(arguments.trials)]
    hits = sum(hit for hit, *_ in trials)
    low, high = stats.binomtest(hits, len(trials)).proportion_ci(0.95)
    print(f"{trials[0][3]} places; the winner is among the {EXACT} screened in {hits} of {len(trials)} trials")
    print(f"that is {hits / len(trials):.1%} ({low:.1%} to {high:.1%})")
    for name, ratios in zip(("time", "memory"), list(zip(*trials, strict=True))[1:3], strict=True):
        print(f"{name} of screening, relative to solving all: {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
