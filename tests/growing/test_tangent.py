"""The whole network's tangent space against its full Jacobian."""

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import reference
import torch
from torch import Tensor, nn

import dagrow
from dagrow.growing._tangent import _Jacobian

F64 = torch.float64


def squares(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().flatten(1).sum(1).mean()


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.c(x + torch.tanh(self.b(x)))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2))


def normed() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2)
    return model


def two_linear() -> nn.Module:
    """More parameters than directions: W2 W1 moves only along 2 x 3 of them."""
    return nn.Sequential(nn.Linear(3, 5, bias=False), nn.Linear(5, 2, bias=False))


def shared() -> nn.Module:
    layer = nn.Linear(3, 3)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(3, 2))


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


def token_mixer() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, ()),
    "residual": (Residual, ()),
    "normed": (normed, ()),
    "two_linear": (two_linear, ()),
    "shared": (shared, ()),
    "tied": (Tied, ()),
    "tokens": (token_mixer, (5,)),
}


def case(name: str, samples: int = 40, dtype: torch.dtype = F64) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    make, positions = MODELS[name]
    model = make().to(dtype)
    x, y = torch.randn(samples, *positions, 3, dtype=dtype), torch.randn(samples, *positions, 2, dtype=dtype)
    return model, list(zip(x.split(16), y.split(16), strict=True))


def truth(model: nn.Module, batches: list[tuple[Tensor, Tensor]], loss: Any) -> tuple[float, float]:
    inputs, targets = (torch.cat(part) for part in zip(*batches, strict=True))
    return reference.tangent_projection(model, loss, inputs, targets)


def precise(dag: dagrow.Dag, batches: Any, loss: Any, **settings: Any) -> dagrow.Tangent:
    return dagrow.tangent(dag, batches, loss, iterations=1000, tolerance=1e-13, **settings)


@pytest.mark.parametrize("name", MODELS)
def test_it_is_the_projection_on_the_columns_of_the_full_jacobian(name: str) -> None:
    model, batches = case(name)
    found = precise(dagrow.trace(model, batches[0][0]), batches, squares)
    goal, followed = truth(model, batches, squares)
    assert found.goal == pytest.approx(goal, rel=1e-10)
    assert found.explained == pytest.approx(followed, rel=1e-6)
    assert found.bottleneck == pytest.approx(goal - followed, rel=1e-6)
    assert found.share == pytest.approx(1 - followed / goal, rel=1e-6)
    assert found.converged
    assert found.samples == 40


@pytest.mark.parametrize("name", MODELS)
def test_the_whole_network_follows_more_than_its_last_layer_alone(name: str) -> None:
    model, batches = case(name)
    found = precise(dagrow.trace(model, batches[0][0]), batches, squares)
    last = found.edges[[n for n, m in model.named_modules() if isinstance(m, nn.Linear)][-1]]
    assert found.goal == pytest.approx(last.goal, rel=1e-9)  # the output is the last layer's pre-activation
    assert found.bottleneck <= last.bottleneck * (1 + 1e-9)


def test_a_sum_is_measured_as_the_mean() -> None:
    model, batches = case("mlp")
    dag = dagrow.trace(model, batches[0][0])
    mean = precise(dag, batches, squares)
    total = precise(dag, batches, lambda output, target: squares(output, target) * len(output))
    assert total.goal == pytest.approx(mean.goal, rel=1e-9)
    assert total.explained == pytest.approx(mean.explained, rel=1e-6)


def test_batch_sizes_do_not_matter() -> None:
    model, batches = case("residual")
    dag = dagrow.trace(model, batches[0][0])
    whole = [tuple(torch.cat(part) for part in zip(*batches, strict=True))]
    assert precise(dag, whole, squares).explained == pytest.approx(precise(dag, batches, squares).explained, rel=1e-6)


def test_frozen_parameters_do_not_count() -> None:
    model, batches = case("mlp")
    model[0].requires_grad_(False)
    found = precise(dagrow.trace(model, batches[0][0]), batches, squares)
    last = found.edges["2"]
    assert found.explained == pytest.approx(last.explained, rel=1e-6)
    assert found.bottleneck == pytest.approx(last.bottleneck, rel=1e-6)
    model.requires_grad_(False)
    nothing = precise(dagrow.trace(model, batches[0][0]), batches, squares)
    assert (nothing.explained, nothing.iterations, nothing.converged) == (0.0, 0, True)


