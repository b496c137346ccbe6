"""Random numbers in a loss, a model or a loader: the same whenever a batch is evaluated, so that slopes are slopes."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from test_kinds_of_losses import slope
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

import dagrow
from dagrow import AddNeurons, LossError, MoveWeights
from dagrow.statistics import Objective

X = torch.randn(64, 4, generator=torch.Generator().manual_seed(0)).double()
BATCHES = list(X.split(16))
OPERATORS = [MoveWeights(ridge=1e-3, folds=1), AddNeurons(k=2, ridge=1e-3, folds=1)]


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(5, 3).double(), nn.Linear(3, 4).double()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(torch.cat([x, t], 1))))


def diffusion(model: nn.Module, x: Tensor) -> Tensor:
    t, noise = torch.rand(len(x), 1, dtype=x.dtype), torch.randn_like(x)
    return functional.mse_loss(model((1 - t) * x + t * noise, t), noise - x)


def summed_diffusion(model: nn.Module, x: Tensor) -> Tensor:
    return diffusion(model, x) * x.numel()


class Autoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.code = nn.Linear(4, 3).double(), nn.Linear(3, 4).double()
        self.b, self.c = nn.Linear(2, 3).double(), nn.Linear(3, 4).double()

    def decode(self, mean: Tensor, width: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(mean + width.exp() * torch.randn_like(mean))))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, width = self.code(torch.tanh(self.a(x))).chunk(2, 1)
        return self.decode(mean, width), mean, width


def divergence(mean: Tensor, width: Tensor) -> Tensor:
    return (mean.square() + (2 * width).exp() - 2 * width - 1).sum(1) / 2


def variational(model: nn.Module, x: Tensor) -> Tensor:
    output, mean, width = model(x)
    return ((output - x).square().sum(1) + divergence(mean, width)).mean()


def variational_by_parts(model: Any, x: Tensor) -> Tensor:
    mean, width = model.code(torch.tanh(model.a(x))).chunk(2, 1)
    return ((model.decode(mean, width) - x).square().sum(1) + divergence(mean, width)).sum()


def augmented(model: nn.Module, x: Tensor) -> Tensor:
    """Draws from Python and numpy, too."""
    view = x * random.uniform(0.5, 1.5) + torch.from_numpy(np.random.normal(size=x.shape))
    return functional.mse_loss(model(view)[0], x)


def often(model: Any, x: Tensor) -> Tensor:
    """Draws as often as it is wide: a grown model leaves the generators elsewhere."""
    loss = variational(model, functional.dropout(x, 0.2))
    torch.rand(model.a.weight.shape)
    return loss


STEPS: dict[str, tuple[type[nn.Module], Any, Callable[..., Tensor], str]] = {
    "diffusion": (Denoiser, (X, X[:, :1]), diffusion, "mean"),
    "summed diffusion": (Denoiser, (X, X[:, :1]), summed_diffusion, "sum"),
    "variational": (Autoencoder, X, variational, "mean"),
    "variational, by parts of the model": (Autoencoder, X, variational_by_parts, "sum"),
    "augmented": (Autoencoder, X, augmented, "mean"),
    "as often as it is wide": (Autoencoder, X, often, "mean"),
}


@pytest.mark.parametrize("name", STEPS)
def test_the_gain_is_the_slope_under_noise(name: str) -> None:
    kind, example, step, reduction = STEPS[name]
    model = kind()
    dag = dagrow.trace(model, example)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    growths = dagrow.propose(dag, BATCHES, step=step, operators=OPERATORS)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert (states[2] == np.random.get_state()[1]).all()
    assert len(growths) >= 3
    for growth in growths:
        assert growth.objective.reduction == reduction
        torch.rand(3)  # what is drawn elsewhere changes nothing
        random.random()
        assert -slope(growth, growth.loss) == pytest.approx(growth.gain, rel=1e-4, abs=1e-9)
    receipt = dagrow.grow(dag, BATCHES, step=step, operators=OPERATORS)
    assert receipt.loss_after < receipt.loss_before


def test_training_goes_on_with_numbers_that_are_new_in_each_epoch() -> None:
    dag, seen = dagrow.trace(Autoencoder(), X), []

    def step(model: nn.Module, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and model.training:
            seen.append(float(torch.rand(())))
        return variational(model, x)

    optimizer = torch.optim.SGD(dag.model.parameters(), lr=1e-3)
    dagrow.fit(dag, BATCHES, step=step, epochs=3, optimizer=optimizer, schedule=dagrow.EveryEpochs(1))
    assert len(seen) == len(set(seen)) == 3 * len(BATCHES)


def test_growing_after_other_draws_measures_other_noise() -> None:
    dag = dagrow.trace(Autoencoder(), X)
    torch.manual_seed(0)
    once, again = (dagrow.bottlenecks(dag, BATCHES, step=variational).loss for _ in range(2))
    torch.rand(1)
    assert once == again != dagrow.bottlenecks(dag, BATCHES, step=variational).loss


def test_every_batch_has_noise_of_its_own() -> None:
    seen = []

    def step(model: nn.Module, x: Tensor) -> Tensor:
        seen.append(float(torch.rand(())))
        return variational(model, x)

    dag = dagrow.trace(Autoencoder(), X)
    Objective(dag.model, BATCHES, step=step, reduction="mean").mean()
    assert len(set(seen[-4:])) == 4
    assert seen[-4] in seen[:-4]  # that of the probe


OWN = np.random.default_rng(0)


def of_an_own_generator(model: nn.Module, x: Tensor) -> Tensor:
    return functional.mse_loss(model(x)[0], x * OWN.uniform())


class Annealed:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, model: nn.Module, x: Tensor) -> Tensor:
        self.calls += 1
        return variational(model, x) * min(1.0, self.calls / 100)


class Running:
    """Divides by a running mean, which begins with the first batch: on that one alone it always gives the same."""

    def __init__(self) -> None:
        self.size: Tensor | None = None

    def __call__(self, model: nn.Module, x: Tensor) -> Tensor:
        size = x.std()
        self.size = size if self.size is None else 0.9 * self.size + 0.1 * size
        return variational(model, x) / self.size


@pytest.mark.parametrize("step", [of_an_own_generator, Annealed(), Running()])
@pytest.mark.parametrize("options", [{}, {"reduction": "mean"}])
def test_what_cannot_be_held_is_refused(step: Any, options: Any) -> None:
    dag = dagrow.trace(Autoencoder(), X)
    with pytest.raises(LossError, match=r"generator of its own, or depends on how often it was called"):
        dagrow.propose(dag, BATCHES, step=step, **options)


def test_a_loss_may_ask_whether_gradients_are_computed() -> None:
    """It is measured with them, and its value is told without."""

    def penalised(model: nn.Module, x: Tensor) -> Tensor:
        return functional.mse_loss(model(x)[1], x[:, :1].expand_as(model(x)[1])) + (
            0.1 if torch.is_grad_enabled() else 0
        )

    found = dagrow.bottlenecks(dagrow.trace(Autoencoder(), X), BATCHES, step=penalised)
    assert sum(bottleneck.goal for bottleneck in found.values()) > 0


class Jittered(Dataset[Tensor]):
    """Draws when a sample is read."""

    def __getitem__(self, index: int) -> Tensor:
        return X[index] * random.uniform(0.5, 1.5) + 0.1 * torch.randn(4).double()

    def __len__(self) -> int:
        return len(X)


def test_what_a_loader_draws_is_the_same_in_every_pass() -> None:
    dag = dagrow.trace(Autoencoder(), X)
    loader = DataLoader(Jittered(), batch_size=16, shuffle=True)
    for growth in dagrow.propose(dag, loader, step=variational, operators=OPERATORS):
        torch.rand(3)
        random.random()
        assert -slope(growth, growth.loss) == pytest.approx(growth.gain, rel=1e-4, abs=1e-9)


def test_dropout_that_is_measured_in_train_mode() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.3), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 4), nn.Dropout(0.3)).double()
    dag, batches = dagrow.trace(model, X), [(x, x) for x in BATCHES]
    for growth in dagrow.propose(dag, batches, functional.mse_loss, OPERATORS, mode="train"):
        assert -slope(growth, growth.loss) == pytest.approx(growth.gain, rel=1e-4, abs=1e-9)


def test_dropout_of_new_neurons_is_noted_where_it_is_drawn() -> None:
    """A wider mask is another one; in eval mode, and where there is none behind them, nothing is to be said."""
    torch.manual_seed(0)
    layers = nn.Linear(4, 3), nn.Tanh(), nn.Dropout(0.3), nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)
    dag, batches = dagrow.trace(nn.Sequential(*layers).double(), X), [(x, x) for x in BATCHES]

    def noted(mode: str, init: str) -> dict[str, bool]:
        operator = AddNeurons(k=1, init=init)
        growths = dagrow.propose(dag, batches, functional.mse_loss, [operator], mode=mode)
        return {growth.where: any("draws other random numbers" in note for note in growth.notes) for growth in growths}

    for init in ("optimal", "random", "zero"):
        assert noted("train", init) == {"0": True, "3": False}
        assert noted("eval", init) == {"0": False, "3": False}


class Balanced(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.size = nn.Buffer(torch.ones(()))

    def forward(self, model: nn.Module, x: Tensor) -> Tensor:
        loss = variational(model, x)
        with torch.no_grad():
            self.size.mul_(0.9).add_(0.1 * loss)
        return loss / self.size


def test_a_running_mean_in_a_buffer_is_not_blamed_where_the_reduction_cannot_be_told() -> None:
    with pytest.raises(LossError, match="a sum gives 2"):
        dagrow.propose(dagrow.trace(Autoencoder(), X), BATCHES, step=Balanced())
