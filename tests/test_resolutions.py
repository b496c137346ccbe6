"""Where producers of one axis write different numbers of positions: what the table says is what operators do."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, mse_loss, relu, scaled_dot_product_attention

import dagrow
from dagrow import AddNeurons
from dagrow.graph import Axis, Dag
from dagrow.testing import check_slope, snapshot, try_axes
from dagrow.testing._snapshots_and_slopes import same

WIDTH = 8
INITS = ("optimal", "random_features", "random", "gradmax", "zero", "copy")


def heads(x: Tensor) -> Tensor:
    return x.unflatten(2, (2, -1)).transpose(1, 2)


class Attention(nn.Module):
    """Queries of one sequence, keys and values of another, in layers of their own or in one."""

    def __init__(self, fused: bool = False) -> None:
        super().__init__()
        self.fused, self.query, self.out = fused, nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        for name in ("both",) if fused else ("key", "value"):
            self.add_module(name, nn.Linear(WIDTH, (1 + fused) * WIDTH))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        key, value = self.both(y).chunk(2, -1) if self.fused else (self.key(y), self.value(y))
        attended = scaled_dot_product_attention(heads(self.query(x)), heads(key), heads(value))
        return self.out(attended.transpose(1, 2).flatten(2))


class Reduced(nn.Module):
    """Keys and values from a map of half the resolution."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.embed, self.reduce = nn.Conv2d(3, WIDTH, 2, 2), nn.Conv2d(WIDTH, WIDTH, 2, 2)
        self.norm, self.attention = nn.LayerNorm(WIDTH), Attention(fused)
        self.up, self.down, self.head = nn.Linear(WIDTH, 6), nn.Linear(6, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, images: Tensor) -> Tensor:
        image = self.embed(images)
        x, y = (tokens.flatten(2).transpose(1, 2) for tokens in (image, self.reduce(image)))
        x = x + self.attention(self.norm(x), self.norm(y))
        return self.head((x + self.down(gelu(self.up(x)))).mean(1))


class Crossed(nn.Module):
    """Targets attend to sources, of which there are more."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target, self.attention = nn.Linear(5, WIDTH), nn.Linear(4, WIDTH), Attention()
        self.up, self.down = nn.Linear(WIDTH, 6), nn.Linear(6, 2)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        x, y = self.target(target).tanh(), self.source(source).tanh()
        return self.down(relu(self.up(x + self.attention(x, y)))).mean(1)


class Latent(nn.Module):
    """Learnt queries read a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.latent, self.embed, self.attention = nn.Parameter(torch.randn(3, WIDTH)), nn.Linear(5, WIDTH), Attention()
        self.up, self.down = nn.Linear(WIDTH, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        z = self.latent.expand(x.shape[0], -1, -1)
        z = z + self.attention(z, self.embed(x).tanh())
        return self.down(relu(self.up(z))).mean(1)


class ClassToken(nn.Module):
    """One query, of the mean of all tokens, which it joins."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.up, self.down = Attention(fused=True), nn.Linear(WIDTH, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        token = x.mean(1, keepdim=True)
        token = token + self.attention(token, torch.cat([token, x], 1))
        return self.down(relu(self.up(token)))[:, 0]


class Gated(nn.Module):
    """A gate of the pooled image, and a bias of it, from layers that see one position each."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.squeeze, self.excite = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6, 4), nn.Linear(4, 6)
        self.shift, self.last, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 5, 3, stride=2), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        image = relu(self.image(x) + self.shift(x.mean((2, 3), keepdim=True)))
        gate = torch.sigmoid(self.excite(torch.tanh(self.squeeze(image.mean((2, 3))))))
        return self.head(relu(self.last(image * gate[:, :, None, None])).mean((2, 3)))


