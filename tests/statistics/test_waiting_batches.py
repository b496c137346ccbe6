"""Images that wait for those of other batches give the sums of all images at once."""

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from zoo import mean_loss

import dagrow
from dagrow.solvers import Moments
from dagrow.statistics import InputFeatures, Objective, OutputGoal, measure
from dagrow.statistics import _accumulator as accumulator

Batches = list[tuple[Tensor, Tensor]]
PAIRS = [
    (InputFeatures("2"), InputFeatures("2")),
    (InputFeatures("2"), OutputGoal("2")),
    (InputFeatures("0"), InputFeatures("0")),
]


def network(taps: int = 1) -> nn.Sequential:
    """The products of the second convolution are more than its images; those of the first are not, with one tap."""
    torch.manual_seed(0)
    parts = [nn.Conv2d(1, 12, taps, padding=taps // 2), nn.Tanh(), nn.Conv2d(12, 4, 3, padding=1), nn.Tanh()]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).double()


def samples(*counts: int, size: int = 3) -> Batches:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(sum(counts), 1, size, size, generator=generator).double()
    y = torch.randn(sum(counts), 2, generator=generator).double()
    return [*zip(x.split(counts), y.split(counts), strict=True)]


def found(batches: object, folds: int = 3, taps: int = 1) -> Moments:
    dag = dagrow.trace(network(taps), torch.randn(2, 1, 3, 3).double())
    objective = Objective(dag.model, batches, mean_loss)
    objective.probe()
    return measure(dag, objective, PAIRS, folds=folds)


def near(m: Moments, expected: Moments) -> None:
    for pair in PAIRS:
        torch.testing.assert_close(m.sums[pair], expected.sums[pair], rtol=1e-10, atol=1e-12)


@pytest.fixture
def products(monkeypatch) -> Counter:
    """How often the product of a pair is taken."""
    counts, product = Counter(), accumulator.product

    def counted(x, y, batch):
        counts[x, y] += 1
        return product(x, y, batch)

    monkeypatch.setattr(accumulator, "product", counted)
    return counts


@pytest.mark.parametrize("counts", [(5, 5, 5, 5), (4, 7, 1, 8), (19, 1), (2,) * 10])
def test_sums_do_not_depend_on_how_samples_come(counts: tuple[int, ...], products: Counter) -> None:
    whole = found(samples(20))
    products.clear()
    near(found(samples(*counts)), whole)
    assert (products[PAIRS[0]], products[PAIRS[2]]) == (1, len(counts))


def test_only_so_much_waits(products: Counter, monkeypatch) -> None:
    whole = found(samples(20), 4)
    products.clear()
    enough = 2 * 5 * (12 + 4) * 9
    monkeypatch.setattr("dagrow.statistics._waiting_batches.MOST", enough)
    monkeypatch.setattr("dagrow.statistics._waiting_batches.PART", 10**9)
    near(found(samples(*(5,) * 4), 4), whole)
    assert products[PAIRS[0]] == 2


def test_more_waits_for_larger_sums(products: Counter, monkeypatch) -> None:
    whole, sums = found(samples(20), 4), 4 * (12 * 9 + 1) * (12 * 9 + 1 + 4)
    products.clear()
    monkeypatch.setattr("dagrow.statistics._waiting_batches.MOST", 1)
    monkeypatch.setattr("dagrow.statistics._waiting_batches.PART", -(-sums // (3 * 5 * (12 + 4) * 9)))
    near(found(samples(*(5,) * 4), 4), whole)
    assert products[PAIRS[0]] == 2  # three batches, and one


def test_images_of_other_sizes_are_summed_by_themselves(products: Counter) -> None:
    small, large = samples(5, 5), samples(4, 6, size=4)
    alone = [found(small, 1), found(large, 1)]
    products.clear()
    m = found([small[0], *large, small[1]], 1)
    for pair in PAIRS:
        expected = alone[0].sums[pair] + alone[1].sums[pair]
        torch.testing.assert_close(m.sums[pair], expected, rtol=1e-10, atol=1e-12)
    assert products[PAIRS[0]] == 3


class Frames(nn.Module):
    """Images of several frames a sample, whose outputs are averaged over them."""

    def __init__(self) -> None:
        super().__init__()
        self.image = network()

    def forward(self, x: Tensor) -> Tensor:
        return self.image(x.flatten(0, 1)).unflatten(0, x.shape[:2]).mean(1)


@pytest.mark.parametrize("frames", [(1, 2), (2, 4, 3), (3, 3)])
@pytest.mark.parametrize("sizes", [(6, 6, 6), (6, 5, 4)])
def test_samples_of_other_numbers_of_images_are_summed_by_themselves(
    frames: tuple[int, ...], sizes: tuple[int, ...], products: Counter
) -> None:
    batches = []
    for count, size in zip(frames, sizes, strict=False):
        (x, _), (_, y) = *samples(size * count), *samples(size)
        batches.append((x.unflatten(0, (size, count)), y))
    pairs = [tuple(replace(feature, edge=f"image.{feature.edge}") for feature in pair) for pair in PAIRS]

    def sums(batches: Batches, folds: int) -> dict:
        dag = dagrow.trace(Frames(), torch.randn(2, 3, 1, 3, 3).double())
        objective = Objective(dag.model, batches, mean_loss)
        objective.probe()
        return measure(dag, objective, pairs, folds=folds).sums

    found, starts = sums(batches, 3), [*itertools.accumulate((len(y) for _, y in batches), initial=0)]
    assert products[pairs[0]] == (1 if len({*frames}) == 1 else len(frames))
    for pair in pairs:
        expected = torch.zeros_like(found[pair])
        for start, (x, y) in zip(starts, batches, strict=False):
            for i in range(len(y)):
                expected[(start + i) % 3] += sums([(x[i : i + 1], y[i : i + 1])], 1)[pair][0]
        torch.testing.assert_close(found[pair], expected, rtol=1e-10, atol=1e-12)


def test_what_waits_is_not_written_over() -> None:
    """By a loader that uses the same memory for all batches."""

    class Loader:
        def __len__(self) -> int:
            return 4

        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            images, targets = torch.empty(5, 1, 3, 3).double(), torch.empty(5, 2).double()
            for x, y in samples(5, 5, 5, 5):
                images.numpy()[:], targets.numpy()[:] = x.numpy(), y.numpy()
                yield images, targets

    near(found(Loader(), taps=3), found(samples(20), taps=3))
