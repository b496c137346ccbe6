"""Does ``k=None`` add neurons to noise, and does it find a neuron that is there?

    python tests/benchmarks/significance.py [--seeds 50]

Noise: targets independent of the inputs. Planted: a network that lacks one neuron of the network that made the
targets (plus noise). Each run is one call of ``dagrow.grow`` with ``AddNeurons(k=None)`` on all axes.
"""

import argparse
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import dagrow

SIZES = (200, 500, 1000, 2000, 5000)
ACTIVATIONS: dict[str, type[nn.Module]] = {"Tanh": nn.Tanh, "ReLU": nn.ReLU, "GELU": nn.GELU}


def mlp(inputs: int, hidden: int, outputs: int, activation: type[nn.Module]) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), activation(), nn.Linear(hidden, outputs))


def adds(model: nn.Module, x: Tensor, y: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> bool:
    batches = list(zip(x.split(100), y.split(100), strict=True))
    return dagrow.grow(dagrow.trace(model, x[:2]), batches, loss, [dagrow.AddNeurons(k=None)]).neurons > 0


def noise(seed: int, n: int, activation: type[nn.Module], classes: int) -> bool:
    """Whether a network grows on targets that have nothing to do with the inputs."""
    torch.manual_seed(seed)
    model, x = mlp(20, 6, max(classes, 3), activation), torch.randn(n, 20)
    if classes:
        return adds(model, x, torch.randint(classes, (n,)), nn.CrossEntropyLoss())
    return adds(model, x, torch.randn(n, 3), nn.MSELoss())


def planted(seed: int, n: int, activation: type[nn.Module], level: float) -> bool:
    """Whether a network that lacks one neuron of the teacher finds it, under noise of ``level`` times the signal."""
    torch.manual_seed(seed)
    teacher, x = mlp(20, 7, 3, activation), torch.randn(n, 20)
    student = mlp(20, 6, 3, activation)
    with torch.no_grad():
        teacher[2].weight *= 3
        for mine, whole in ((student[0].weight, teacher[0].weight), (student[0].bias, teacher[0].bias)):
            mine.copy_(whole[:6])
        student[2].weight.copy_(teacher[2].weight[:, :6])
        student[2].bias.copy_(teacher[2].bias)
        signal = teacher(x)
        missing = (signal - student(x)).std()
        y = signal + level * missing * torch.randn_like(signal)
    return adds(student, x, y, nn.MSELoss())


def rate(run: Callable[[int], bool], seeds: int) -> str:
    hits = sum(run(seed) for seed in range(seeds))
    return f"{hits}/{seeds}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=50)
    seeds = parser.parse_args().seeds
    torch.set_num_threads(1)
    table = Table("case", *(f"n={n}" for n in SIZES), title="runs in which k=None added neurons")
    for name, kind in ACTIVATIONS.items():
        for classes in (0, 10):
            what = f"noise, {name}, {'cross-entropy' if classes else 'squared error'}"
            table.add_row(what, *(rate(lambda s, n=n: noise(s, n, kind, classes), seeds) for n in SIZES))  # noqa: B023
        for level in (0.5, 1.0, 2.0):
            what = f"planted, {name}, noise/signal {level}"
            table.add_row(what, *(rate(lambda s, n=n: planted(s, n, kind, level), seeds) for n in SIZES))  # noqa: B023
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
