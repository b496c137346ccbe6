"""``dagrow demo`` beyond what it shows: its learning rates, and what more training brings.

    python tests/benchmarks/demo.py --seeds 100-103 --rates 0.0025,0.005,0.01,0.02,0.04
    python tests/benchmarks/demo.py --seeds 100-103 --rates 0.005,0.01,0.02,0.04 --arms copies --noise 0.1
    python tests/benchmarks/demo.py --seeds 100-101 --rates 0.0025,0.005,0.01,0.02 --budgets 0.2,0.4,1 \\
        --arms dagrow,"from scratch"

It prints, for each arm and budget, the test error in per cent at the rate with the least validation error, as a median
and the range over seeds, with that rate. The rates of the demo are those of the first command, whose seeds it does not
show; the noise of copies is the best of 0.03, 0.1 and 0.3. With ``--data DIR`` it is MNIST, as IDX files. Not a test:
pytest does not collect it.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import mean, table

from dagrow.reporting._data import digits, mnist
from dagrow.reporting._demo import ARMS, DIGITS, MNIST, further, score, start_of, stopped_improving

Scores = dict[tuple[str, float, float], tuple[float, float]]  #: arm, budget, rate -> error on validation and test parts


def run(job: tuple[int, Any]) -> tuple[int, int, Scores]:
    """All arms, budgets and rates with one seed. Gives back the seed, the small network's steps, and the errors."""
    seed, arguments = job
    torch.set_num_threads(1)
    config = replace(MNIST if arguments.data else DIGITS, noise=arguments.noise)
    data = mnist(arguments.data, seed) if arguments.data else digits(seed)
    small, steps = stopped_improving(data, config, seed)
    scores: Scores = {}
    for arm in arguments.arms:
        start = start_of(arm, small, data, config, seed)
        for budget in arguments.budgets:
            for rate in arguments.rates:
                model = further(start, data, config, round(budget * steps), rate, seed)
                scores[arm, budget, rate] = score(model, data.validation)[1], score(model, data.test)[1]
    return seed, steps, scores


def chosen(runs: Sequence[Scores], arm: str, budget: float, rates: Sequence[float]) -> float:
    """The rate with the least validation error, on average over seeds."""
    return min(rates, key=lambda rate: mean(scores[arm, budget, rate][0] for scores in runs))


def cell(runs: Sequence[Scores], arm: str, budget: float, rate: float) -> str:
    errors = [scores[arm, budget, rate][1] for scores in runs]
    return f"{median(errors):.1f} ({min(errors):.1f} to {max(errors):.1f}) at {rate:g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--seeds", default="100-103")
    parser.add_argument("--rates", type=_numbers, default="0.0025,0.005,0.01,0.02,0.04")
    parser.add_argument("--budgets", type=_numbers, default=list(DIGITS.budgets))
    parser.add_argument("--arms", type=_arms, default=list(ARMS), help=", ".join(ARMS))
    parser.add_argument("--noise", type=float, default=DIGITS.noise, help="of copies")
    parser.add_argument("--jobs", type=int, default=1)
    arguments = parser.parse_args()
    first, _, last = arguments.seeds.partition("-")
    jobs, runs = [(seed, arguments) for seed in range(int(first), int(last or first) + 1)], []
    with get_context("spawn").Pool(arguments.jobs) as pool:
        for seed, steps, scores in pool.imap(run, jobs):
            print(f"seed {seed}: the small network took {steps} steps", flush=True)
            runs.append(scores)
    rows = []
    for arm in arguments.arms:
        rates = [chosen(runs, arm, budget, arguments.rates) for budget in arguments.budgets]
        rows.append([arm, *(cell(runs, arm, b, rate) for b, rate in zip(arguments.budgets, rates, strict=True))])
        print(f"{arm!r}: {tuple(rates)}")
    print(table(["", *(f"{100 * budget:g} %" for budget in arguments.budgets)], rows))


def _arms(text: str) -> list[str]:
    wrong = [arm for arm in text.split(",") if arm not in ARMS]
    if wrong:
        raise argparse.ArgumentTypeError(f"{wrong[0]!r} is none of {', '.join(ARMS)}")
    return text.split(",")


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
