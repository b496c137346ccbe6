"""Samples along another dimension, and samples that do not stay apart."""

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from arranged import SIZES, agree, batches, check_slope, found, plain
from tokens import DOUBLE, Tokens, data, loss
from torch import Tensor, nn
from torch.nn import functional

import dagrow
from dagrow import BatchError

APART = "samples do not stay apart"


class TimeFirst(Tokens):
    """Tokens ``[s, n, c]``, sent through the layers in some shape."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "flat":
            return super().forward(x.flatten(0, 1)).view(*x.shape[:2], -1)
        if self.way == "turned":
            return super().forward(x.transpose(0, 1)).transpose(0, 1)
        return super().forward(x)


def step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The mean over samples of a sum over positions."""
    return loss(model(batch[0]).transpose(0, 1), batch[1].transpose(0, 1))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("way", ["as they are", "flat", "turned"])
@pytest.mark.parametrize("operator", [dagrow.AddNeurons(k=2), dagrow.MoveWeights()], ids=["neurons", "move"])
def test_time_first_is_as_good_as_batch_first(
    way: str, operator: dagrow.Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("arranged.Tokens", lambda: TimeFirst(way))
    given = [(x.transpose(0, 1), y.transpose(0, 1)) for x, y in batches()]
    growth = found(step, given, operator, example=data(3)[0][:2].transpose(0, 1), batch_dim=1, reduction="mean")
    check_slope(growth)
    monkeypatch.undo()
    agree(growth, found(plain, operator=operator))


class Pooled(nn.Module):
    """A mean over a dimension, before or behind the last layer."""

    def __init__(self, dim: int, early: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.dim, self.early = nn.Linear(4, 3), nn.Linear(3, 2), dim, early
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        return self.b(h.mean(self.dim, True)) if self.early else self.b(h).mean(self.dim, True)


def squared(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return functional.mse_loss(model(batch[0]), batch[1])


def grown(model: nn.Module, x: Tensor, y: Tensor, dim: int = 0, **options: Any) -> dagrow.Growth:
    dag = dagrow.trace(model, x.narrow(dim, 0, 3))
    given = list(zip(x.split(10, dim), y.split(10, dim), strict=True))
    return dagrow.propose(dag, given, step=squared, operators=[dagrow.AddNeurons(k=2)], **options)[0]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("early", [False, True])
def test_a_mean_over_time(early: bool) -> None:
    """How new channels arrive is found along the dimension of samples as well."""
    x, y = torch.randn(40, 5, 4, dtype=DOUBLE), torch.randn(40, 1, 2, dtype=DOUBLE)
    turned = grown(Pooled(0, early), x.transpose(0, 1), y.transpose(0, 1), 1, batch_dim=1, reduction="mean")
    check_slope(turned)
    agree(turned, grown(Pooled(1, early), x, y))


class Video(nn.Module):
    """Frames through convolutions, and a mean over frames; heads share layers in the middle."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 4, 3)
        self.c, self.d, self.e, self.dim = nn.Linear(2, 3), nn.Linear(3, 2), nn.Linear(4, 2), dim
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.shape[:2]
        h = torch.tanh(self.b(torch.tanh(self.a(x.flatten(0, 1))))).mean((2, 3)).view(first, second * 2, 2)
        h = self.d(torch.tanh(self.c(h))).view(first, second, 4)
        return self.e(h).mean(self.dim, True)


@pytest.mark.filterwarnings("error")
def test_frames_of_a_sample_are_its_rows() -> None:
    x, y = torch.randn(20, 3, 2, 5, 5, dtype=DOUBLE), torch.randn(20, 1, 2, dtype=DOUBLE)
    operator = dagrow.AddNeurons(k=1)

    def growths(dim: int) -> dict[str, dagrow.Growth]:
        xs, ys = (x, y) if dim else (x.transpose(0, 1), y.transpose(0, 1))
        dag = dagrow.trace(Video(dim), xs[:2] if dim else xs[:, :2])
        given = list(zip(xs.split(9, 1 - dim), ys.split(9, 1 - dim), strict=True))
        found = dagrow.propose(dag, given, step=squared, operators=[operator], batch_dim=1 - dim, reduction="mean")
        return {growth.where: growth for growth in found}

    first, turned = growths(1), growths(0)
    assert set(first) == set(turned) == {"a", "b", "c", "d"}
    for where, growth in turned.items():
        agree(growth, first[where])
        check_slope(growth)


def attended(batch_first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, activation="gelu", batch_first=batch_first)
    return nn.Sequential(layer, nn.Linear(4, 2)).double()


class Summed(nn.Module):
    """Each row gets the mean of all rows, as a graph's nodes get that of their neighbours."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(3, 2)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x + x.mean(0))))


X, Y = torch.randn(20, 5, 4, dtype=DOUBLE), torch.randn(20, 5, 2, dtype=DOUBLE)
TURNED = X.transpose(0, 1), Y.transpose(0, 1)
MIXING: dict[str, tuple[Callable[[], nn.Module], Tensor, Tensor]] = {
    "attention over time, samples first": (lambda: attended(False), X, Y),
    "attention, time first": (lambda: attended(False), *TURNED),
    "a mean over time, at the end": (lambda: Pooled(0, False), TURNED[0], TURNED[1][:1]),
    "nodes of a graph": (Summed, X[:, 0], Y[:, 0]),
}


@pytest.mark.parametrize(("model", "x", "y"), MIXING.values(), ids=MIXING)
def test_samples_that_do_not_stay_apart(model: Callable[[], nn.Module], x: Tensor, y: Tensor) -> None:
    """Once, with the ways out."""
    dag = dagrow.trace(model(), x)
    with pytest.warns(UserWarning, match=rf"{APART}.*dimension 0.*batch_dim=.*groups=") as caught:
        dagrow.propose(dag, [(x, y), (x, y)], step=squared, operators=[dagrow.AddNeurons(k=1)])
    assert len([each for each in caught if re.match(APART, str(each.message))]) == 1


def test_targets_that_all_samples_share() -> None:
    """Nothing mixes time here, but what is measured at one time is there at the others, too."""
    x, y = TURNED[0], Y[:, 0].expand(5, -1, -1)
    dag, operators = dagrow.trace(Tokens(), x[:, :2]), [dagrow.AddNeurons(k=1)]
    with pytest.warns(UserWarning, match=r"all 5 samples of a batch have the same target.*batch_dim="):
        dagrow.propose(dag, [(x, y)], functional.mse_loss, operators)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dagrow.propose(dag, [(x, y)], functional.mse_loss, operators, batch_dim=1)


LOSSES: dict[str, tuple[Callable[[nn.Module, Any], Tensor], bool]] = {
    "a mean over time": (lambda m, b: functional.mse_loss(m(b[0]).mean(0), b[1][0]), True),
    "scores compared in a batch": (lambda m, b: (m(b[0]) - b[1]).std(0).sum(), True),
    "squares": (squared, False),
    "absolute values": (lambda m, b: functional.l1_loss(m(b[0]), b[1]), False),
    "a mean over what is not padding": (
        lambda m, b: functional.cross_entropy(m(b[0]).flatten(0, 1), b[1][..., 0].gt(0).long().flatten(), W),
        False,
    ),
}
W = torch.tensor([1.0, 3.0]).double()


@pytest.mark.parametrize(("step", "mixes"), LOSSES.values(), ids=LOSSES)
def test_losses_in_which_samples_meet(step: Callable[[nn.Module, Any], Tensor], mixes: bool) -> None:
    """Behind the model, where no layer sees it."""
    dag, operators = dagrow.trace(Tokens(), X[:2]), [dagrow.AddNeurons(k=1)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dagrow.propose(dag, [(X, Y)], step=step, operators=operators, reduction="mean")
    assert [str(each.message).startswith(APART) for each in caught] == [True] * mixes


STAYING: dict[str, tuple[Callable[[], nn.Module], Tensor, Tensor, dict[str, Any]]] = {
    "attention over time": (lambda: attended(True), X, Y, {}),
    "time first": (lambda: attended(False), *TURNED, {"batch_dim": 1}),
    "one graph a batch": (Summed, X[:, 0], Y[:, 0], {"groups": [0] * 20 + [1] * 20, "reduction": "mean"}),
    "batch norm": (lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)), X[:, 0], Y[:, 0], {}),
}


@pytest.mark.parametrize(("model", "x", "y", "options"), STAYING.values(), ids=STAYING)
def test_samples_that_stay_apart(model: Callable[[], nn.Module], x: Tensor, y: Tensor, options: dict[str, Any]) -> None:
    dag, operators = dagrow.trace(model().double(), x), [dagrow.AddNeurons(k=1, folds=2)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dagrow.propose(dag, [(x, y), (x, y)], functional.mse_loss, operators, **options)


def test_a_batch_that_the_step_refuses_is_none_of_its_own() -> None:
    """The step may count on what one sample in place of another would break."""

    def sorted_step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        assert len(batch[0]) not in SIZES or len(set(batch[0][:, 0, 0].tolist())) == len(batch[0])
        return plain(model, batch)

    agree(found(sorted_step, list(batches())), found(plain))


def test_rows_of_nobody_are_refused() -> None:
    class Bag(Pooled):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.tanh(self.a(x)).mean(0, True))

    bags = [(torch.randn(n, 4, dtype=DOUBLE), torch.randn(1, 2, dtype=DOUBLE)) for n in (3, 5, 4, 6)]
    dag, operators = dagrow.trace(Bag(0, True), bags[0][0]), [dagrow.AddNeurons(k=1)]

    with pytest.warns(UserWarning, match=APART), pytest.raises(BatchError, match=r"1 rows for 3 samples.*groups="):
        dagrow.propose(dag, bags, step=squared, operators=operators)
    (growth,) = dagrow.propose(
        dag, bags, step=squared, operators=operators, groups=lambda batch: [id(batch[0])] * len(batch[0])
    )
    assert growth.samples == 4
    check_slope(growth)
