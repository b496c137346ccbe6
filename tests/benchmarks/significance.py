"""Does anything grow on noise, over all operators and places, and is a neuron found that is there?

    python tests/benchmarks/significance.py --out chance.jsonl [--seeds 0-99] [--cases noise,planted,independent]
                                            [--table docs/measurements.md]

Noise: targets are the network's own outputs with noise that has nothing to do with the inputs, or classes drawn with
the probabilities that the network gives. (Targets that are noise alone are not without a trend: outputs of an untrained
network depend on the inputs, and what is new can take that out.) Planted: a network that lacks one neuron of the one
that made the targets, under noise. Each run proposes with every operator, so that what a step of a Grower with all of
them applies, and what `grow` applies, follows: nothing, where no growth is more than chance. Where one is, both run.

Independent: p-values of z and of permuted goals, side by side, on one hidden layer.
"""

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import append, read, table, write_block
from permutation import permutation_test
from torch import Tensor, nn

import dagrow
from dagrow.growing import applicable, corrected
from dagrow.solvers import upper_tail

SIZES = (200, 500, 1000)
LEVELS = (1.0, 2.0, 4.0)
OPERATORS: dict[str, dagrow.Operator] = {
    "MoveWeights": dagrow.MoveWeights(),
    "AddNeurons": dagrow.AddNeurons(),
    "AddNeurons, random features": dagrow.AddNeurons(init="random_features"),
    "AddConnection": dagrow.AddConnection(),
    "AddConnection, rank 1": dagrow.AddConnection(rank=1),
    "AddLayer": dagrow.AddLayer(4, nn.Tanh()),
}
OLD = 3.0  #: standard deviations, at every place by itself
Batches = list[tuple[Tensor, Tensor]]


def noise(seed: int, n: int) -> tuple[nn.Module, Batches, Any]:
    """Two hidden layers, every other with cross-entropy, every other pair with ReLU."""
    torch.manual_seed(seed)
    kind = nn.Tanh if seed % 4 < 2 else nn.ReLU
    model = nn.Sequential(nn.Linear(20, 6), kind(), nn.Linear(6, 6), kind(), nn.Linear(6, 3))
    x = torch.randn(n, 20)
    with torch.no_grad():
        if seed % 2:
            y = torch.distributions.Categorical(logits=model(x)).sample()
            return model, batches(x, y), nn.functional.cross_entropy
        return model, batches(x, model(x) + torch.randn(n, 3)), nn.functional.mse_loss


def planted(seed: int, n: int, level: float) -> tuple[nn.Module, Batches, Any]:
    """Six of the seven neurons of the network that made the targets; noise is ``level`` times what the seventh adds."""
    torch.manual_seed(seed)
    kind = nn.ReLU if seed % 2 else nn.Tanh
    teacher, student = (nn.Sequential(nn.Linear(20, width), kind(), nn.Linear(width, 3)) for width in (7, 6))
    x = torch.randn(n, 20)
    with torch.no_grad():
        teacher[2].weight *= 3
        for mine, whole in ((student[0].weight, teacher[0].weight), (student[0].bias, teacher[0].bias)):
            mine.copy_(whole[:6])
        student[2].weight.copy_(teacher[2].weight[:, :6])
        student[2].bias.copy_(teacher[2].bias)
        signal = teacher(x)
        y = signal + level * (signal - student(x)).std() * torch.randn_like(signal)
    return student, batches(x, y), nn.functional.mse_loss


def batches(x: Tensor, y: Tensor) -> Batches:
    return list(zip(x.split(100), y.split(100), strict=True))


def looked(model: nn.Module, data: Batches, loss: Any) -> dict[str, tuple[list[dagrow.Growth], int]]:
    """Of each operator the growths, with p-values as if each were alone, and the number of places."""
    dag, results = dagrow.trace(model, data[0][0][:2]), {}
    for name, operator in OPERATORS.items():
        growths = dagrow.propose(dag, data, loss, [operator])
        alone = [
            replace(g, p_value=upper_tail(g.z), significant=g.heldout_gain > 0) for g in growths if g.z is not None
        ]
        results[name] = alone, sum(candidate.tests for candidate in operator.candidates(dag))
    return results


def run(problem: tuple[nn.Module, Batches, Any], applied: bool) -> dict[str, Any]:
    """What one look at all operators comes to; whether it is applied, too, if it is more than chance."""
    results = looked(*problem)
    new = {name: bool(applicable(corrected(*each))) for name, each in results.items()}
    old = {name: any(g.z > OLD and g.gain > 0 for g in growths) for name, (growths, _) in results.items()}
    every = [growth for growths, _ in results.values() for growth in growths]
    tests = sum(tests for _, tests in results.values())
    step = bool(applicable(corrected(every, tests)))
    grow = any(applicable(corrected(*each, len(OPERATORS))) for each in results.values())
    if applied and (step or grow):
        step, grow = stepped(problem), grown(problem)
    return {
        "old": old,
        "new": new,
        "step": step,
        "grow": grow,
        "places": tests,
        "z": {name: max((g.z for g in growths), default=None) for name, (growths, _) in results.items()},
    }


def stepped(problem: tuple[nn.Module, Batches, Any]) -> bool:
    """Whether a step of a Grower applies anything. The model is as it was afterwards."""
    model, data, loss = problem
    grower = dagrow.Grower(dagrow.trace(model, data[0][0][:2]), loss, list(OPERATORS.values()))
    receipt = grower.step(0, data)
    receipt.undo()
    return bool(receipt.parts)


