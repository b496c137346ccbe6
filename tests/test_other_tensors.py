"""Constants made in a forward, several results of one operation, complex numbers: grown rightly, or refused."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import dagrow
from dagrow import AddNeurons
from dagrow.testing import try_axes

Use = Callable[[Tensor], Tensor]


class Tokens(nn.Module):
    """Two layers over positions with something in between."""

    def __init__(self, use: Use) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.use = nn.Linear(4, 6), nn.Linear(6, 2), use
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.use(torch.tanh(self.a(x))))


class Images(nn.Module):
    """Two convolutions with something in between."""

    def __init__(self, use: Use) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.use = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 2, 3, padding=1), use
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.use(torch.tanh(self.a(x))))


def inputs(model: nn.Module, n: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    sizes = (5, 4) if isinstance(model, Tokens) else (2, 4, 4)
    return torch.randn(n, *sizes, generator=generator, dtype=torch.float64)


def grows(model: nn.Module, name: str = "a", init: str = "optimal") -> None:
    """Asserts that an axis grows without a change of the function, and that the loss falls as steeply as foretold."""
    dag = dagrow.trace(model, inputs(model, 3))
    assert dag.axis(name).growable, dag.axis(name).reason
    assert try_axes(dag, [inputs(model, 3), inputs(model, 2)]) == {name: None}
    x = inputs(model)
    with torch.no_grad():
        y = model(x)
    batches = [(x, torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64))]
    (growth,) = dagrow.propose(dag, batches, functional.mse_loss, [AddNeurons(k=1, init=init)])
    assert growth.gain
    assert (growth.loss(-1e-5) - growth.loss(1e-5)) / 2e-5 == pytest.approx(growth.gain, rel=1e-5)


def reason(use: Use) -> str:
    axes = dagrow.trace(Tokens(use), torch.randn(3, 5, 4).double()).axes
    assert not any(axis.growable for axis in axes)
    return str(axes[0].reason)


CONSTANTS: dict[str, Use] = {
    "as_tensor": lambda h: h * torch.as_tensor([1, 2, 3, 4, 5, 6]),
    "asarray": lambda h: h * torch.asarray([1, 0, 1, 0, 1, 0]),
    "hann_window": lambda h: h * torch.hann_window(6),
    "logspace": lambda h: h + torch.logspace(0, 1, 6),
    "tril_indices": lambda h: h * torch.tril_indices(3, 3)[0],
    "new_tensor": lambda h: h * h.new_tensor([1.0, 2, 3, 4, 5, 6]),
    "constant": lambda h: h * torch.from_numpy(np.arange(6.0)),
    "vander": lambda h: h + torch.vander(torch.arange(3), 6)[:1],
    "randperm": lambda h: h * torch.randperm(6),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_numbers_for_each_channel_that_nobody_knows_for_a_new_one(name: str) -> None:
    assert name in reason(CONSTANTS[name])


MADE: list[Use] = [
    lambda h: h * torch.as_tensor(0.5, dtype=h.dtype) + torch.scalar_tensor(2),
    lambda h: h * torch.as_tensor([1, 2, 3, 4, 5])[:, None],
    lambda h: h * torch.hann_window(5)[:, None],
    lambda h: h + 0 * torch.randn(h.shape),
    lambda h: h * (torch.empty_like(h).uniform_() >= 0),
    lambda h: h * torch.empty_like(h).bernoulli_(1.0),
    lambda h: h * torch.ones(h.shape[-1]) + h.new_zeros(h.shape[1:]),
]


@pytest.mark.parametrize("use", MADE)
def test_tensors_made_in_the_forward_hold_no_channels(use: Use) -> None:
    grows(Tokens(use))


def every_other() -> Tensor:
    return torch.nonzero(torch.tensor([1, 0, 1, 0, 1]))[:, 0]


PICKED: list[Use] = [
    lambda h: h[:, torch.tensor([4, 0, 2])],
    lambda h: h[:, torch.arange(3), :] + h[:, every_other()],
    lambda h: h[:, torch.tensor([True, False, True, True, False])],
    lambda h: h[:, torch.combinations(torch.arange(3))[:, 1]],
    lambda h: torch.index_select(h, 1, torch.tensor([3, 1])),
    lambda h: h.gather(1, torch.tensor([2, 0])[None, :, None].expand(h.shape[0], 2, h.shape[2])),
    lambda h: torch.zeros_like(h)[:, :3].index_add(1, torch.tensor([0, 0, 1, 1, 2]), h),
    lambda h: torch.zeros_like(h).scatter_add(1, torch.tensor([0, 0, 1, 1, 2])[None, :, None].expand_as(h), h),
    lambda h: h.repeat_interleave(torch.tensor([1, 2, 1, 0, 1]), 1),
]


@pytest.mark.parametrize("use", PICKED)
def test_numbers_in_tensors_that_pick_positions(use: Use) -> None:
    grows(Tokens(use))


@pytest.mark.parametrize(
    ("use", "why"),
    [
        (lambda h: h[..., torch.randperm(6)], "getitem picks channels by numbers in a tensor"),
        (lambda h: h.index_select(2, torch.arange(6)), "index_select picks channels by numbers in a tensor"),
        (lambda h: h.topk(6, 2).values, "topk mixes channels"),
        (lambda h: torch.fft.fft2(h).real, "fft_fft2 mixes channels"),
    ],
)
def test_numbers_in_tensors_that_pick_channels(use: Use, why: str) -> None:
    assert why in reason(use)


def dominant(h: Tensor) -> Tensor:
    values, at = h.max(1, keepdim=True)
    return values + h.gather(1, at)


SEVERAL: list[Use] = [
    dominant,
    lambda h: h.topk(2, 1)[0],
    lambda h: torch.sort(h, dim=1).values,
    lambda h: torch.take_along_dim(h, h.argsort(1), 1),
    lambda h: torch.std_mean(h, 1)[0],
    lambda h: torch.aminmax(h, dim=1).max,
    lambda h: torch.cummax(h, 1)[0],
    lambda h: h.kthvalue(2, 1).values + h.median(1).values,
    lambda h: h.unbind(1)[2],
    lambda h: torch.frexp(h)[0],
]


@pytest.mark.parametrize("use", SEVERAL)
def test_each_of_several_results_has_the_channels(use: Use) -> None:
    grows(Tokens(use))


def unpooled(h: Tensor) -> Tensor:
    values, at = functional.max_pool2d(h, 2, return_indices=True)
    return functional.max_unpool2d(values, at, 2)


def put_back(h: Tensor) -> Tensor:
    values, at = (part.flatten(2) for part in nn.MaxPool2d(2, return_indices=True)(h))
    return torch.zeros_like(h).flatten(2).scatter(2, at, values).view_as(h)


POOLS = [unpooled, put_back, lambda h: functional.adaptive_max_pool2d(h, 2, return_indices=True)[0]]


@pytest.mark.parametrize("use", POOLS)
def test_indices_of_a_pool_ride_along(use: Use) -> None:
    grows(Images(use))


class SegNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e, self.m, self.d = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 2, 3)
        self.pool, self.unpool = nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h, at = self.pool(torch.relu(self.e(x)))
        return self.d(self.unpool(torch.relu(self.m(h)), at))


def test_what_is_unpooled_grows_with_what_was_pooled() -> None:
    example = torch.randn(2, 2, 4, 4).double()
    dag = dagrow.trace(SegNet(), example)
    assert [(axis.name, axis.growable) for axis in dag.axes] == [("e+m", True), ("d", False)]
    assert try_axes(dag, [example, example[:1]]) == {"e+m": None}


def turned(h: Tensor) -> Tensor:
    angles = torch.arange(5.0, dtype=h.dtype)[:, None]
    return (torch.complex(h, torch.zeros_like(h)) * torch.polar(torch.ones_like(angles), angles)).real


COMPLEX: list[Use] = [
    turned,
    lambda h: torch.fft.rfft(h, dim=1).abs(),
    lambda h: torch.fft.irfft(torch.fft.rfft(h, dim=1), n=5, dim=1),
    lambda h: torch.view_as_real(torch.fft.rfft(h, dim=1))[..., 0],
]


@pytest.mark.parametrize("use", COMPLEX)
@pytest.mark.parametrize("init", ["optimal", "random"])
def test_complex_numbers_between_layers(use: Use, init: str) -> None:
    grows(Tokens(use), init=init)


class Interactions(nn.Module):
    """Products of features, of which the pairs below the diagonal are read."""

    def __init__(self, index: Callable[[], Any]) -> None:
        super().__init__()
        self.bot, self.index = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4)), index
        self.emb, self.top = nn.ModuleList(nn.EmbeddingBag(7, 4) for _ in range(2)), nn.Linear(7, 1)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        d = self.bot(x)
        t = torch.cat([d, *(e(c[:, k : k + 1]) for k, e in enumerate(self.emb))], 1).view(x.shape[0], -1, 4)
        i, j = self.index()
        return self.top(torch.cat([d, torch.bmm(t, t.transpose(1, 2))[:, i, j]], 1))


def test_an_index_made_in_the_forward_is_what_a_list_is() -> None:
    example = torch.randn(2, 3), torch.randint(7, (2, 2))
    indices = (lambda: ([1, 2, 2], [0, 0, 1])), (lambda: torch.tril_indices(3, 3, -1))
    axes = [
        [(a.name, a.width, a.growable) for a in dagrow.trace(Interactions(index), example).axes] for index in indices
    ]
    assert axes[0] == axes[1] == [("bot.0", 5, True), ("bot.2", 1, False), ("top", 1, False)]
