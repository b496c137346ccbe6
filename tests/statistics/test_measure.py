"""Moments: what the slow truth says, whatever the batches, the folds and the dtype, and without a trace."""

import weakref

import pytest
import reference as truth
import torch
from torch import nn
from zoo import mean_loss, sum_loss

import dagrow
from dagrow.errors import BatchError
from dagrow.solvers import Moments
from dagrow.statistics import InputFeatures, Objective, OutputGoal, measure

READS, GOAL = InputFeatures("2"), OutputGoal("2")
PAIRS = [(READS, READS), (READS, GOAL), (GOAL, GOAL), (InputFeatures("0"), READS)]


def model(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 2, bias=False)).to(dtype)


def samples(*leading: int, n: int = 22, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, *leading, 3, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randn(n, *leading, 2, generator=generator, dtype=torch.float64).to(dtype)


def measured(net: nn.Module, x, y, *sizes: int, loss=mean_loss, folds: int = 4, **options) -> Moments:
    batches = list(zip(x.split(sizes or len(x)), y.split(sizes or len(y)), strict=True))
    return measure(dagrow.trace(net, x[:2]), Objective(net, batches, loss), PAIRS, folds=folds, **options)


def close(a: torch.Tensor, b: object, rtol: float = 1e-12) -> None:
    b = torch.as_tensor(b, dtype=torch.float64)
    assert float((a - b).abs().max()) <= rtol * float(b.abs().max())


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


def hooks(net: nn.Module) -> list[int]:
    tables = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [len(getattr(module, table)) for module in net.modules() for table in tables]


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_no_trace_is_left(error: type[BaseException] | None) -> None:
    net, (x, y) = model(), samples()
    net[2].register_forward_hook(lambda *_: None)
    net[1].eval()
    mean_loss(net(x), y).backward()
    calls, before = [0], hooks(net)
    gradients, modes = [p.grad.clone() for p in net.parameters()], [m.training for m in net.modules()]
    state, random = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()

    def loss(output, target):
        calls[0] += 1
        if error is not None and calls[0] == 4:
            raise error
        return mean_loss(output, target)

    try:
        measured(net, x, y, 9, 13, loss=loss)
    except (Exception, KeyboardInterrupt):
        assert error is not None
    else:
        assert error is None
    assert hooks(net) == before
    assert [m.training for m in net.modules()] == modes
    assert all(torch.equal(a, p.grad) for a, p in zip(gradients, net.parameters(), strict=True))
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in state.items())
    assert torch.equal(random, torch.get_rng_state())
    assert torch.is_grad_enabled()


class Box:
    """Held by a graph in place of a tensor that it saves."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def test_no_graph_outlives_its_batch() -> None:
    net, (x, y) = model(), samples()
    saved: list[weakref.ref] = []

    def boxed(tensor: torch.Tensor) -> Box:
        box = Box(tensor)
        saved.append(weakref.ref(box))
        return box

    def loss(output, target):
        if output.requires_grad:
            assert not any(ref() is not None for ref in saved), "the graph of an earlier batch is alive"
        with torch.autograd.graph.saved_tensors_hooks(boxed, lambda box: box.tensor):
            return mean_loss(output, target)

    m = measured(net, x, y, 5, 5, 12, loss=loss)
    assert len(saved) >= 3
    assert not any(ref() is not None for ref in saved)
    assert not any(total.requires_grad for total in m.sums.values())


@pytest.mark.parametrize("switch", [torch.no_grad, torch.inference_mode])
def test_gradients_need_not_be_enabled(switch) -> None:
    net, (x, y) = model(), samples()
    expected = measured(net, x, y)
    with switch():
        found = measured(net, x, y)
    close(found[READS, GOAL], expected[READS, GOAL])


def test_frozen_weights_have_goals_too() -> None:
    net, (x, y) = model(), samples()
    expected = measured(net, x, y)
    found = measured(net.requires_grad_(False), x, y)
    close(found[READS, GOAL], expected[READS, GOAL])
