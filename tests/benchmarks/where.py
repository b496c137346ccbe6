"""Does the gain say where to grow? Rank correlations between what growths promise and what they bring.

    python tests/benchmarks/where.py --mnist DIR --cifar DIR --text FILE --out where.jsonl --table docs/where.md

Networks with widths drawn at random (an MLP on images of digits, a CNN on small photographs, a transformer on
characters) are trained for a while. Then every growth of a few units, at every place, is applied to copies, which are
trained on for 200 steps: several times, each time with other batches, the same for all growths. What the loss on
samples set aside falls to is the *oracle*. Scores are known before: gain, held out or not, per growth, parameter and
FLOP; by how much the loss of other samples falls at once, at the amplitude that a line search finds on them; the
bottleneck of the layers that the growth feeds; the norm of the gradient of their weights; how many parameters are new;
chance.

For each network Spearman's rank correlation between a score and by how much the oracle's loss, mean over repeats, is
lower. The oracle agrees with itself only so far: with reliability r between repeats, R of them have
r_R = R r / (1 + (R - 1) r) (Spearman and Brown), and no score can be expected to correlate better than sqrt(r_R): the
noise ceiling. Regret is how much less the place with the best score brings than the best one, as part of what lies
between the best and the mean. Tables give means over networks and their 95 % confidence intervals (Student).

Networks that are in the results file already are skipped.
"""

import argparse
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from cnn import load as images
from common import append, mean, read, source_version, table, write_block
from scipy import stats
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

import dagrow
from dagrow import AddConnection, AddLayer, AddNeurons, Growth
from dagrow.growing import best_amplitude
from dagrow.statistics import Objective
from dagrow.surgery import grown

SCRIPT = Path(__file__).name
NETWORKS = {"mlp": 8, "cnn": 6, "transformer": 6}  #: how many of each kind
WARM, STEPS, REPEATS = 300, 200, 4  #: steps before; after each growth; how often
UNITS, BATCH, MEASURED, JUDGED = 4, 64, 2_000, 1_000
RATE = 2e-3
SCORES = (
    "held-out gain",
    "held-out gain per parameter",
    "held-out gain per FLOP",
    "gain",
    "gain per parameter",
    "gain per FLOP",
    "fall at once",
    "fall at once per parameter",
    "fall at once per FLOP",
    "bottleneck",
    "gradient norm",
    "new parameters",
    "chance",
)

Data = tuple[Tensor, Tensor]


# ---------------------------------------------------------------- networks


def mlp(draw: Callable[[int, int], int]) -> nn.Sequential:
    """Five hidden layers of 4 to 32."""
    widths = [784, *(draw(4, 32) for _ in range(5)), 10]
    layers: list[nn.Module] = [nn.Flatten()]
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def cnn(draw: Callable[[int, int], int]) -> nn.Sequential:
    """Five convolutions of 4 to 16 channels with BatchNorms."""
    widths, strides = [3, *(draw(4, 16) for _ in range(5))], (2, 1, 2, 1, 2)
    layers: list[nn.Module] = []
    for (a, b), stride in zip(pairwise(widths), strides, strict=True):
        layers += [nn.Conv2d(a, b, 3, stride, padding=1), nn.BatchNorm2d(b), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))


