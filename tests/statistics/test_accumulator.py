"""Sums over batches: what the slow truth says, whatever the batches, the folds and the dtype."""

import pytest
import reference as truth
import torch
from measured import PAIRS, READS, close, measured, model, samples
from zoo import mean_loss, sum_loss

from dagrow.errors import BatchError


@pytest.mark.parametrize("leading", [(), (1,), (4,), (2, 3)])
@pytest.mark.parametrize("loss", [mean_loss, sum_loss])
def test_moments_are_means_over_samples_of_sums_over_positions(leading: tuple[int, ...], loss) -> None:
    net, (x, y) = model(), samples(*leading)
    m = measured(net, x, y, 9, 13, loss=loss)
    b, a = truth.features(net, x, net[2]), truth.features(net, x, net[0])
    v = truth.goals(net, loss, x, y, net[2])
    for pair, expected in zip(PAIRS, ((b, b), (b, v), (v, v), (a, b)), strict=True):
        close(m[pair], truth.moment(*expected))
        close(m[pair[::-1]], truth.moment(*expected).T)
    assert m.samples == 22
    assert m.positions[READS] == b.shape[1]
    alone = [float(loss(net(x[n : n + 1]), y[n : n + 1]).detach()) for n in range(22)]
    assert m.loss == pytest.approx(sum(alone) / 22, rel=1e-12)


@pytest.mark.parametrize("sizes", [(22,), (1,) * 22, (5, 17), (3, 1, 11, 7)])
@pytest.mark.parametrize("folds", [1, 3, 4])
def test_sample_j_is_in_fold_j_whatever_the_batches(sizes: tuple[int, ...], folds: int) -> None:
    net, (x, y) = model(), samples(2)
    m = measured(net, x, y, *sizes, folds=folds)
    assert m.counts.tolist() == [len(range(f, 22, folds)) for f in range(folds)]
    if folds == 1:
        return
    for fold, (others, own) in enumerate(m.split()):
        kept = torch.arange(22) % folds == fold
        for part, chosen in ((own, kept), (others, ~kept)):
            alone = measured(net, x[chosen], y[chosen], folds=1)
            for pair in PAIRS:
                close(part[pair], alone[pair])
            assert part.samples == alone.samples


def test_more_folds_than_samples() -> None:
    x, y = samples(n=3)
    assert measured(model(), x, y, folds=3).counts.tolist() == [1, 1, 1]
    with pytest.raises(BatchError, match="3 samples for 4 folds"):
        measured(model(), x, y, folds=4)


@pytest.mark.parametrize("rows", [1, 3, 10])
def test_what_is_collected_before_it_is_multiplied_does_not_matter(rows: int, monkeypatch) -> None:
    net, (x, y) = model(), samples(2)
    whole = measured(net, x, y, 9, 13)
    monkeypatch.setattr("dagrow.statistics._accumulator.FLUSH_ROWS", rows)
    streamed = measured(net, x, y, 9, 13)
    for pair in PAIRS:
        close(streamed[pair], whole[pair])


def test_moments_add() -> None:
    net, (x, y) = model(), samples()
    first, second, whole = (measured(net, x[part], y[part]) for part in (slice(0, 7), slice(7, 22), slice(0, 22)))
    for pair in PAIRS:
        close((first + second)[pair], whole[pair])
    assert (first + second).samples == 22
    assert (first + second).loss == pytest.approx(whole.loss, rel=1e-12)


def test_float32_activations_are_summed_in_float64() -> None:
    x, y = samples()
    exact, single = measured(model(), x, y), measured(model(torch.float32), x.float(), y.float())
    assert single[READS, READS].dtype == torch.float64
    assert (single.resolution, exact.resolution) == (torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps)
    for pair in PAIRS:
        close(single[pair], exact[pair], 1e-5)
    short = measured(model(torch.float32), x.float(), y.float(), dtype=torch.float32)
    assert short.sums[READS, READS].dtype == torch.float32