class Pyramid(nn.Module):
    """Two resolutions meet, and are read at both."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 5, 3, 2, 1), nn.Conv2d(5, 7, 3, 2, 1)
        self.fine, self.coarse = nn.Conv2d(5, 6, 1), nn.Conv2d(7, 6, 1)
        self.top, self.bottom = nn.Conv2d(6, 2, 3, padding=1), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = relu(self.first(x))
        coarse = self.coarse(relu(self.second(first)))
        fine = self.fine(first) + nn.functional.interpolate(coarse, scale_factor=2.0)
        return self.top(relu(fine)).mean((2, 3)) + self.bottom(relu(coarse)).mean((2, 3))


def images(n: int) -> tuple[Tensor]:
    return (torch.randn(n, 3, 8, 8).double(),)


def tokens(n: int) -> tuple[Tensor]:
    return (torch.randn(n, 5, 8).double(),)


ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Any]]] = {
    "reduced map": (lambda: Reduced(False), images),
    "reduced map, keys and values in one": (lambda: Reduced(True), images),
    "encoder and decoder": (Crossed, lambda n: (torch.randn(n, 7, 5).double(), torch.randn(n, 4, 4).double())),
    "latent queries": (Latent, lambda n: (torch.randn(n, 7, 5).double(),)),
    "class token": (ClassToken, tokens),
    "gate": (Gated, images),
    "pyramid": (Pyramid, images),
}


def traced(name: str) -> tuple[Dag, list[Any], Callable[[int], Any]]:
    build, inputs = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = build().double().eval()
    return dagrow.trace(model, inputs(3)), [inputs(6), inputs(6)], inputs


def step(model: Any, batch: Any) -> Tensor:
    output = model(*batch)
    generator = torch.Generator().manual_seed(1)
    target = torch.randn(output.shape[1:], generator=generator, dtype=torch.float64)
    return mse_loss(output, target.expand_as(output))


def allowed(axis: Axis, init: str) -> bool:
    """Where nothing is optimal random directions stand in."""
    return init in axis.inits or (init == "optimal" and "random" in axis.inits)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_grows_exactly_is_measured_as_the_table_says(name: str) -> None:
    dag, batches, inputs = traced(name)
    assert not any(try_axes(dag, [inputs(3), inputs(2)]).values())
    before = snapshot(dag)
    for init in INITS:
        expected = {axis.name for axis in dag.axes if allowed(axis, init)}
        growths = dagrow.propose(dag, batches, step=step, operators=[AddNeurons(k=1, init=init, folds=1)])
        assert {growth.where for growth in growths} == expected
        assert not growths.left_out
        if init in ("optimal", "random"):
            assert max(growth.gain for growth in growths) > 1e-6
            for growth in growths:
                check_slope(growth)
    same(before, snapshot(dag), "proposing")


@pytest.mark.parametrize("name", ["reduced map", "encoder and decoder", "latent queries"])
def test_the_table_says_why(name: str) -> None:
    dag, batches, _ = traced(name)
    limited = [axis for axis in dag.axes if axis.growable and "optimal" not in axis.inits]
    assert limited
    for axis in limited:
        why = axis.other_inits["optimal"]
        assert " ".join(why.split()[:2]) in " ".join(dag.describe(width=400).split())
        for init in set(INITS) - {"optimal", *axis.inits}:
            with pytest.raises(dagrow.GrowthError, match=r"Give init="):
                dagrow.propose(dag, batches, step=step, operators=[AddNeurons(k=1, init=init, axes=(axis.name,))])


def test_what_stands_in_for_the_optimal_says_so() -> None:
    dag, batches, _ = traced("reduced map")
    axis = dag.axis("attention.value")
    assert "scaled_dot_product_attention" in axis.other_inits["optimal"]
    assert axis.inits == ("random_features", "random", "zero", "copy")
    (growth,) = dagrow.propose(dag, batches, step=step, operators=[AddNeurons(k=1, axes=(axis.name,))])
    assert "random: linear theory does not reach the consumers" in growth.notes
    assert dag.axis("up").inits == INITS
    assert not dag.axis("head").inits
    assert set(dag.axis("head").other_inits.values()) == {"is an output of the model"}
