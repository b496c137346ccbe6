"""What growth costs: the statistics pass over plain forward and backward passes, and the solve.

    python tests/benchmarks/cost.py

MLP 784-512-512-10, batch 256, one thread, both hidden axes measured at once, side by side in one process: medians of
ratios over repeats.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

import dagrow
from dagrow.statistics import Objective, measure


def seconds(function: Callable[[], object]) -> float:
    start = time.thread_time()
    function()
    return time.thread_time() - start


def compare(batches: int = 40, repeats: int = 9) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    data = [(torch.randn(256, 784), torch.randint(10, (256,))) for _ in range(batches)]
    loss, dag = nn.CrossEntropyLoss(), dagrow.trace(model, data[0][0])

    def plain() -> None:
        for x, y in data:
            loss(model(x), y).backward()
            model.zero_grad()

    objective = Objective(model, data, loss)
    objective.probe()
    for folds in (1, 4):
        operator = dagrow.AddNeurons(k=16, folds=folds)
        candidates = operator.candidates(dag)
        pairs = [pair for candidate in candidates for pair in next(candidate.steps(objective)).pairs]
        moments = measure(dag, objective, pairs, folds=folds)
        plain()
        ratios, solves, wholes = [], [], []
        for _ in range(repeats):
            base = (seconds(plain) + seconds(plain)) / 2
            ratios.append(seconds(lambda: measure(dag, objective, pairs, folds=folds)) / base)  # noqa: B023
            waiting = [candidate.steps(objective) for candidate in candidates]
            for steps in waiting:
                next(steps)
            solves.append(seconds(lambda: [steps.send(moments) for steps in waiting]))  # noqa: B023
            wholes.append(seconds(lambda: dagrow.propose(dag, data, loss, [operator])) / base)  # noqa: B023
        print(
            f"folds {folds}: statistics pass / plain forward+backward {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f}); solve for two axes {statistics.median(solves):.3f} s; "
            f"all of propose / plain {statistics.median(wholes):.2f}"
        )


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    compare()


if __name__ == "__main__":
    main()
