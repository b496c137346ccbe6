"""Models that look growable and are not, or look frozen and are not: each once went wrong."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import dagrow

N = 48


class Between(nn.Module):
    """Two layers with something in between."""

    def __init__(self, between: Callable[["Between", Tensor], Tensor], width: int = 4, **tensors: Tensor) -> None:
        super().__init__()
        self.first, self.last, self.between = nn.Linear(3, width), nn.Linear(width, 2), between
        for name, tensor in tensors.items():
            setattr(self, name, tensor) if isinstance(tensor, nn.Parameter) else self.register_buffer(name, tensor)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self, self.first(x)))


def data(*shape: int) -> list[tuple[Tensor, Tensor]]:
    x = torch.randn(N, *shape, dtype=torch.float64)
    return list(zip(x.split(16), torch.sin(x.flatten(1)[:, :2] * 2).split(16), strict=True))


def dag_of(model: nn.Module, *shape: int) -> dagrow.Dag:
    return dagrow.trace(model.double(), torch.randn(3, *shape, dtype=torch.float64))


def loss(output: Tensor, target: Tensor) -> Tensor:
    return (output.flatten(1)[:, :2] - target).square().mean()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("between", "width"),
    [
        (lambda m, h: h.tanh() / h.size(1), 4),
        (lambda m, h: torch.cat([h[:, :-2], h[:, -2:] * 0.5], 1), 16),
        (lambda m, h: h[:, torch.tensor([1, 0, 3, 2])], 4),
        (lambda m, h: h - h.std(1, keepdim=True), 4),
    ],
    ids=["divided by its width", "halves of its end", "permuted by an index", "a deviation"],
)
def test_what_knows_its_width_does_not_grow(between: Callable[[Between, Tensor], Tensor], width: int) -> None:
    axis = dag_of(Between(between, width), 3).axis("first")
    assert not axis.growable
    assert axis.reason


@pytest.mark.parametrize(
    "between",
    [
        lambda m, h: h.tanh() / float(h.size(1)) ** 0.5,
        lambda m, h: h.clamp(max=h.shape[1] * 0.01),
        lambda m, h: h.tanh() / m.first.out_features**0.5,
        lambda m, h: h.tanh() if h.shape[1] == 4 else h,
    ],
    ids=["divided by a root", "clamped", "divided by what the layer states", "compared"],
)
def test_a_number_computed_from_a_width_stays_what_it_was(between: Callable[..., Tensor]) -> None:
    dag = dag_of(Between(between), 3)
    (x, _), *_ = data(3)
    before = dag.model(x)
    dagrow.propose(dag, data(3), loss, [dagrow.AddNeurons(k=2)])[0].apply(0.0)
    assert dag.model.first.out_features == 6
    assert torch.allclose(dag.model(x), before, rtol=0, atol=1e-12)


def test_a_width_that_the_graph_does_not_show_is_caught_by_the_loss() -> None:
    dag = dag_of(Between(lambda m, h: h.tanh() / h.shape[1:].numel()), 3)
    with pytest.raises(dagrow.GrowthError, match="computes something else when first is wider"):
        dagrow.propose(dag, data(3), loss, [dagrow.AddNeurons(k=2)])


@pytest.mark.parametrize(
    "between",
    [lambda m, h: h * m.scale, lambda m, h: h * m.scale[None], lambda m, h: h * m.scale.view(1, -1)],
    ids=["plain", "with a new dimension", "viewed"],
)
def test_a_scale_lets_new_channels_live(between: Callable[[Between, Tensor], Tensor]) -> None:
    dag = dag_of(Between(between, scale=nn.Parameter(torch.rand(4))), 3)
    receipt = dagrow.grow(dag, data(3), loss, [dagrow.AddNeurons(k=2, init="zero")])
    assert receipt.neurons == 2
    assert dag.model.scale[4:].tolist() == [1.0, 1.0]
    loss(dag.model(data(3)[0][0]), data(3)[0][1]).backward()
    assert dag.model.last.weight.grad[:, 4:].abs().min() > 0


def test_a_position_table_longer_than_the_sequence_grows() -> None:
    table = nn.Parameter(torch.rand(1, 9, 4))
    dag = dag_of(Between(lambda m, h: (h + m.table[:, : h.shape[1]]).tanh().mean(1), table=table), 5, 3)
    (growth,) = dagrow.propose(dag, data(5, 3), loss, [dagrow.AddNeurons(k=2)])
    growth.apply(0.0)
    assert table.shape == (1, 9, 6)


def test_weights_that_act_at_several_places_are_not_moved() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = nn.Linear(3, 3), nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(8, 2)
            self.c.weight = self.b.weight

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(torch.tanh(self.a(x)))
            return self.d(torch.cat([self.b(x), self.c(x)], 1).tanh())

    dag = dag_of(Twice(), 3)
    assert {g.where for g in dagrow.propose(dag, data(3), loss, [dagrow.MoveWeights()])} == {"d"}
    for edge in "abc":
        with pytest.raises(dagrow.GrowthError, match="more than once" if edge == "a" else "is shared with"):
            dagrow.propose(dag, data(3), loss, [dagrow.MoveWeights(edges=(edge,))])
    found = dagrow.bottlenecks(dag, data(3), loss)
    assert set(found) == {"d"}
    assert "a is called more than once" in str(found)


def test_a_norm_shared_by_two_axes_freezes_both() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)
            self.n1, self.n2 = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
            self.n2.weight = self.n1.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.n2(self.b(self.n1(self.a(x)).tanh())).tanh())

    dag = dag_of(Shared(), 3)
    assert [axis.growable for axis in dag.axes] == [False, False, False]
    assert dag.axis("a").reason == "n1.weight is shared with n2.weight"
    assert dag.axis("b").reason == "n2.weight is shared with n1.weight"


@pytest.mark.parametrize("width", [16, 160])
def test_half_precision_is_measured_like_single(width: int) -> None:
    model = nn.Sequential(nn.Linear(width, 2), nn.Tanh(), nn.Linear(2, 4)).bfloat16()
    x = torch.randn(600, width).bfloat16()
    y = torch.sin(2 * x.float() @ torch.randn(width, 4) / width**0.5).bfloat16()
    batches = list(zip(x.split(100), y.split(100), strict=True))
    half = dagrow.bottlenecks(dagrow.trace(model, x[:3]), batches, nn.functional.mse_loss)
    single = dagrow.bottlenecks(
        dagrow.trace(model.float(), x[:3].float()), [(a.float(), b.float()) for a, b in batches], nn.functional.mse_loss
    )
    for edge in ("0", "2"):
        assert half[edge].explained == pytest.approx(single[edge].explained, rel=0.05)


def test_autocast_is_measured() -> None:
    model, x = nn.Sequential(nn.Linear(8, 2), nn.Tanh(), nn.Linear(2, 4)), torch.randn(200, 8)

    def step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return nn.functional.mse_loss(model(batch[0]).float(), batch[1])

    found = dagrow.bottlenecks(dagrow.trace(model, x[:2]), [(x, x[:, :4].sin())], step=step)
    assert found["2"].goal > found["2"].bottleneck > 0


def test_fewer_samples_than_folds_are_refused() -> None:
    dag = dag_of(Between(lambda m, h: h.tanh()), 3)
    with pytest.raises(dagrow.BatchError, match="3 samples for 4 folds"):
        dagrow.propose(dag, [(a[:3], b[:3]) for a, b in data(3)[:1]], loss, [dagrow.AddNeurons(k=1)])


def test_a_held_out_gain_is_never_more_than_there_is() -> None:
    """A feature that is almost constant has almost nothing left once its mean is taken out."""
    dag = dag_of(nn.Sequential(nn.Linear(3, 2), nn.Sigmoid(), nn.Linear(2, 2)), 3)
    with torch.no_grad():
        dag.model[0].weight.mul_(1e-3)
    batches = [(a * 1e-2 + 5, b) for a, b in data(3)]
    goals = dagrow.bottlenecks(dag, batches, loss)
    for init in ("optimal", "random_features"):
        for growth in dagrow.propose(dag, batches, loss, [dagrow.AddNeurons(k=3, init=init)]):
            assert growth.heldout_gain <= goals["2"].goal


def test_what_tracing_fixed_is_told() -> None:
    class Guarded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(2 * x if x.shape[0] > 100 else x)

    assert "Fixed while tracing: x.shape[0] > 100 is False (test_hard_cases.py:" in str(
        dagrow.trace(Guarded(), torch.zeros(3, 4))
    )


def test_noise_does_not_grow_an_axis_that_arrives_at_many_positions() -> None:
    """One direction acts on 16 correlated groups of features: chance must count all pairs of them."""
    for seed in range(8):
        torch.manual_seed(seed)
        tokens = torch.randn(400, 1, 4).expand(400, 16, 4) + 0.05 * torch.randn(400, 16, 4)
        model = nn.Sequential(nn.Linear(4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(32, 5))
        batches = list(zip(tokens.split(100), torch.randn(400, 5).split(100), strict=True))
        dag = dagrow.trace(model, tokens[:2])
        assert not dagrow.propose(dag, batches, nn.functional.mse_loss, [dagrow.AddNeurons()]), seed
