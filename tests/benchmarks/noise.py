"""Does anything grow on pure noise, however samples come: along any dimension, in groups, in several views?

    python tests/benchmarks/noise.py --out noise.jsonl [--seeds 0-49] [--cases batch_first,...]
                                     [--table docs/measurements.md]

Each of 60 subjects has 8 numbers, which are seen 10 times under a little noise, and two random targets, which have
nothing to do with them. So it is the 60 subjects that are independent, not the 600 measurements. One call of `grow`,
with its defaults and `AddNeurons()`, on a network of 6 hidden neurons; how often does it add anything? The network is
put at the best constant output first: targets that are noise alone are not without a trend where an untrained network
is not flat.
"""

import argparse
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import append, read, table, write_block
from significance import counted
from torch import Tensor, nn
from torch.nn import functional

import dagrow

SUBJECTS, TIMES = 60, 10
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    """A way to hand measurements over.

    Attributes:
        title: what it is.
        right: whether samples are what is independent.
        batch: inputs ``[subjects, times, 8]`` and targets, as they are handed over.
        step: from a model and a batch to the loss.
        options: of `grow`.
    """

    title: str
    right: bool
    batch: Callable[[Tensor, Tensor], Batch]
    step: Callable[[nn.Module, Batch], Tensor]
    options: dict[str, Any] = field(default_factory=dict)


def every(model: nn.Module, batch: Batch) -> Tensor:
    """A target for each measurement."""
    return functional.mse_loss(model(batch[0]), batch[1])


def views(model: nn.Module, batch: Batch) -> Tensor:
    """Each time in a call of its own."""
    return sum((every(model, (x, batch[1])) for x in batch[0].unbind(1)), torch.zeros(())) / TIMES


def together(model: nn.Module, batch: Batch) -> Tensor:
    """All times one after another, in one call."""
    x, y = batch
    return every(model, (torch.cat(x.unbind(1)), y.repeat(TIMES, 1)))


def time_first(x: Tensor, y: Tensor) -> Batch:
    return x.transpose(0, 1), y.expand(TIMES, -1, -1)


def one_target(x: Tensor, y: Tensor) -> Batch:
    return x.transpose(0, 1), y


def rows(x: Tensor, y: Tensor) -> Batch:
    return x.flatten(0, 1), y.repeat_interleave(TIMES, 0)


def pooled(model: nn.Module, batch: Batch) -> Tensor:
    """A target for the mean over all times."""
    return functional.mse_loss(model(batch[0]).mean(0), batch[1])


KEYS = [subject for subject in range(SUBJECTS) for _ in range(TIMES)]
CASES = {
    "batch_first": Case("`[n, t, f]`", True, lambda x, y: (x, y[:, None].expand(-1, TIMES, -1)), every),
    "time_first": Case("`[t, n, f]`, `batch_dim=1`", True, time_first, every, {"batch_dim": 1}),
    "time_first_as_batch": Case("`[t, n, f]`, as if t were samples", False, time_first, every),
    "time_mixed": Case(
        "`[t, n, f]`, a mean over t at the end, `batch_dim=1`", True, one_target, pooled, {"batch_dim": 1}
    ),
    "time_mixed_as_batch": Case("the same, as if t were samples", False, one_target, pooled),
    "groups": Case("`[n t, f]`, `groups=`", True, rows, every, {"groups": KEYS}),
    "rows": Case("`[n t, f]`, as if all were samples", False, rows, every),
    "views": Case("`[n, f]`, t calls in a step", True, lambda x, y: (x, y), views),
    "views_together": Case("`[t n, f]`, put together in a step", True, lambda x, y: (x, y), together),
}


def run(case: Case, seed: int) -> dict[str, Any]:
    """Whether anything is added, and whether there was a warning."""
    torch.manual_seed(seed)
    subjects, y = torch.randn(SUBJECTS, 1, 8), torch.randn(SUBJECTS, 2)
    x = subjects + 0.3 * torch.randn(SUBJECTS, TIMES, 8)
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 2))
    with torch.no_grad():
        model[2].weight.mul_(0.1)
        model[2].bias.copy_(y.mean(0))
    batch = case.batch(x, y)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        example = batch[0][:, :2] if case.options.get("batch_dim") else x[:2]
        receipt = dagrow.grow(
            dagrow.trace(model, example),
            [batch],
            operators=[dagrow.AddNeurons()],
            step=case.step,
            reduction="mean",
            **case.options,
        )
    warned = any("give batch_dim=" in str(each.message) for each in caught)
    return {"added": bool(receipt.parts), "warned": warned}


def tables(results: list[dict[str, Any]]) -> str:
    lines = []
    for name, case in CASES.items():
        of_case = [r for r in results if r["case"] == name]
        if of_case:
            counts = [counted([r[what] for r in of_case]) for what in ("added", "warned")]
            lines.append([case.title, "yes" if case.right else "no", *counts])
    return table(["measurements", "samples are independent", "runs that add neurons", "runs that warn"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="results, one JSON object a line; runs in it are kept")
    parser.add_argument("--seeds", default="0-49", help="first-last")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--table", type=Path, help="document to write the table into")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    first, last = map(int, arguments.seeds.split("-"))
    done = {(r["case"], r["seed"]) for r in read(arguments.out)}
    for name in arguments.cases.split(","):
        for seed in range(first, last + 1):
            if (name, seed) not in done:
                append(arguments.out, {"case": name, "seed": seed, **run(CASES[name], seed)})
    if arguments.table:
        write_block(arguments.table, "noise.py", tables(read(arguments.out)))


if __name__ == "__main__":
    main()
