"""By how much the loss rises when units go: on other samples, as it is predicted, as it was fitted, and by Fisher.

``python tests/benchmarks/removal.py`` prints two tables of Markdown.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

import dagrow
from dagrow import Growth, RemoveNeurons

SEEDS = 8
Losses = Callable[[Tensor, Tensor], Tensor]  #: of each sample
KINDS: dict[str, Losses] = {
    "squares": lambda a, b: (a - b).square().sum(1) / 2,
    "squares / 100": lambda a, b: (a - b).square().sum(1) / 200,
    "cross entropy": lambda a, b: nn.functional.cross_entropy(a, b.argmax(1), reduction="none"),
}


def trained(losses: Losses, seed: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A network of 16 hidden units, and samples that it was not trained on."""
    torch.manual_seed(seed)
    x, mix = torch.randn(9000, 5).double(), torch.randn(5, 3).double()
    y = torch.sin(x @ mix) + 0.3 * torch.randn(9000, 3).double()
    model = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        losses(model(x[:3000]), y[:3000]).mean().backward()
        optimizer.step()
    return model, x[3000:], y[3000:]


def removal(model: nn.Module, losses: Losses, x: Tensor, y: Tensor, k: int, score: str) -> Growth:
    operator = RemoveNeurons(k=k, score=score)  # type: ignore[arg-type]
    dag = dagrow.trace(model, x[:2])
    return dagrow.propose(dag, [(x, y)], lambda a, b: losses(a, b).mean(), [operator])[0]


def rise(growth: Growth, x: Tensor, y: Tensor) -> float:
    judge = growth.objective.with_batches([(x, y)])
    return growth.loss(1.0, judge) - growth.loss(0.0, judge)


def by_fisher(growth: Growth, losses: Losses, x: Tensor, y: Tensor) -> float:
    """``E s + E s^2 / 2`` for the slopes s of each sample's loss along the way."""
    model, step = growth.dag.model, 1e-6
    with torch.no_grad():
        up, down = (
            losses(functional_call(model, growth.change.tensors(model, gamma), (x,)), y) for gamma in (step, -step)
        )
    slopes = (up - down) / (2 * step)
    return float(slopes.mean() + slopes.square().mean() / 2)


def main() -> None:
    columns = ("loss", "samples", "units", "others", "predicted", "fitted", "Fisher", "z")
    print(f"| {' | '.join(columns)} |\n|---|{'---:|' * 7}")
    rivals = {}
    for kind, losses in KINDS.items():
        models = [trained(losses, seed) for seed in range(SEEDS)]
        for n in (80, 300, 1500):
            for k in (2, 6):
                rows = []
                for model, x, y in models:
                    growth = removal(model, losses, x[:n], y[:n], k, "refit")
                    assert growth.heldout_gain is not None
                    true, predicted = rise(growth, x[n:], y[n:]), -growth.heldout_gain
                    fisher = by_fisher(growth, losses, x[:n], y[:n])
                    rows.append((true, predicted, rise(growth, x[:n], y[:n]), fisher, growth.heldout_error))
                true, predicted, fitted, fisher, error = np.array(rows).T
                z = np.sqrt(np.mean(((predicted - true) / error) ** 2))
                means = " | ".join(f"{1e3 * values.mean():.3g}" for values in (true, predicted, fitted, fisher))
                print(f"| {kind} | {n} | {k} | {means} | {z:.2g} |", flush=True)
        for k in (2, 6):
            for score in ("refit", "taylor", "magnitude"):
                rises = [
                    rise(removal(m, losses, x[:1500], y[:1500], k, score), x[1500:], y[1500:]) for m, x, y in models
                ]
                rivals[kind, k, score] = 1e3 * float(np.mean(rises))
    print("\n| loss | units | refit | Taylor | magnitude |\n|---|---:|---:|---:|---:|")
    for kind in KINDS:
        for k in (2, 6):
            values = " | ".join(f"{rivals[kind, k, score]:.3g}" for score in ("refit", "taylor", "magnitude"))
            print(f"| {kind} | {k} | {values} |")


if __name__ == "__main__":
    main()