def grown(problem: tuple[nn.Module, Batches, Any]) -> bool:
    model, data, loss = problem
    return bool(dagrow.grow(dagrow.trace(model, data[0][0][:2]), data, loss, list(OPERATORS.values())).parts)


def independent(problem: tuple[nn.Module, Batches, Any]) -> dict[str, Any]:
    """At each axis the p-value of z for the best neuron, and that of permuted goals."""
    model, data, loss = problem
    growths = dagrow.propose(dagrow.trace(model, data[0][0][:2]), data, loss, [dagrow.AddNeurons(k=1)])
    return {"p": {g.where: (upper_tail(g.z), permutation_test(g, 99).p_value) for g in growths}}


def tasks(cases: Sequence[str], seeds: range) -> Iterator[tuple[str, int, int, float]]:
    """Case, seed, samples, level of noise."""
    for seed in seeds:
        for n in SIZES:
            if "noise" in cases:
                yield "noise", seed, n, 0.0
            if "planted" in cases and n < 1000 and seed < 20:
                yield from (("planted", seed, n, level) for level in LEVELS)
            if "independent" in cases and n < 1000 and seed < 40:
                yield from (("independent", seed, n, level) for level in (0.0, *LEVELS))


def wilson(hits: int, runs: int) -> tuple[float, float]:
    """The 95 % interval of a probability."""
    z, share = 1.959964, hits / runs
    middle, half = share + z**2 / (2 * runs), z * math.sqrt(share * (1 - share) / runs + z**2 / (4 * runs**2))
    return (middle - half) / (1 + z**2 / runs), (middle + half) / (1 + z**2 / runs)


def counted(rows: Sequence[bool]) -> str:
    low, high = wilson(sum(rows), len(rows))
    return f"{sum(rows)}/{len(rows)} ({100 * low:.1f} to {100 * high:.1f} %)"


def tables(rows: list[dict[str, Any]]) -> str:
    noisy = [r for r in rows if r["case"] == "noise"]
    every = [[r for r in noisy if r["n"] == n] for n in SIZES] + [noisy]
    kinds: dict[str, Callable[[dict[str, Any]], bool]] = {
        **{f"{name} alone": lambda r, name=name: r["new"][name] for name in OPERATORS},
        "all, a step of `Grower`": lambda r: r["step"],
        "all, `grow`": lambda r: r["grow"],
        "all, 3 deviations for each place": lambda r: any(r["old"].values()),
    }
    lines = [[kind, *(counted([hit(r) for r in group]) for group in every)] for kind, hit in kinds.items()]
    places = "/".join(map(str, sorted({r["places"] for r in noisy})))
    text = f"Noise, {places} places in all:\n\n" + table(["", *(f"n={n}" for n in SIZES), "together"], lines)
    lines = []
    for n in SIZES[:2]:
        for level in LEVELS:
            group = [r for r in rows if (r["case"], r["n"], r["level"]) == ("planted", n, level)]
            old, alone = ([r[rule]["AddNeurons"] for r in group] for rule in ("old", "new"))
            counts = [f"{sum(hits)}/{len(hits)}" for hits in (old, alone, [r["step"] for r in group])]
            lines.append([f"n={n}, noise/signal {level:g}", *counts])
    head = ["planted", "neurons, 3 deviations", "neurons, 5 %", "all operators, 5 % together"]
    text += "\n\n" + table(head, lines)
    return text + "\n\n" + table(["", "p of z at most 5 %", "p of permuted goals", "both", "neither"], beside(rows))


def beside(rows: list[dict[str, Any]]) -> Iterator[list[str]]:
    """How often both tests say the same."""
    for n in SIZES[:2]:
        for level in (0.0, *LEVELS):
            p_values = [r["p"] for r in rows if (r["case"], r["n"], r["level"]) == ("independent", n, level)]
            for where in p_values[0]:
                pairs = [(p[where][0] <= 0.05, p[where][1] <= 0.05) for p in p_values]
                kinds = [sum(z for z, _ in pairs), sum(p for _, p in pairs), pairs.count((True, True))]
                what = f"noise, hidden layer {1 + int(where) // 2}" if not level else f"planted, noise/signal {level:g}"
                yield [f"n={n}, {what}", *(f"{hits}/{len(pairs)}" for hits in (*kinds, pairs.count((False, False))))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="results, one JSON object a line; runs in it are kept")
    parser.add_argument("--seeds", default="0-99", help="first-last")
    parser.add_argument("--cases", default="noise,planted,independent")
    parser.add_argument("--table", type=Path, help="document to write the tables into")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    first, last = map(int, arguments.seeds.split("-"))
    done = {(r["case"], r["seed"], r["n"], r["level"]) for r in read(arguments.out)}
    for task in tasks(arguments.cases.split(","), range(first, last + 1)):
        if task not in done:
            case, seed, n, level = task
            problem = planted(seed, n, level) if level else noise(seed, n)
            result = independent(problem) if case == "independent" else run(problem, not level)
            append(arguments.out, {"case": case, "seed": seed, "n": n, "level": level, **result})
    if arguments.table:
        write_block(arguments.table, "significance.py", tables(read(arguments.out)))


if __name__ == "__main__":
    main()
