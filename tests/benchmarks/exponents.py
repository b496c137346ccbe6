"""How the cost of a call grows with width, samples, positions and depth: exponents, fitted over a decade.

    python tests/benchmarks/exponents.py --out exponents.jsonl [--table docs/measurements.md]

MLPs of a width and a depth on random samples, and two convolutions on images of a size. One thread; each point runs in
a process of its own, the median of three calls. The exponent is the slope of the logarithm of CPU time, or of what the
process took at most beyond what it took with the model and the samples, by least squares.
"""

import argparse
import json
import resource
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import append, in_own_process, read, source_version, table, write_block
from torch import nn
from torch.nn.functional import mse_loss

import dagrow
from dagrow import AddNeurons

SCRIPT = "tests/benchmarks/exponents.py"
BASE = {"width": 256, "samples": 2048, "depth": 3, "positions": 0}
STEPS: dict[str, tuple[int, ...]] = {
    "width": (128, 256, 512, 1024, 1280),
    "samples": (1024, 2048, 4096, 10240),
    "depth": (2, 4, 8, 20),
    "positions": (64, 144, 324, 640),
}
REPEATS, BATCH = 3, 256


def built(point: dict[str, int]) -> tuple[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]]:
    """The model and its batches."""
    torch.manual_seed(0)
    width, positions = point["width"], point["positions"]
    if positions:
        sides = next((a, positions // a) for a in range(int(positions**0.5), 0, -1) if positions % a == 0)
        convolutions = [nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()]
        model = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
        inputs = torch.randn(256, 16, *sides)
        target = torch.randn(256, 4)
        return model, list(zip(inputs.split(64), target.split(64), strict=True))
    parts = [part for _ in range(point["depth"]) for part in (nn.Linear(width, width), nn.ReLU())]
    inputs = torch.randn(point["samples"], width)
    batches = list(zip(inputs.split(BATCH), inputs[:, :4].abs().split(BATCH), strict=True))
    return nn.Sequential(*parts, nn.Linear(width, 4)), batches


def alone(what: str, point: dict[str, int]) -> dict[str, Any]:
    """One point, in this process."""
    torch.set_num_threads(1)
    model, batches = built(point)
    dag, spent = dagrow.trace(model, batches[0][0][:2]), []
    mse_loss(model(batches[0][0]), batches[0][1]).backward()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(REPEATS):
        start = time.process_time()
        if what == "bottlenecks":
            dagrow.bottlenecks(dag, batches, mse_loss, progress=False)
        else:
            dagrow.propose(dag, batches, mse_loss, [AddNeurons(k=8)], progress=False)
        spent.append(time.process_time() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": statistics.median(spent), "memory": (peak - before) / 1024}


def report(runs: list[dict[str, Any]]) -> str:
    """Exponents, and what they are fitted to."""
    points = defaultdict[tuple[str, str], dict[int, dict[str, Any]]](dict)
    for run in runs:
        points[run["what"], run["along"]][run["point"][run["along"]]] = run
    rows = []
    for (what, along), found in points.items():
        sizes = sorted(found)
        for cost, unit in (("seconds", "s"), ("memory", "MB")):
            values = [max(found[size][cost], 1e-3) for size in sizes]
            slope = float(np.polyfit(np.log(sizes), np.log(values), 1)[0])
            ends = f"{values[0]:.3g} to {values[-1]:.3g} {unit}"
            rows.append([what, f"{along}, {sizes[0]:,} to {sizes[-1]:,}", cost, f"{slope:.2f}", ends])
    return table(["call", "along", "cost", "exponent", "measured"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="results, one JSON object a line")
    parser.add_argument("--table", type=Path, help="document to write the table into")
    parser.add_argument("--alone", nargs=2, metavar=("WHAT", "POINT"), help="one point, in this process")
    arguments = parser.parse_args()
    if arguments.alone:
        print(json.dumps(alone(arguments.alone[0], json.loads(arguments.alone[1]))))
        return
    for what in ("bottlenecks", "propose"):
        for along, sizes in STEPS.items():
            for size in sizes:
                point = {**BASE, along: size}
                result, _ = in_own_process([__file__, "--alone", what, json.dumps(point)], 600, "failure")
                append(
                    arguments.out, {**result, "what": what, "along": along, "point": point, "version": source_version()}
                )
                print(what, along, size, result, flush=True)
    if arguments.table is not None:
        write_block(arguments.table, SCRIPT, report(read(arguments.out)))


if __name__ == "__main__":
    main()
