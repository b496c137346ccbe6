"""Directions between convolutions, against the slow truth."""

import numpy as np
import reference as truth
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from images import Kernel, kernels
from torch import nn
from zoo import case_of

import dagrow
from dagrow import AddNeurons

DRAWN = settings(
    max_examples=25,
    derandomize=True,
    deadline=None,
    database=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)


SPACES = st.sampled_from((1, 2, 3)).flatmap(lambda space: st.tuples(kernels(space), kernels(space)))


def pair(first: Kernel, second: Kernel, activation: str = "Identity", seed: int = 0):
    """Two convolutions, and a loss on what the second writes."""
    torch.manual_seed(seed)
    between = getattr(nn, activation)()
    model = nn.Sequential(first.layer(2, 2), between, second.layer(2, 3))
    return case_of(model, 2, *(5, 4, 3)[: len(first.size)], sizes=(9, 14), seed=seed)


def slow(case) -> dict:
    """b, p and v of the second convolution of a pair, and where it reads, by the reference."""
    model, producer, consumer = case.model.eval(), case.model[0], case.model[2]
    x, y = (torch.cat(side) for side in zip(*case.batches, strict=True))
    with torch.no_grad():
        hidden = tuple(producer(x[:1]).shape[2:])
    return {
        "B": truth.features(model, x, consumer, consumer.bias is not None),
        "P": truth.features(model, x, producer, producer.bias is not None),
        "V": truth.goals(model, case.loss, x, y, consumer),
        "index": truth.read_at(consumer, hidden),
    }


def drawn_pair(kernel: tuple[Kernel, Kernel], activation: str = "Identity"):
    try:
        case = pair(*kernel, activation)
    except (RuntimeError, ValueError):
        return None
    return case if case.copy().axis("0").growable else None


@given(kernel=SPACES)
@DRAWN
def test_directions_between_convolutions_are_those_of_the_slow_truth(kernel: tuple[Kernel, Kernel]) -> None:
    case = drawn_pair(kernel)
    assume(case is not None)
    found = case.propose(AddNeurons(k=2, folds=1), case.copy())[0]
    assume(found.singular_values is not None)  # a consumer may read nothing but margins
    d = slow(case)
    expected = truth.neurons_between(**d)[:2]
    values = np.zeros(len(expected))
    values[: len(found.singular_values)] = found.singular_values  # the rest is rounding, and left out
    assert abs(values - expected).max() <= 1e-7 * truth.energy(d["V"]) ** 0.5


@given(kernel=SPACES, activation=st.sampled_from(("Identity", "Tanh", "ReLU")), solver=st.sampled_from(("svd", "als")))
@DRAWN
def test_the_bottleneck_of_a_growth_is_that_of_brute_force(
    kernel: tuple[Kernel, Kernel], activation: str, solver: str
) -> None:
    case = drawn_pair(kernel, activation)
    assume(case is not None)
    dag, d = case.copy(), slow(case)
    growth = case.propose(AddNeurons(k=2, folds=1, solver=solver), dag)[0]
    bottleneck = dagrow.bottlenecks(dag, case.batches, case.loss)["2"].bottleneck
    energy = truth.energy(d["V"])
    assert abs(bottleneck - truth.bottleneck(d["B"], d["V"])) <= 1e-8 * energy
    receipt = growth.apply(0.0)
    read = truth.features(dag.model.eval(), torch.cat([x for x, _ in case.batches]), dag.model[2], bias=False)
    taps = read.shape[-1] // dag.model[2].in_channels
    new = [
        c * taps + t for c in receipt.parameters["2.weight"][dag.edge("2").rule.dims["weight"][1]] for t in range(taps)
    ]
    fit = truth.explained(d["B"], read[..., new], d["V"], "centred" if dag.edge("2").bias else "raw")
    assert abs(bottleneck - growth.drop - truth.energy(fit.residual)) <= 1e-8 * energy
    assert abs(growth.gain - fit.gain) <= 1e-8 * energy


@given(kernel=SPACES, activation=st.sampled_from(("Identity", "Tanh", "ReLU")), folds=st.sampled_from((1, 4)))
@DRAWN
def test_als_is_never_worse_than_svd(kernel: tuple[Kernel, Kernel], activation: str, folds: int) -> None:
    case = drawn_pair(kernel, activation)
    assume(case is not None)
    svd, als = (case.propose(AddNeurons(k=2, folds=folds, ridge=0.0, solver=s), case.copy())[0] for s in ("svd", "als"))
    assert als.drop >= svd.drop - 1e-9 * truth.energy(slow(case)["V"])


def test_als_finds_more_than_svd_where_slots_overlap() -> None:
    kernel = Kernel((3, 3), (1, 1), (1, 1), (1, 1))
    gained = []
    for seed in range(6):
        case = pair(kernel, kernel, seed=seed)
        d, fans = slow(case), []
        for solver in ("svd", "als"):
            dag = case.copy()
            receipt = case.propose(AddNeurons(k=1, folds=1, solver=solver), dag)[0].apply(0.0)
            (row,) = receipt.parameters["0.weight"][0]
            fans.append(torch.cat([dag.model[0].weight[row].flatten(), dag.model[0].bias[row][None]]).detach().numpy())
        svd, als = (truth.fall_between(**d, fan_in=fan[:, None]) for fan in fans)
        assert als >= svd * (1 - 1e-9)
        gained.append(als / svd)
    assert max(gained) > 1.05
