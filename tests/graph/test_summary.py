"""FLOPs counted from the graph are those that torch counts while the model runs; coverage counts parameters."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from zoo import Plan, built, plans

import dagrow
from dagrow import AddNeurons


def counted(model: nn.Module, example: Tensor) -> int:
    """By torch, which counts attention only where it is made of matrix products."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(example)
    return counter.get_total_flops() // len(example)


class Attention(nn.Module):
    """Heads by sdpa, by matmul or by einsum; windows are merged into the batch before the last layer."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).view(*x.shape[:2], 2, -1).transpose(1, 2) for layer in (self.q, self.k, self.v))
        if self.how == "sdpa":
            h = functional.scaled_dot_product_attention(q, k, v)
        elif self.how == "matmul":
            h = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        else:
            h = torch.einsum("bhst,bhtd->bhsd", torch.einsum("bhsd,bhtd->bhst", q, k).softmax(-1), v)
        return self.o(h.transpose(1, 2).flatten(2).flatten(0, 1)).view(*x.shape[:2], -1)


class Functional(nn.Module):
    """Parameters in functions, one of them used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(4, 5))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(functional.linear(x, self.a) @ self.b.T, self.a)


def images() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, dilation=2, groups=8),
        nn.Conv2d(8, 12, 3, groups=4, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(12, 6, 3, stride=2),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 5),
    )


MODELS: dict[str, Any] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 3, bias=False)), (5, 4)),
    "tokens": (lambda: nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 3)), (5, 6, 4)),
    "images": (images, (3, 3, 17, 15)),
    "functions": (Functional, (5, 4)),
    "merged": (lambda: nn.Sequential(nn.Flatten(0, 1), nn.Linear(4, 7), nn.Linear(7, 2)), (3, 6, 4)),
    **{how: (lambda how=how: Attention(how), (3, 5, 8)) for how in ("sdpa", "matmul", "einsum")},
}


@pytest.mark.parametrize("name", MODELS)
def test_the_graph_counts_what_torch_counts(name: str) -> None:
    make, shape = MODELS[name]
    model, example = make(), torch.randn(shape)
    assert dagrow.trace(model, example).flop_count() == counted(model, example) > 0


@settings(max_examples=25, deadline=None)
@given(plan=plans())
def test_drawn_models_count_what_torch_counts(plan: Plan) -> None:
    case = built(plan)
    example = case.batches[0][0]
    assert dagrow.trace(case.model.eval(), example).flop_count() == counted(case.model, example)


@settings(max_examples=15, deadline=None)
@given(k=st.integers(1, 3), axis=st.sampled_from(["0", "3", "6"]))
def test_a_growth_costs_by_how_much_the_count_grows(k: int, axis: str) -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3),
        nn.BatchNorm2d(3),
        nn.Tanh(),
        nn.Conv2d(3, 3, 3, padding=1, stride=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(27, 4),
        nn.Tanh(),
        nn.Linear(4, 2),
    )
    x = torch.randn(4, 2, 8, 8)
    dag = dagrow.trace(model, x)
    before = dag.flop_count()
    growths = dagrow.propose(
        dag, [(x, torch.zeros(4, 2))], nn.functional.mse_loss, [AddNeurons(k=k, init="zero", axes=(axis,))]
    )
    cost = growths[0].cost
    growths[0].apply()
    assert dag.flop_count() - before == cost.flops > 0
    assert dag.flop_count() == counted(model, x)


class Again(nn.Module):
    """A layer that is called twice, on windows that are merged into the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.b(torch.tanh(self.a(x.flatten(0, 1)))))
        return self.c(torch.tanh(self.a(h))).view(*x.shape[:2], 2)


def test_the_cost_of_a_growth_counts_all_calls_and_all_windows() -> None:
    model, x = Again(), torch.randn(4, 5, 3)
    dag = dagrow.trace(model, x)
    before = dag.flop_count()
    growth = dagrow.propose(
        dag, [(x, torch.zeros(4, 5, 2))], functional.mse_loss, [AddNeurons(k=2, init="zero", axes=("a",))]
    )[0]
    growth.apply()
    assert dag.flop_count() - before == growth.cost.flops
    assert dag.flop_count() == counted(model, x)


def test_coverage_counts_every_parameter_once() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 2, 1))
    coverage = dagrow.trace(model, torch.randn(2, 3, 8, 8)).coverage()
    assert coverage.parameters == sum(p.numel() for p in model.parameters())
    assert coverage.growable == {"0": 112, "1": 8, "2": 40, "3": 10}
    assert coverage.share == 1
    assert "100.0% of 170 parameters" in str(coverage).replace("\n", " ").replace("  ", " ")
