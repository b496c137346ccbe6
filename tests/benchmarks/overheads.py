"""What a grown network costs afterwards: CPU time over that of a fresh one of the same widths, in turns.

    python tests/benchmarks/overheads.py [--table docs/measurements.md]

One thread, one process; a ratio for each of 100 turns, of which the median and the quartiles are shown. `written` is a
model whose forward names the width that grows, so that growing it writes that forward anew.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import table, write_block
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import dagrow
from dagrow import AddNeurons

SCRIPT, TURNS, NEW = "tests/benchmarks/overheads.py", 100, 64


class Written(nn.Module):
    """A width that stands in the forward as a number."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.last, self.width = nn.Linear(256, width), nn.Linear(width, 10), width

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x)).view(x.shape[0], self.width // 8, 8).flatten(1))


def mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(256, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))


def cnn(width: int) -> nn.Module:
    layers = [nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 32, 3, padding=1)]
    return nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


CASES: dict[str, tuple[Callable[[int], nn.Module], tuple[int, ...]]] = {
    "MLP": (mlp, (256,)),
    "CNN with BatchNorm": (cnn, (3, 16, 16)),
    "written": (Written, (256,)),
}


def grown(
    build: Callable[[int], nn.Module], x: Tensor, y: Tensor
) -> tuple[nn.Module, torch.optim.Optimizer, nn.Module]:
    """A network that grew from 64 units on its first axis, with its optimizer's state, and a fresh one."""
    model = build(64)
    optimizer = torch.optim.Adam(model.parameters())
    cross_entropy(model(x), y).backward()
    optimizer.step()
    dag = dagrow.trace(model, x[:2])
    operator = AddNeurons(k=NEW, axes=(dag.axes[0].name,), init="zero")
    dagrow.propose(dag, [(x, y)], cross_entropy, [operator])[0].apply(1.0, optimizer=optimizer)
    return model, optimizer, build(len(next(model.parameters())))


def ratios(work: Callable[[], object], fresh: Callable[[], object]) -> list[float]:
    """Of CPU time, one after the other, in both orders."""

    def seconds(function: Callable[[], object]) -> float:
        start = time.process_time()
        function()
        return time.process_time() - start

    for function in (work, fresh) * 10:
        function()
    found = []
    for turn in range(TURNS):
        if turn % 2:
            grown_time, fresh_time = seconds(work), seconds(fresh)
        else:
            fresh_time, grown_time = seconds(fresh), seconds(work)
        found.append(grown_time / fresh_time)
    return found


def row(title: str, what: str, found: list[float]) -> list[str]:
    low, middle, high = statistics.quantiles(found, n=4)
    return [title, what, f"{middle:.3f} ({low:.3f} to {high:.3f})"]


def measure() -> str:
    """The table."""
    torch.set_num_threads(1)
    rows = []
    for title, (build, shape) in CASES.items():
        torch.manual_seed(0)
        x, y = torch.randn(64, *shape), torch.randint(10, (64,))
        model, optimizer, fresh = grown(build, x, y)
        other = torch.optim.Adam(fresh.parameters())

        def forward(network: nn.Module, x: Tensor = x) -> Any:
            with torch.no_grad():
                return network(x)

        def step(network: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor = x, y: Tensor = y) -> None:
            optimizer.zero_grad()
            cross_entropy(network(x), y).backward()
            optimizer.step()

        pairs = {
            "forward": (lambda m=model: forward(m), lambda m=fresh: forward(m)),
            "training step": (lambda m=model, o=optimizer: step(m, o), lambda m=fresh, o=other: step(m, o)),
        }
        rows += [row(title, what, ratios(*pair)) for what, pair in pairs.items()]
    return table(["network", "what", "grown / fresh"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, help="document to write the table into")
    arguments = parser.parse_args()
    text = measure()
    print(text)
    if arguments.table is not None:
        write_block(arguments.table, SCRIPT, text)


if __name__ == "__main__":
    main()
