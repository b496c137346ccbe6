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
from dagrow.testing import check_slope, try_axes

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
    check_slope(growth)


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
        (lambda h: h[..., torch.randperm(6)], "getitem has no rule where it picks channels by numbers in a tensor"),
        (
            lambda h: h.index_select(2, torch.arange(6)),
            "index_select has no rule where it picks channels by numbers in a tensor",
        ),
        (
            lambda h: h[:, [torch.tensor(0), torch.tensor(2)]],
            "getitem has no rule where it picks channels by numbers in a tensor",
        ),
        (lambda h: h[:, : torch.tensor(3)], "getitem has no rule where it picks channels by numbers in a tensor"),
        (lambda h: h.topk(6, 2).values, "topk has no rule where it mixes channels"),
        (lambda h: torch.fft.fft2(h).real, "fft_fft2 has no rule where it mixes channels"),
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


class Graph(nn.Module):
    """Two layers over the nodes of a graph."""

    def __init__(self, product: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.product = nn.Linear(3, 4), nn.Linear(4, 2), product
        self.double()

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        return self.product(adjacency, self.b(torch.relu(self.product(adjacency, self.a(x)))))


@pytest.mark.parametrize("product", [torch.sparse.mm, torch.mm, torch.matmul])
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc])
def test_graphs_with_sparse_matrices(product: Any, layout: torch.layout) -> None:
    torch.manual_seed(0)
    x, matrix = torch.randn(6, 3).double(), (torch.rand(6, 6) > 0.5).double()
    dag = dagrow.trace(Graph(product), (x, matrix.to_sparse(layout=layout)))
    assert [axis.growable for axis in dag.axes] == [True, False]
    assert try_axes(dag, [(x, matrix.to_sparse(layout=layout))]) == {"a": None}
    batches = [((x, matrix.to_sparse(layout=layout)), torch.randn(6, 2).double())]
    for operator in (AddNeurons(k=1), dagrow.MoveWeights()):
        for growth in dagrow.propose(dag, batches, functional.mse_loss, [operator], reduction="batch"):
            check_slope(growth)


def thinned(h: Tensor) -> Tensor:
    return h.to_sparse().to_dense()


def test_layers_that_read_write_and_pass_sparse_tensors() -> None:
    model, x = Tokens(thinned), torch.randn(12, 4).double().relu()
    y = torch.randn(12, 2).double()
    dag = dagrow.trace(model, x[:3].to_sparse())
    batches = [(x.to_sparse(), y)]
    (growth,) = dagrow.propose(dag, batches, functional.mse_loss, [AddNeurons(k=1)])
    check_slope(growth)
    for convert in (Tensor.to_sparse, Tensor.to_sparse_csr):
        out = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        out.register_forward_hook(lambda _m, _args, output, convert=convert: convert(output))
        assert dagrow.trace(out, x[:3].float()).axis("0").growable


class Spectral(nn.Module):
    """A scale for each channel in the complex plane."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)
        self.scale = nn.Parameter(torch.ones(6, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return self.b((self.a(x) * self.scale).abs())


def test_layers_of_complex_weights_are_refused() -> None:
    assert (
        dagrow.trace(Spectral(), torch.randn(3, 4)).axes[0].reason == "is bound to scale, which holds complex numbers"
    )
    options = {"dtype": torch.complex64}
    model = nn.Sequential(nn.Linear(4, 6, **options), nn.Tanh(), nn.Linear(6, 2, **options))
    dag = dagrow.trace(model, torch.randn(3, 4, **options))
    assert dag.axis("0").reason == "0.weight holds complex numbers"
    batches = [(torch.randn(8, 4, **options), torch.randn(8, 2))]

    def proposed(operator: Any) -> list[dagrow.Growth]:
        return dagrow.propose(dag, batches, lambda output, y: (output.abs() - y).square().mean(), [operator])

    with pytest.raises(dagrow.DagrowError, match="holds complex numbers"):
        proposed(AddNeurons(k=1))
    assert proposed(dagrow.MoveWeights()) == []


def nested(h: Tensor) -> Tensor:
    return torch.nested.nested_tensor([*h]).to_padded_tensor(0.0)


def quantised(h: Tensor) -> Tensor:
    return torch.quantize_per_tensor(h.float(), 0.1, 0, torch.quint8).dequantize().double()


@pytest.mark.parametrize(("use", "kind"), [(nested, "nested"), (quantised, "quantised")])
def test_tensors_without_a_width_or_a_gradient_are_refused(use: Use, kind: str) -> None:
    with pytest.raises(dagrow.TraceError, match=rf"test_other_tensors.py:\d+: forward computes with a {kind} tensor"):
        dagrow.trace(Tokens(use), torch.randn(3, 5, 4).double())


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_inputs_are_refused(layout: torch.layout) -> None:
    parts = [torch.randn(3, 4), torch.randn(2, 4)]
    with pytest.raises(dagrow.TraceError, match=r"a nested tensor.* Give a padded tensor with a mask"):
        dagrow.trace(nn.Sequential(nn.Linear(4, 2)), torch.nested.nested_tensor(parts, layout=layout))


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.r = nn.Linear(4, 6), nn.LSTM(6, 6, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(self.a(x), [3, 2], batch_first=True)
        return self.r(packed)[0].data


def test_packed_sequences_are_refused() -> None:
    with pytest.raises(dagrow.TraceError, match="with a PackedSequence, which a graph cannot hold"):
        dagrow.trace(Packed(), torch.randn(2, 3, 4))