def test_it_converges_to_its_tolerance_and_says_when_it_has_not() -> None:
    model, batches = case("residual")
    dag = dagrow.trace(model, batches[0][0])
    exact, rough = precise(dag, batches, squares), dagrow.tangent(dag, batches, squares, tolerance=1e-3)
    assert rough.converged
    assert rough.iterations <= exact.iterations <= sum(p.numel() for p in model.parameters())
    assert exact.explained - 2e-3 * exact.goal <= rough.explained <= exact.explained * (1 + 1e-9)
    cut = dagrow.tangent(dag, batches, squares, iterations=1)
    assert not cut.converged
    assert 0 < cut.explained < exact.explained


def test_single_precision_is_enough() -> None:
    model, batches = case("mlp", dtype=torch.float32)
    found = dagrow.tangent(dagrow.trace(model, batches[0][0]), batches, squares, tolerance=1e-6)
    goal, followed = truth(model.double(), [(x.double(), y.double()) for x, y in batches], squares)
    assert found.goal == pytest.approx(goal, rel=1e-5)
    assert found.explained == pytest.approx(followed, rel=1e-4)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("name", ["normed", "shared"])
def test_it_changes_nothing(name: str, mode: str) -> None:
    model, batches = case(name)
    model.append(nn.Dropout(0.2))
    parameters = list(model.parameters())
    dag = dagrow.trace(model, batches[0][0])
    model.train()
    kept, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    first = dagrow.tangent(dag, batches, squares, mode=mode)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(kept[key], value) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in parameters)
    assert all(p is q for p, q in zip(parameters, model.parameters(), strict=True))
    assert all(module.training and not module._forward_hooks for module in model.modules())
    assert dagrow.tangent(dag, batches, squares, mode=mode).explained == first.explained


def test_train_mode_has_the_same_dropout_in_every_pass() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 2)).double()
    batches = [(torch.randn(30, 3, dtype=F64), torch.randn(30, 2, dtype=F64))]
    found = precise(dagrow.trace(model, batches[0][0]), batches, squares, mode="train")
    assert found.converged
    assert 0 < found.explained <= found.goal
    again = dagrow.tangent(dagrow.trace(model, batches[0][0]), batches, squares, mode="train", iterations=0)
    assert again.goal == pytest.approx(found.goal)


def test_layers_without_forward_mode_are_followed_in_reverse_mode_twice() -> None:
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return x**3

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
            ctx.save_for_backward(inputs[0])

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return 3 * ctx.saved_tensors[0] ** 2 * gradient

    class Cubic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(Cube.apply(self.a(x)))

    torch.manual_seed(0)
    model, batches = Cubic().double(), case("mlp")[1]
    jacobian = _Jacobian(cast(dagrow.Dag, SimpleNamespace(model=model)), batches, squares, "eval", {})
    move = torch.randn(jacobian.size, dtype=F64)
    pushed = jacobian._push(batches[0], move)
    output = model(batches[0][0])
    u = torch.randn_like(output)
    assert float((pushed * u).sum()) == pytest.approx(float(jacobian._pull(batches[0], u) @ move), rel=1e-9)


def test_it_prints_the_network_above_its_layers() -> None:
    model, batches = case("mlp")
    text = str(dagrow.tangent(dagrow.trace(model, batches[0][0]), batches, squares))
    assert "network" in text
    assert "converged" in text
    assert text.index("network") < text.index("own weights follow")


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.a(x))
        return h, self.b(h)


def test_what_it_cannot_measure_it_refuses_with_the_way_out() -> None:
    model, batches = case("mlp")
    pair = dagrow.trace(Pair().double(), batches[0][0])
    with pytest.raises(dagrow.LossError, match=r"returned a tuple.*Trace a model that returns"):
        dagrow.tangent(pair, batches, lambda output, target: squares(output[1], target))
    dag = dagrow.trace(model, batches[0][0])
    with pytest.raises(dagrow.LossError, match="does not depend on the model"):
        dagrow.tangent(dag, batches, lambda output, target: target.square().mean())
    with pytest.raises(dagrow.BatchError, match="empty"):
        dagrow.tangent(dag, [], squares)
    with pytest.raises(dagrow.LossError, match="give either loss="):
        dagrow.tangent(dag, batches, None)
    with pytest.raises(dagrow.GrowthError, match="iterations='a'"):
        dagrow.tangent(dag, batches, squares, iterations="a")  # type: ignore[arg-type]
    with pytest.raises(dagrow.GrowthError, match="tolerance=-1"):
        dagrow.tangent(dag, batches, squares, tolerance=-1)
