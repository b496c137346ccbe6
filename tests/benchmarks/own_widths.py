"""A network that finds its own widths, its twin of random neurons, and its last architecture from scratch.

    python tests/benchmarks/own_widths.py [--data DIR] [--seed N] [--epochs N]

The network starts with one neuron in each of two hidden layers. After each of the first two thirds of the epochs, each
layer is offered the neurons that are worth adding. Its twin gets as many random neurons at the same places and times.
The data are the digits of scikit-learn, or MNIST's IDX files in DIR. Not a test: pytest does not collect it.
"""

import argparse
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from common import table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import dagrow
from dagrow import AddNeurons, AfterEpoch, EveryEpochs, Grower, NothingToAdd, RoundRobin
from dagrow.reporting import mnist

MEASURED, RATE, PATIENCE = 6000, 1e-3, 2  #: samples that growth looks at; of Adam; epochs without a neuron worth adding
Batch = tuple[Tensor, Tensor]
Growths = Mapping[int, Sequence[tuple[str, int]]]  #: epoch -> places and neurons


def digits(seed: int) -> tuple[Batch, Batch, Batch]:
    """Training, validation and test data."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    inputs, target = torch.tensor(pixels).float()[order], torch.tensor(labels)[order]
    test, held_out = len(order) // 5, (len(order) - len(order) // 5) // 5
    parts = [test, held_out, len(order) - test - held_out]
    (test_x, held_x, train_x), (test_y, held_y, train_y) = inputs.split(parts), target.split(parts)
    centre, scale = train_x.mean(), train_x.std()
    return tuple(((x - centre) / scale, y) for x, y in ((train_x, train_y), (held_x, held_y), (test_x, test_y)))


def idx_files(folder: Path, seed: int) -> tuple[Batch, Batch, Batch]:
    data = mnist(folder, seed)
    return tuple((part.inputs, part.target) for part in (data.train, data.validation, data.test))


def network(widths: Sequence[int], seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    first, second, output = (nn.Linear(*sizes) for sizes in pairwise(widths))
    return nn.Sequential(OrderedDict(hidden1=first, act1=nn.SELU(), hidden2=second, act2=nn.SELU(), output=output))


class Trainee:
    """A network in training."""

    def __init__(self, name: str, data: Sequence[Batch], hidden: Sequence[int], arguments: argparse.Namespace) -> None:
        self.name, self.arguments, self.growths, self.refused = name, arguments, dict[int, list[tuple[str, int]]](), 0
        self.train, self.held_out, self.test = data
        x, y = self.train
        self.model = network((x.shape[1], *hidden, int(y.max()) + 1), arguments.seed)
        self.dag = dagrow.trace(self.model, x[:2])
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=RATE)
        self.measured = [*zip(x[:MEASURED].split(1000), y[:MEASURED].split(1000), strict=True)]
        self.shuffle = torch.Generator().manual_seed(arguments.seed)
        self.begun = time.perf_counter()

    @property
    def widths(self) -> list[int]:
        return [self.model.get_submodule(name).out_features for name in ("hidden1", "hidden2")]

    def epoch(self) -> None:
        x, y = self.train
        for part in torch.randperm(len(y), generator=self.shuffle).split(self.arguments.batch):
            self.optimizer.zero_grad()
            cross_entropy(self.model(x[part]), y[part]).backward()
            self.optimizer.step()

    def grown(self) -> "Trainee":
        """With the neurons that are worth adding."""
        stop = [NothingToAdd(PATIENCE), AfterEpoch(max(1, self.arguments.epochs * 2 // 3))]
        rules = {"schedule": EveryEpochs(), "policy": RoundRobin(), "stop": stop}
        grower = Grower(self.dag, cross_entropy, optimizer=self.optimizer, **rules)
        for epoch in range(1, self.arguments.epochs + 1):
            self.epoch()
            receipt = grower.step(epoch, self.measured, [self.held_out])
            self.growths[epoch] = [(grown.where, grown.neurons) for grown in grower.history[-1].grown]
            if receipt.parts:
                print(f"after epoch {epoch}, {self.score(self.test)} on test:\n{receipt}")
        print(f"growing is over: {grower.over}")
        return self

    def trained(self, growths: Growths | None = None) -> "Trainee":
        """With random neurons, as many at the same places and times."""
        for epoch in range(1, self.arguments.epochs + 1):
            self.epoch()
            for where, k in (growths or {}).get(epoch, ()):
                for init in ("random", "zero"):  # zero where no amplitude lowers the loss
                    neurons = AddNeurons(k=k, init=init, axes=(where,), seed=self.arguments.seed)
                    options = {"validation": [self.held_out], "optimizer": self.optimizer}
                    if dagrow.grow(self.dag, self.measured, cross_entropy, [neurons], **options).parts:
                        self.refused += init == "zero"
                        break
        return self

    @torch.no_grad()
    def score(self, data: Batch) -> str:
        output = self.model(data[0])
        return f"{cross_entropy(output, data[1]):.4f}, {100 * (output.argmax(1) == data[1]).float().mean():.1f} %"

    def row(self) -> list[str]:
        parameters = sum(p.numel() for p in self.model.parameters())
        scores = [self.score(data) for data in (self.train, self.test)]
        return [self.name, str(self.widths), f"{parameters:,}", *scores, f"{time.perf_counter() - self.begun:.1f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, help="30, or 12 of MNIST, if not given")
    arguments = parser.parse_args()
    arguments.batch = 128 if arguments.data else 32
    arguments.epochs = arguments.epochs or (12 if arguments.data else 30)
    torch.set_num_threads(1)
    data = idx_files(arguments.data, arguments.seed) if arguments.data else digits(arguments.seed)
    grown = Trainee("grown", data, (1, 1), arguments).grown()
    rows = [grown.row()]
    twin = Trainee("random neurons", data, (1, 1), arguments).trained(grown.growths)
    rows += [twin.row(), Trainee("from scratch", data, grown.widths, arguments).trained().row()]
    print(f"{twin.refused} growths of the twin lowered the loss at no amplitude; their neurons have zero fan-out.\n")
    print(table(["", "hidden widths", "parameters", "training loss, accuracy", "test loss, accuracy", "seconds"], rows))


if __name__ == "__main__":
    main()
