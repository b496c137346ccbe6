"""New paths take whatever inputs the model takes, not only those of the example's sizes."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import dagrow
from dagrow import AddConnection, GrowthError
from dagrow.operators.paths import path_sites

torch.manual_seed(0)


class TwoLengths(nn.Module):
    """Attention from one sequence to another, with the same length in the example."""

    def __init__(self, d: int = 6) -> None:
        super().__init__()
        self.encode, self.deeper, self.decode = nn.Linear(5, d), nn.Linear(d, d), nn.Linear(5, d)
        self.query, self.key, self.out = nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, 5)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        memory, h = self.deeper(torch.tanh(self.encode(source))), torch.tanh(self.decode(target))
        return self.out(h + functional.scaled_dot_product_attention(self.query(h), self.key(memory), memory))


class Pyramid(nn.Module):
    """A grid that a pool halves, and for which only even sizes will do if it is to come back."""

    def __init__(self, back: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.last, self.back = nn.Conv2d(3, 2, 1), back

    def forward(self, x: Tensor) -> Tensor:
        first = torch.tanh(self.first(x))
        second = torch.tanh(self.second(functional.max_pool2d(first, 2)))
        return self.last(functional.interpolate(second, scale_factor=2) + first if self.back else second)


def far(output: Tensor, target: Tensor) -> Tensor:
    return functional.mse_loss(output.mean((1, 2, 3)), target)


def places(dag: dagrow.Dag) -> set[str]:
    return {link.place for link in path_sites(dag)}


def test_sequences_of_equal_lengths_by_chance_are_not_joined() -> None:
    model, x = TwoLengths(), torch.randn(2, 4, 5)
    found = places(dagrow.trace(model, (x, x.clone())))
    assert found == {
        "source -> deeper",
        "source -> key",
        "encode -> key",
        "target -> query",
        "target -> out",
        "decode -> out",
    }
    with pytest.raises(GrowthError, match=r"no new path can lead to decode: .* another number of positions"):
        path_sites(dagrow.trace(model, (x, x.clone())), targets=["decode"])


def test_sequences_that_meet_are_joined() -> None:
    """They are added, so that their lengths are one."""

    class Added(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.out(torch.tanh(self.a(x)) + torch.tanh(self.b(y)))

    x = torch.randn(2, 6, 3)
    assert {"x -> b", "y -> a", "x -> out", "y -> out"} <= places(dagrow.trace(Added(), (x, x.clone())))


@pytest.mark.parametrize(("size", "back"), [(8, False), (9, False), (8, True)])
def test_kernels_fit_all_sizes_that_the_model_takes(size: int, back: bool) -> None:
    model, x = Pyramid(back).double(), torch.randn(20, 1, size, size).double()
    dag = dagrow.trace(model, x[:2])
    grids = {link.place: link.geometry for link in path_sites(dag)}
    across = grids["x -> second"]
    assert across is not None
    assert across.kernel == ((1, 1) if back else (2, 2))  # only even sizes: every second position; else pairs of them
    growths = dagrow.propose(dag, [(x, x.mean((1, 2, 3)))], far, [AddConnection(folds=1, targets=("second",))])
    next(growth for growth in growths if growth.where == "x -> second").apply(0.1)
    for other in (6, 10, 16) if back else (5, 6, 7, 12):
        assert model(torch.randn(2, 1, other, other).double()).shape[2] == (other if back else other // 2)


def test_a_grid_of_fixed_size_is_no_part_of_one_that_varies() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.AdaptiveAvgPool2d(4), nn.Conv2d(2, 2, 1))
    assert places(dagrow.trace(model, torch.randn(2, 1, 8, 8))) == set()
    flat = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Conv2d(2, 2, 1), nn.Flatten(), nn.Linear(32, 3))
    fixed = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Flatten(), nn.Unflatten(1, (2, 8, 8)), *flat)
    assert "input -> 4" in places(dagrow.trace(fixed, torch.randn(2, 1, 8, 8)))  # which takes no other size


def test_sizes_that_windows_divide() -> None:
    """Sizes are computed with numbers that modules state, and only what they divide is a size that the model takes."""

    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.window, self.one, self.two = 2, nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            parts = torch.tanh(self.one(x)).view(x.shape[0], x.shape[1] // self.window, self.window, 3)
            return self.two(parts.mean(2))

    dag = dagrow.trace(Windows(), torch.randn(2, 4, 3))
    one, two = (next(node for node, layer in dag.layers.items() if layer.name == name) for name in ("one", "two"))
    sizes = dag.dynamic_sizes.together(dag.dynamic_sizes.shapes[one][1], dag.dynamic_sizes.shapes[two][1])
    assert sizes[:3] == [(4, 2), (6, 3), (8, 4)]


class Chosen(nn.Module):
    """As many positions as a number says that Python computes from a size: the graph holds for that size alone."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.one(x))
        return self.two(h[:, : int(h.shape[1] ** 0.5 * 2)])


class Merged(Chosen):
    """Positions are merged in pairs again and again, so that their number is computed in many steps."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.one(x))
        for _ in range(6):
            h = functional.pad(h, (0, 0, 0, h.shape[1] % 3 + 1))
            h = h[:, : h.shape[1] // 2] + h[:, h.shape[1] - h.shape[1] // 2 :]
        return self.two(h)


def test_a_size_that_the_graph_is_for_is_no_chance() -> None:
    dag = dagrow.trace(Chosen(), torch.randn(2, 4, 3))
    assert dag.dynamic_sizes.example
    assert places(dag) == {"x -> two"}


def test_sizes_that_are_computed_in_many_steps() -> None:
    dag = dagrow.trace(Merged(), torch.randn(2, 2, 3))
    lengths = [dag.dynamic_sizes.shapes[node][1] for node in dag.layers]
    assert lengths == [(2, 3, 4, 5, 6, 7, 8, 3), (2,) * 8]  # two is all that is left of any length
    assert places(dag) == set()


def test_what_depends_on_values_keeps_the_sizes_of_the_example() -> None:
    class Selected(Chosen):
        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.one(x))
            return self.two(h[h.sum(2) > 0])

    dag = dagrow.trace(Selected(), torch.randn(2, 4, 3))
    assert not dag.dynamic_sizes.example
    assert all(
        dag.dynamic_sizes.shapes[node] == tuple((size,) for size in node.meta["val"].shape) for node in dag.layers
    )


def test_inputs_whose_lengths_are_tied_vary_together() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.out = (nn.Linear(3, 3) for _ in range(4))

        def forward(self, x: Tensor, mask: Tensor, other: Tensor, more: Tensor) -> Tensor:
            h = self.a(x) * mask[..., None]
            return self.out(h).sum(1) + (self.b(other) + self.c(more[:, 1:])).sum(1)

    inputs = torch.randn(2, 4, 3), torch.ones(2, 4), torch.randn(2, 4, 3), torch.randn(2, 5, 3)
    dag = dagrow.trace(Masked(), inputs)
    sizes = {layer.name: dag.dynamic_sizes.shapes[node][1] for node, layer in dag.layers.items()}
    assert set(sizes["a"]) == set(sizes["b"]) == {4, 5, 6, 7, 8, 9, 10}
    assert sizes["a"] == sizes["out"] != sizes["b"] == sizes["c"]
