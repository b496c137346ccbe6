"""Screening of new connections: how often is the place that is best among all, solved exactly, among the ten that a
sketch picks, and what does that save?

    python tests/benchmarks/screening.py --trials 40

Each trial draws a network of eight layers in a row with widths from 8 to 128 and a target that a few connections of a
teacher make; all 28 places are solved exactly, in the same process as with screening. Printed: in how many trials the
winner is among the screened, and the ratio of times.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import dagrow
from dagrow import AddConnection, Growth
from dagrow.operators.screening import EXACT


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


def trial(seed: int) -> tuple[bool, float, int]:
    """Whether the winner was screened, the ratio of times, and the number of places."""
    torch.manual_seed(seed)
    widths = [int(w) for w in torch.randint(8, 129, (9,))]
    pairs = [(a, b) for a in range(8) for b in range(a + 2, 9)]
    chosen = [pairs[int(i)] for i in torch.randperm(len(pairs))[:4]]
    teacher, student = Chain(widths, chosen), Chain(widths)
    x = torch.randn(2000, widths[0])
    batches = list(zip(x.split(250), teacher(x).detach().split(250), strict=True))
    dag = dagrow.trace(student, x[:2])

    def proposed(exact: int) -> list[Growth]:
        return dagrow.propose(dag, batches, nn.functional.mse_loss, [AddConnection(exact=exact)])

    every, slow = timed(lambda: proposed(1000))
    some, fast = timed(lambda: proposed(EXACT))
    return every[0].where in {growth.where for growth in some}, fast / slow, len(every)


def timed(work: Callable[[], list[Growth]]) -> tuple[list[Growth], float]:
    start = time.perf_counter()
    found = work()
    return found, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=40)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = [trial(seed) for seed in range(given.trials)]
    hits = sum(hit for hit, *_ in found)
    print(f"{found[0][2]} places; the winner is among the {EXACT} screened in {hits} of {len(found)} trials")
    print(f"time of screening, relative to solving all: {statistics.median(ratio for _, ratio, _ in found):.2f}")


if __name__ == "__main__":
    main()
