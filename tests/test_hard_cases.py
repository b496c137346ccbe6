"""Models that look growable and are not, or look frozen and are not: each once went wrong."""

from collections.abc import Callable

import pytest
import torch
from between import Between, dag_of, data, loss
from torch import Tensor, nn

import dagrow


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


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