class Block(nn.Module):
    """Causal attention and a feed-forward layer, each behind a LayerNorm."""

    def __init__(self, width: int, head: int, hidden: int) -> None:
        super().__init__()
        self.heads = 2
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, 2 * head) for _ in range(3))
        self.out = nn.Linear(2 * head, width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (f(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        x = x + self.out(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Three blocks with heads of 2 to 12 and hidden layers of 4 to 32."""

    def __init__(self, draw: Callable[[int, int], int], symbols: int = 128, length: int = 32, width: int = 24) -> None:
        super().__init__()
        self.symbols, self.places = nn.Embedding(symbols, width), nn.Parameter(0.1 * torch.randn(length, width))
        self.blocks = nn.Sequential(*(Block(width, draw(2, 12), draw(4, 32)) for _ in range(3)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, symbols)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.symbols(ids) + self.places))).transpose(1, 2)


KINDS: dict[str, Callable[..., nn.Module]] = {"mlp": mlp, "cnn": cnn, "transformer": Transformer}


@cache
def load(kind: str, place: str) -> Data:
    if kind != "transformer":
        return images("mnist" if kind == "mlp" else "cifar", place)[0]
    ids = torch.tensor([min(ord(letter), 127) for letter in Path(place).read_text()])
    ids = ids[: len(ids) // 33 * 33].view(-1, 33)
    return ids[:, :-1], ids[:, 1:]


# ---------------------------------------------------------------- one network


@dataclass
class Split:
    """Samples to train on, to measure, for the line search, and for the oracle's loss: all disjoint."""

    train: Data
    measured: list[Data]
    judged: list[Data]
    tested: list[Data]

    @classmethod
    def of(cls, data: Data, seed: int) -> "Split":
        order = torch.randperm(len(data[0]), generator=torch.Generator().manual_seed(seed))
        sizes = (MEASURED, JUDGED, MEASURED)
        first = [tuple(part[at] for part in data) for at in order[: sum(sizes)].split(sizes)]
        measured, judged, tested = ([*zip(*(p.split(250) for p in part), strict=True)] for part in first)
        rest = order[sum(sizes) :]
        return cls((data[0][rest], data[1][rest]), measured, judged, tested)


def train(model: nn.Module, data: Data, steps: int, seed: int) -> None:
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE, fused=True)
    model.train()
    for _ in range(steps):
        at = torch.randint(len(data[0]), (BATCH,), generator=order)
        optimizer.zero_grad()
        cross_entropy(model(data[0][at]), data[1][at]).backward()
        optimizer.step()


def loss_of(model: nn.Module, batches: Sequence[Data]) -> float:
    model.eval()
    with torch.no_grad():
        return mean(float(cross_entropy(model(x), y)) for x, y in batches)


def study(kind: str, place: str, seed: int) -> dict[str, Any]:
    """Every growth of one network: scores and the oracle's losses."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    data = load(kind, place)
    split = Split.of(data, seed)
    model = KINDS[kind](lambda low, high: int(torch.randint(low, high + 1, (1,))))
    train(model, split.train, WARM, seed)
    dag = dagrow.trace(model, data[0][:2])
    operators = [AddNeurons(k=UNITS), AddLayer(UNITS, nn.ReLU()), AddConnection()]
    growths = [g for g in dagrow.propose(dag, split.measured, cross_entropy, operators) if g.gain > 0]
    bottlenecks = dagrow.bottlenecks(dag, split.measured, cross_entropy)
    judge = Objective(model, split.judged, cross_entropy)
    chance = torch.rand(len(growths), generator=torch.Generator().manual_seed(seed)).tolist()
    norms = gradient_norms(model, split.measured)
    rows = [
        {
            "operator": type(growth.operator).__name__,
            "where": growth.where,
            "significant": growth.significant,
            **tried(growth, judge, split, seed, scores(growth, bottlenecks, norms, luck)),
        }
        for growth, luck in zip(growths, chance, strict=True)
    ]
    without = [trained(model, split, seed, repeat) for repeat in range(REPEATS)]
    return {
        "kind": kind,
        "seed": seed,
        "version": source_version(),
        "loss": loss_of(model, split.tested),
        "parameters": dag.parameter_count(),
        "without": without,
        "growths": rows,
    }


def gradient_norms(model: nn.Module, batches: Sequence[Data]) -> dict[str, float]:
    """Of every parameter, over all batches."""
    model.eval()
    model.zero_grad()
    for x, y in batches:
        (cross_entropy(model(x), y) / len(batches)).backward()
    norms = {name: float(p.grad.norm()) for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return norms


def scores(growth: Growth, bottlenecks: dagrow.Bottlenecks, norms: dict[str, float], luck: float) -> dict[str, float]:
    """All that is known of a growth before it is tried."""
    cost, heldout = growth.cost, growth.heldout_gain
    assert heldout is not None
    fed = [edge for edge in growth.gain_from if edge in bottlenecks]
    fed = fed or readers(growth)
    return {
        "held-out gain": heldout,
        "held-out gain per parameter": heldout / cost.parameters,
        "held-out gain per FLOP": heldout / cost.flops,
        "gain": growth.gain,
        "gain per parameter": growth.gain / cost.parameters,
        "gain per FLOP": growth.gain / cost.flops,
        "bottleneck": sum(bottlenecks[edge].bottleneck for edge in fed),
        "gradient norm": sum(norms[f"{edge}.weight"] ** 2 for edge in fed) ** 0.5,
        "new parameters": cost.parameters,
        "chance": luck,
    }


def readers(growth: Growth) -> list[str]:
    """The layers that read the activation of a residual block."""
    (branch,) = growth.change.new_paths
    return [edge.name for edge in growth.dag.edges if edge.layer.inputs is branch.source and not edge.shared]


def tried(growth: Growth, judge: Objective, split: Split, seed: int, known: dict[str, float]) -> dict[str, Any]:
    """Scores, with those of a line search, and the losses of trained copies with the growth at its amplitude."""
    before, cost = judge.mean(), growth.cost
    gamma, after = best_amplitude(growth, judge, before)
    fall = before - after
    falls = {"fall at once": fall, "fall at once per parameter": fall / cost.parameters}
    with grown(growth.dag, growth.change, gamma):
        model = copy.deepcopy(growth.dag.model)
    return {
        "scores": known | falls | {"fall at once per FLOP": fall / cost.flops},
        "gamma": gamma,
        "losses": [trained(model, split, seed, repeat) for repeat in range(REPEATS)],
    }


def trained(model: nn.Module, split: Split, seed: int, repeat: int) -> float:
    model = copy.deepcopy(model)
    train(model, split.train, STEPS, 1_000 * (seed + 1) + repeat)
    return loss_of(model, split.tested)


# ---------------------------------------------------------------- tables


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    return float(stats.spearmanr(a, b).statistic)


def ceiling(growths: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Reliability of one repeat, and the noise ceiling of the mean of all."""
    repeats = list(zip(*(growth["losses"] for growth in growths), strict=True))
    pairs = [spearman(a, b) for i, a in enumerate(repeats) for b in repeats[:i]]
    r = mean(pairs)
    of_mean = max(0.0, len(repeats) * r / (1 + (len(repeats) - 1) * r))
    return r, of_mean**0.5


def regret(score: Sequence[float], falls: Sequence[float]) -> float:
    """0 for the best growth, 1 for one at random, on average; 0 where all bring the same."""
    best, middle = max(falls), mean(falls)
    if best == middle:
        return 0.0
    return (best - falls[max(range(len(score)), key=score.__getitem__)]) / (best - middle)


def interval(values: Sequence[float]) -> str:
    """Mean and 95 % confidence interval."""
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return f"{mean(values):+.2f} ({mean(values) - half:+.2f} to {mean(values) + half:+.2f})"


def chosen(run: dict[str, Any], operator: str) -> list[dict[str, Any]]:
    return [growth for growth in run["growths"] if operator in ("", growth["operator"])]


def rows(runs: Sequence[dict[str, Any]], operator: str) -> Iterator[list[str]]:
    """One row a score."""
    sets = [growths for growths in (chosen(run, operator) for run in runs) if len(growths) > 3]
    falls = [[-mean(growth["losses"]) for growth in growths] for growths in sets]
    limits = [ceiling(growths) for growths in sets]
    for score in SCORES:
        values = [[growth["scores"][score] for growth in growths] for growths in sets]
        yield [
            score,
            interval([spearman(a, b) for a, b in zip(values, falls, strict=True)]),
            interval([regret(a, b) for a, b in zip(values, falls, strict=True)]),
        ]
    yield ["noise ceiling of the oracle", interval([limit for _, limit in limits]), "0"]
    yield ["one repeat of the oracle and another", interval([single for single, _ in limits]), ""]


TITLES = {
    "": "All growths",
    "AddNeurons": "New neurons only",
    "AddLayer": "New layers only",
    "AddConnection": "New connections only",
}


def document(runs: Sequence[dict[str, Any]]) -> str:
    parts = []
    for kind in NETWORKS:
        networks = [run for run in runs if run["kind"] == kind]
        for operator, title in TITLES.items():
            counts = [len(chosen(run, operator)) for run in networks]
            if sum(count > 3 for count in counts) > 2:
                head = ["score", "Spearman's rank correlation", "regret"]
                parts += [
                    f"### {title}, {kind} ({len(networks)} networks, {min(counts)} to {max(counts)} growths each)",
                    table(head, rows(networks, operator)),
                ]
    versions = ", ".join(sorted({run["version"] for run in runs}))
    return "\n\n".join([*parts, f"Sources of the package: {versions}."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, what in (("mnist", "folder of MNIST"), ("cifar", "folder of CIFAR-10"), ("text", "a text file")):
        parser.add_argument(f"--{name}", help=what)
    parser.add_argument("--out", type=Path, required=True, help="results, one JSON object a line")
    parser.add_argument("--table", type=Path, help="document to write the tables into")
    parser.add_argument("--kinds", type=lambda text: text.split(","), default=list(NETWORKS))
    parser.add_argument("--seeds", type=int, help="networks of each kind")
    arguments = parser.parse_args()
    done = {(run["kind"], run["seed"]) for run in read(arguments.out)}
    places = {"mlp": arguments.mnist, "cnn": arguments.cifar, "transformer": arguments.text}
    for kind in arguments.kinds if any(places.values()) else ():
        for seed in range(arguments.seeds or NETWORKS[kind]):
            if (kind, seed) not in done:
                run = study(kind, places[kind], seed)
                append(arguments.out, run)
                print(f"{kind} {seed}: {len(run['growths'])} growths, loss {run['loss']:.4f}", flush=True)
    if arguments.table:
        write_block(arguments.table, SCRIPT, document(read(arguments.out)))


if __name__ == "__main__":
    main()
