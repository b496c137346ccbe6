"""New connections and layers: against least squares by brute force, in files, copies and compiled, with optimizers."""

import copy
import itertools
import pickle

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import dagrow
from dagrow import AddConnection, AddLayer, AddNeurons, GrowthError, OptimizerError, StoreError
from dagrow.operators.paths import path_sites
from dagrow.testing._snapshots_and_slopes import same, snapshot

DOUBLE = torch.float64
SOME = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])


class Wired(nn.Module):
    """Layers joined as drawn: each reads the tanh of the sum of what is wired to it."""

    def __init__(self, widths: list[int], wires: list[tuple[int, int]], bias: list[bool]) -> None:
        super().__init__()
        self.wires, self.last = wires, len(widths) - 1
        ends = enumerate(zip(wires, bias, strict=True))
        self.layers = nn.ModuleList(nn.Linear(widths[a], widths[b], bias=bias) for _, ((a, b), bias) in ends)

    def forward(self, x: Tensor) -> Tensor:
        values = {0: x}
        for node in range(1, self.last + 1):
            terms = [layer(values[a]) for (a, b), layer in zip(self.wires, self.layers, strict=True) if b == node]
            total = terms[0]
            for term in terms[1:]:
                total = total + term
            values[node] = total if node == self.last else torch.tanh(total)
        return values[self.last]


@st.composite
def wired(draw: st.DrawFn) -> Wired:
    """A random DAG of three to six activations; each is written and, but for the last, read."""
    count = draw(st.integers(3, 6))
    widths = [draw(st.integers(1, 4)) for _ in range(count)]
    chain = [(i, i + 1) for i in range(count - 1)]
    further = [pair for pair in itertools.combinations(range(count), 2) if pair[1] > pair[0] + 1]
    wires = chain + [pair for pair in further if draw(st.booleans())]
    torch.manual_seed(draw(st.integers(0, 999)))
    model = Wired(widths, wires, [draw(st.booleans()) for _ in wires]).double()
    with torch.no_grad():
        for layer in model.layers:
            layer.weight.mul_(3)  # where tanh bends, activations are no combinations of each other
    return model


def data(model: Wired, n: int = 150) -> tuple[Tensor, Tensor]:
    inputs = model.layers[model.wires.index((0, 1))].in_features
    outputs = model.layers[model.wires.index((model.last - 1, model.last))].out_features
    x = torch.randn(n, inputs, dtype=DOUBLE)
    return x, torch.randn(n, outputs, dtype=DOUBLE)


def loss(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().sum() / len(output) / 2


def seen(model: Wired, x: Tensor, y: Tensor) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Each activation, and minus the gradient of each sample's loss at each pre-activation."""
    values, sums = {0: x}, {}
    for node in range(1, model.last + 1):
        sums[node] = sum(
            layer(values[a]) for (a, b), layer in zip(model.wires, model.layers, strict=True) if b == node
        ).detach()
        values[node] = torch.tanh(sums[node])
    goals = {}
    for node, found in sums.items():
        probe = torch.zeros_like(found, requires_grad=True)
        again = dict(values)
        again[node] = torch.tanh(found + probe) if node < model.last else found + probe
        for later in range(node + 1, model.last + 1):
            total = sum(layer(again[a]) for (a, b), layer in zip(model.wires, model.layers, strict=True) if b == later)
            again[later] = torch.tanh(total) if later < model.last else total
        goals[node] = -torch.autograd.grad((again[model.last] - y).square().sum() / 2, probe)[0]
    return values, goals


def left(features: list[Tensor], goal: Tensor) -> float:
    """Mean squared norm of what a least squares fit on the features leaves of the goal.

    Not for features that nearly follow from each other: second moments in double precision hold squares of such gaps.
    """
    x = torch.cat(features, 1)
    values = torch.linalg.svdvals(x / x.norm(dim=0).clamp_min(1e-300))
    assume(float(values.min()) > 1e-3)
    fitted = x @ torch.linalg.lstsq(x, goal, driver="gelsd").solution
    return float((goal - fitted).square().sum()) / len(goal)


def energy(goal: Tensor) -> float:
    """``E|v|^2``."""
    return float(goal.square().sum()) / len(goal)


def truths(model: Wired, x: Tensor, y: Tensor) -> dict[tuple[int, int], float]:
    """For every pair that is not joined and would close no cycle: by how much a new connection lets the fit improve."""
    values, goals = seen(model, x, y)
    found = {}
    for node in range(1, model.last + 1):
        into = [
            (a, layer.bias is not None) for (a, b), layer in zip(model.wires, model.layers, strict=True) if b == node
        ]
        known = [values[a] for a, _ in into]
        if any(bias for _, bias in into):
            known.append(torch.ones(len(x), 1, dtype=DOUBLE))
        for source in range(node):
            if source not in {a for a, _ in into}:
                extra = [values[source]] + ([] if any(bias for _, bias in into) else [torch.ones(len(x), 1).double()])
                found[source, node] = left(known, goals[node]) - left([*known, *extra], goals[node])
    return found


def named(model: Wired, where: str) -> tuple[int, int]:
    """The activations that a growth's place speaks of."""
    source, target = where.split(" -> ")
    ends = {f"layers.{i}": wire for i, wire in enumerate(model.wires)}
    return (0 if source == "x" else ends[source][1]), ends[target][1]


@given(wired())
@SOME
def test_gains_are_those_of_least_squares_and_no_candidate_is_missed(model: Wired) -> None:
    x, y = data(model)
    dag, expected = dagrow.trace(model, x[:2]), truths(model, x, y)
    batches = list(zip(x.split(60), y.split(60), strict=True))
    growths = dagrow.propose(dag, batches, loss, [AddConnection(folds=1)])
    found = {named(model, growth.where): growth for growth in growths}
    assert found.keys() == expected.keys()
    scale = {node: 1e-8 * energy(goal) for node, goal in seen(model, x, y)[1].items()}
    for place, growth in found.items():
        assert growth.gain == pytest.approx(expected[place], rel=0, abs=scale[place[1]])
        assert growth.drop == pytest.approx(expected[place], rel=0, abs=scale[place[1]])
    if growths:
        best = max(expected.values())
        assert expected[named(model, growths[0].where)] == pytest.approx(best, rel=0, abs=2 * max(scale.values()))


@given(wired(), st.integers(1, 3))
@SOME
def test_the_rank_is_the_best_of_its_rank(model: Wired, rank: int) -> None:
    """Reduced-rank regression by brute force: the leading singular values of what the fit adds."""
    x, y = data(model)
    values, goals = seen(model, x, y)
    dag = dagrow.trace(model, x[:2])
    for growth in dagrow.propose(dag, [(x, y)], loss, [AddConnection(rank=rank, folds=1)]):
        source, node = named(model, growth.where)
        into = [(a, layer.bias) for (a, b), layer in zip(model.wires, model.layers, strict=True) if b == node]
        known = torch.cat([*(values[a] for a, _ in into), torch.ones(len(x), 1).double()], 1)
        if all(bias is None for _, bias in into):
            continue  # the constant is new then, too
        left([known, values[source]], goals[node])
        project = known @ torch.linalg.pinv(known)
        new, goal = values[source] - project @ values[source], goals[node] - project @ goals[node]
        u, s, _ = torch.linalg.svd(new, full_matrices=False)
        explained = torch.linalg.svdvals(u[:, s > 1e-9 * s.max()].T @ goal).square()[:rank].sum() / len(x)
        assert growth.drop == pytest.approx(float(explained), rel=0, abs=1e-8 * energy(goals[node]))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(5, 3), nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.three(torch.tanh(self.two(torch.tanh(self.one(x)))))

    def twice(self, x: Tensor) -> Tensor:
        return 2 * self(x)


class Images(nn.Module):
    """Convolutions whose grids differ, and a layer on the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.second, self.third = nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Conv2d(4, 3, 3)
        self.last = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.third(torch.tanh(self.second(torch.tanh(self.norm(self.first(x)))))))
        return self.last(h.mean((2, 3)))


def images(n: int = 60) -> tuple[Images, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    x, y = torch.randn(n, 2, 9, 8, dtype=DOUBLE), torch.randn(n, 2, dtype=DOUBLE)
    return Images().double().eval(), list(zip(x.split(25), y.split(25), strict=True))


@pytest.mark.parametrize("kernel", [1, 3])
def test_gains_between_images_are_those_of_unfolded_least_squares(kernel: int) -> None:
    model, batches = images()
    x, y = (torch.cat(part) for part in zip(*batches, strict=True))
    dag = dagrow.trace(model, x[:2])
    growths = {g.where: g for g in dagrow.propose(dag, batches, loss, [AddConnection(kernel=kernel, folds=1)])}
    assert growths.keys() == {
        "x -> second",
        "x -> third",
        "x -> last",
        "norm -> third",
        "norm -> last",
        "second -> last",
    }
    one = torch.tanh(model.norm(model.first(x)))
    a = model.second(one).detach().requires_grad_()
    wanted = (
        -torch.autograd.grad(
            (model.last(torch.tanh(model.third(torch.tanh(a))).mean((2, 3))) - y).square().sum() / 2, a
        )[0]
        .flatten(2)
        .transpose(1, 2)
        .flatten(0, 1)
    )
    rows = functional.unfold(one, 3, padding=1, stride=2).transpose(1, 2).flatten(0, 1).detach()
    new = functional.unfold(x, kernel, padding=kernel // 2, stride=2).transpose(1, 2).flatten(0, 1)
    ones = torch.ones(len(rows), 1, dtype=DOUBLE)
    fall = (left([rows, ones], wanted) - left([rows, ones, new], wanted)) * len(rows) / len(x)
    assert growths["x -> second"].gain == pytest.approx(fall, rel=1e-8)
    out = -(model(x) - y).detach()
    pooled = torch.tanh(model.third(torch.tanh(model.second(one)))).mean((2, 3)).detach()
    ones = torch.ones(len(x), 1, dtype=DOUBLE)
    fall = left([pooled, ones], out) - left([pooled, ones, one.mean((2, 3)).detach()], out)
    assert growths["norm -> last"].gain == pytest.approx(fall, rel=1e-8)


def test_a_layer_explains_what_its_own_units_explain() -> None:
    """The gain of a new layer is what least squares on its hidden units, taken from the grown model, adds."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3)).double()
    x = torch.randn(200, 4, dtype=DOUBLE)
    y = torch.sin(x @ torch.randn(4, 3, dtype=DOUBLE))
    (growth,) = dagrow.propose(dagrow.trace(model, x[:2]), [(x, y)], loss, [AddLayer(5, nn.ReLU(), folds=1)])
    goal = (y - model(x)).detach()
    growth.apply(0.0)
    hidden = torch.relu(model.hidden1.fan_in(x)).detach()
    ones = torch.ones(len(x), 1, dtype=DOUBLE)
    fall = left([x, ones], goal) - left([x, ones, hidden], goal)
    assert growth.gain == pytest.approx(fall, rel=1e-8)
    random = torch.relu(torch.randn(200, 5, 4, dtype=DOUBLE, generator=torch.Generator().manual_seed(1)) @ x.T)
    others = [left([x, ones], goal) - left([x, ones, units.T], goal) for units in random]
    assert fall > sorted(others)[-20]  # among the best tenth of random layers


@pytest.mark.parametrize("name", ["one", "two"])
def test_a_residual_block_explains_what_an_activation_wants(name: str) -> None:
    """Identity-initialised: ``x + f(x)``, f fitted to minus the gradient at the activation, for all that read it."""
    torch.manual_seed(0)
    model = Net().double()
    x, y = torch.randn(200, 5, dtype=DOUBLE), torch.randn(200, 2, dtype=DOUBLE)
    dag = dagrow.trace(model, x[:2])
    growths = dagrow.propose(dag, [(x, y)], loss, [AddLayer(4, nn.Tanh(), folds=1, exact=100)])
    (growth,) = [growth for growth in growths if growth.where == f"{name} -> itself"]
    one = torch.tanh(model.one(x))
    activation = (one if name == "one" else torch.tanh(model.two(one))).detach().requires_grad_()
    rest = model.three(torch.tanh(model.two(activation)) if name == "one" else activation)
    wish = -torch.autograd.grad((rest - y).square().sum() / 2, activation)[0]
    expected = model(x)
    receipt = growth.apply(0.0)
    assert torch.equal(model(x), expected)
    hidden = torch.tanh(model.hidden1.fan_in(activation)).detach()
    explained = energy(wish) - left([hidden], wish)
    assert growth.gain == pytest.approx(explained, rel=1e-8)
    receipt.undo()
    loss_before = loss(model(x), y)
    growth.apply(0.1)
    assert loss(model(x), y) < loss_before
    assert dag.axis(name).growable


def test_residual_blocks_between_images(tmp_path) -> None:
    """They keep the grid, whatever the kernel, and files hold them."""
    model, batches = images()
    x = batches[0][0]
    dag, expected = dagrow.trace(model, x[:2]), model(x)
    growths = dagrow.propose(dag, batches, loss, [AddLayer(2, nn.Tanh(), kernel=3, exact=100)])
    places = {growth.where for growth in growths if growth.where.endswith("itself")}
    assert places == {"norm -> itself", "second -> itself", "third -> itself"}
    (growth,) = [growth for growth in growths if growth.where == "second -> itself"]
    slope = (growth.loss(1e-4) - growth.loss(-1e-4)) / 2e-4
    assert -slope == pytest.approx(growth.gain, rel=1e-4, abs=1e-12)
    growth.apply(0.0)
    assert torch.allclose(model(x), expected, atol=1e-12)
    with torch.no_grad():
        model.hidden1.fan_out.weight.normal_()
    dagrow.save(dag, tmp_path / "grown.pt")
    fresh = images()[0]
    dagrow.load(fresh, tmp_path / "grown.pt", x[:2])
    assert torch.equal(fresh(x), model(x))


# ---------------------------------------------------------------- what becomes of a model


@pytest.fixture
def net() -> tuple[Net, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    x = torch.randn(300, 5, dtype=DOUBLE)
    y = torch.sin(x @ torch.randn(5, 2, dtype=DOUBLE))
    return Net().double(), list(zip(x.split(100), y.split(100), strict=True))


GROWTHS = (AddConnection(), AddLayer(2, nn.Tanh()), AddNeurons(k=1), AddConnection(rank=1), AddLayer(3, nn.GELU()))


def several(dag: dagrow.Dag, batches: list[tuple[Tensor, Tensor]]) -> None:
    """Five growths deep, new parts among what grows."""
    for operator in GROWTHS:
        dagrow.propose(dag, batches, loss, [operator])[0].apply(0.3)


def test_the_grown_model_is_still_the_users(net) -> None:
    model, batches = net
    dag, x = dagrow.trace(model, batches[0][0][:2]), batches[0][0]
    keys = set(model.state_dict())
    several(dag, batches)
    assert dag.model is model
    assert type(model).__name__ == "Net"
    assert isinstance(model, Net)
    assert keys < set(model.state_dict())
    assert torch.equal(model.twice(x), 2 * model(x))
    expected = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), expected)
        assert dagrow.trace(other, x[:2]).edges == dag.edges
    assert len(dag.network().edges) == len(dag.edges)
    assert all(edge.name in str(dag) for edge in dag.edges)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_the_grown_model_compiles(net, backend: str) -> None:
    model, batches = net
    several(dagrow.trace(model, batches[0][0][:2]), batches)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    assert torch.allclose(compiled(batches[0][0]), model(batches[0][0]), atol=1e-12)


def test_the_grown_model_can_be_exported(net) -> None:
    model, batches = net
    several(dagrow.trace(model, batches[0][0][:2]), batches)
    exported = torch.export.export(model, (batches[0][0],)).module()
    assert torch.allclose(exported(batches[0][0]), model(batches[0][0]), atol=1e-12)


def test_files_hold_new_layers(net, tmp_path) -> None:
    model, batches = net
    fresh, x = copy.deepcopy(model), batches[0][0]
    dag = dagrow.trace(model, x[:2])
    dagrow.propose(dag, batches, loss, [AddConnection()])[0].apply(0.3)
    halfway = copy.deepcopy(model)
    several(dag, batches)
    dagrow.save(dag, tmp_path / "grown.pt")
    for start in (fresh, halfway, copy.deepcopy(model)):
        found = dagrow.load(start, tmp_path / "grown.pt", x[:2])
        assert torch.equal(start(x), model(x))
        assert found.edges == dag.edges
    other = nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    with pytest.raises(StoreError, match="does not take the new layers"):
        dagrow.load(other, tmp_path / "grown.pt", x[:2])
    assert len(other) == 3


def test_a_layer_of_ones_own_cannot_be_saved(net, tmp_path) -> None:
    model, batches = net

    class Own(nn.Tanh):
        pass

    dag = dagrow.trace(model, batches[0][0][:2])
    dagrow.propose(dag, batches, loss, [AddLayer(2, Own())])[0].apply(0.1)
    with pytest.raises(StoreError, match="a new layer of type Own cannot be saved"):
        dagrow.save(dag, tmp_path / "grown.pt")


def test_undo_goes_back_through_a_whole_sequence(net) -> None:
    model, batches = net
    dag = dagrow.trace(model, batches[0][0][:2])
    optimizer = torch.optim.Adam(model.parameters())
    loss(model(batches[0][0]), batches[0][1]).backward()
    optimizer.step()
    before, receipts = [snapshot(dag, optimizer)], []
    for operator in GROWTHS:
        receipts.append(dagrow.propose(dag, batches, loss, [operator])[0].apply(0.3, optimizer=optimizer))
        before.append(snapshot(dag, optimizer))
    for receipt in reversed(receipts):
        same(before.pop(), snapshot(dag, optimizer), "undo")
        receipt.undo()
    same(before.pop(), snapshot(dag, optimizer), "undo")


@pytest.mark.parametrize("handed", [True, False])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad, torch.optim.RMSprop])
def test_new_parameters_are_optimized(net, kind, handed: bool) -> None:
    """They join the group of the layer that they are added to: at once, or at the optimizer's next step."""
    model, batches = net
    groups = [
        {"params": [*model.one.parameters()], "lr": 0.0},
        {"params": [*model.two.parameters()], "lr": 0.1},
        {"params": [*model.three.parameters()], "lr": 0.0},
    ]
    optimizer, dag = kind(groups, lr=0.1), dagrow.trace(model, batches[0][0][:2])
    loss(model(batches[0][0]), batches[0][1]).backward()
    optimizer.step()
    (growth,) = dagrow.propose(dag, batches, loss, [AddConnection(targets=("two",))])
    receipt = growth.apply(0.1, optimizer=optimizer if handed else None)
    (name,) = receipt.parameters
    new = model.get_parameter(name)
    assert any(p is new for p in optimizer.param_groups[1]["params"]) is handed
    before = new.detach().clone()
    loss(model(batches[0][0]), batches[0][1]).backward()
    optimizer.step()
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 3, 2]
    assert not torch.equal(new, before)
    receipt.undo()
    loss(model(batches[0][0]), batches[0][1]).backward()
    optimizer.step()
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 2, 2]


def test_new_parameters_beside_new_ones_join_at_the_same_step(net) -> None:
    model, batches = net
    optimizer, dag = torch.optim.SGD(model.parameters(), lr=0.1), dagrow.trace(model, batches[0][0][:2])
    for target in ("three", "hidden1.fan_in"):
        dagrow.propose(dag, batches, loss, [AddLayer(2, nn.Tanh(), targets=(target,))])[0].apply(0.1)
    loss(model(batches[0][0]), batches[0][1]).backward()
    optimizer.step()
    assert len(optimizer.param_groups[0]["params"]) == len(list(model.parameters()))


def test_an_optimizer_that_takes_no_new_parameters_refuses(net) -> None:
    model, batches = net
    dag = dagrow.trace(model, batches[0][0][:2])
    growth = dagrow.propose(dag, batches, loss, [AddConnection()])[0]
    with pytest.raises(OptimizerError, match="LBFGS cannot take the new parameters x_to_"):
        growth.apply(0.1, optimizer=torch.optim.LBFGS(model.parameters()))
    assert len(list(model.children())) == 3


def test_averages_of_weights_follow(net) -> None:
    model, batches = net
    dag, average = dagrow.trace(model, batches[0][0][:2]), torch.optim.swa_utils.AveragedModel(model)
    receipt = dagrow.propose(dag, batches, loss, [AddConnection()])[0].apply(0.3)
    receipt.carry(average.module)
    assert torch.equal(average.module.x_to_three.weight, model.x_to_three.weight)
    average.update_parameters(model)
    assert torch.allclose(average.module(batches[0][0]), model(batches[0][0]), atol=1e-12)


# ---------------------------------------------------------------- what is refused


def test_cycles_and_what_is_read_already_are_no_candidates(net) -> None:
    model, batches = net
    dag = dagrow.trace(model, batches[0][0][:2])
    assert {link.place for link in path_sites(dag)} == {"x -> two", "x -> three", "one -> three"}
    assert {link.place for link in path_sites(dag, known=True)} == {
        "x -> one",
        "x -> two",
        "x -> three",
        "one -> two",
        "one -> three",
        "two -> three",
    }


class Sides(nn.Module):
    """Two sides, the second of which runs after the first one is read."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.left, self.right, self.first, self.second = (nn.Linear(*s) for s in ((3, 4), (3, 4), (4, 2), (4, 2)))
        self.relu = nn.ReLU(inplace)

    def forward(self, x: Tensor) -> Tensor:
        a = self.relu(self.first(torch.tanh(self.left(x))))
        return a * self.second(torch.tanh(self.right(x.index_select(1, torch.tensor([2, 1, 0])))))


@pytest.mark.parametrize("inplace", [True, False])
def test_what_runs_later_can_be_joined_to_what_ran_before(inplace: bool) -> None:
    """Unless what lies between works in place."""
    torch.manual_seed(0)
    model = Sides(inplace).double()
    x, y = torch.randn(80, 3, dtype=DOUBLE), torch.randn(80, 2, dtype=DOUBLE)
    dag = dagrow.trace(model, x[:2])
    growths = dagrow.propose(dag, [(x, y)], loss, [AddLayer(2, nn.Tanh(), folds=1)])
    assert ("right -> first" in {growth.where for growth in growths}) is not inplace
    for growth in growths:
        slope = (growth.loss(1e-6) - growth.loss(-1e-6)) / 2e-6
        assert -slope == pytest.approx(growth.gain, rel=1e-4, abs=1e-9)
    if not inplace:
        growth = next(growth for growth in growths if growth.where == "right -> first")
        predicted = growth.loss(0.3)
        growth.apply(0.3)
        assert float(loss(model(x), y)) == pytest.approx(predicted, rel=1e-9)


class Trunk(nn.Module):
    """Frozen or without gradients below, in another precision above."""

    def __init__(self, graded: bool, head: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(3, 4).double(), nn.Linear(4, 4).double(), nn.Linear(4, 2).to(head)
        self.graded = graded

    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.graded and torch.is_grad_enabled()):
            h = torch.tanh(self.two(torch.tanh(self.one(x))))
        return self.three(h.to(self.three.weight.dtype)).to(x.dtype)


def test_no_path_starts_where_gradients_are_switched_off() -> None:
    x, y = torch.randn(60, 3, dtype=DOUBLE), torch.randn(60, 2, dtype=DOUBLE)
    dag = dagrow.trace(Trunk(False), x[:2])
    assert {link.source.name for link in path_sites(dag, known=True)} <= {dag.edge("three").layer.inputs.name}
    (growth,) = dagrow.propose(dag, [(x, y)], loss, [AddLayer(2, nn.Tanh(), targets=("three",))])
    growth.apply(0.1)
    loss(dag.model(x), y).backward()
    assert all(parameter.grad is not None for parameter in dag.model.hidden1.parameters())


def test_no_path_leads_to_another_precision() -> None:
    x, y = torch.randn(60, 3, dtype=DOUBLE), torch.randn(60, 2, dtype=DOUBLE)
    dag = dagrow.trace(Trunk(True, torch.float32), x[:2])
    assert {link.target.name for link in path_sites(dag)} == {"two"}
    assert dagrow.propose(dag, [(x, y)], loss, [AddLayer(2, nn.Tanh())])


@pytest.mark.parametrize("exact", [1, 100])
def test_residual_blocks_in_front_of_frozen_layers(exact: int) -> None:
    """Their goals do not depend on what else is measured."""
    torch.manual_seed(0)
    model = Net().double()
    for parameter in (*model.one.parameters(), *model.two.parameters()):
        parameter.requires_grad_(False)
    x, y = torch.randn(60, 5, dtype=DOUBLE), torch.randn(60, 2, dtype=DOUBLE)
    dag = dagrow.trace(model, x[:2])
    growths = dagrow.propose(dag, [(x, y)], loss, [AddLayer(2, nn.Tanh(), folds=1, exact=exact)])
    if exact > 1:
        assert {"one -> itself", "two -> itself"} <= {growth.where for growth in growths}
    assert all(growth.gain > 0 for growth in growths)
    assert not model.one.weight.requires_grad


def test_new_parameters_beside_frozen_ones_are_optimized(net) -> None:
    model, batches = net
    model.two.requires_grad_(False)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    dag = dagrow.trace(model, batches[0][0][:2])
    (growth,) = dagrow.propose(dag, batches, loss, [AddConnection(targets=("two",))])
    growth.apply(0.1, optimizer=optimizer)
    assert any(p is model.x_to_two.weight for p in optimizer.param_groups[0]["params"])


@pytest.mark.parametrize("handed", [True, False])
def test_of_two_optimizers_one_takes_new_parameters(net, handed: bool) -> None:
    model, batches = net
    head = torch.optim.SGD(model.three.parameters(), lr=0.1)
    trunk = torch.optim.SGD([*model.one.parameters(), *model.two.parameters()], lr=0.1)
    dag = dagrow.trace(model, batches[0][0][:2])
    growths = dagrow.propose(dag, batches, loss, [AddConnection(targets=("three",))])
    growths[0].apply(0.1, optimizer=trunk if handed else None)
    loss(model(batches[0][0]), batches[0][1]).backward()
    for optimizer in (trunk, head):
        optimizer.step()
    counts = [len(optimizer.param_groups[0]["params"]) for optimizer in (trunk, head)]
    assert counts == ([5, 2] if handed else [4, 3])


def test_activations_of_one_layer_are_told_apart() -> None:
    class Waves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            return self.last(torch.tanh(self.second(torch.sin(h)) + self.second(torch.cos(h))))

    class Split(Waves):
        def __init__(self) -> None:
            super().__init__()
            self.third = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            return self.last(torch.tanh(self.second(torch.sin(h)) + self.third(torch.cos(h))))

    dag = dagrow.trace(Split(), torch.randn(2, 3))
    places = [link.place for link in path_sites(dag, known=True)]
    assert len(places) == len(set(places))
    assert {"first -> last", "first[1] -> last"} < set(places)


@pytest.mark.parametrize("make", [lambda net: nn.DataParallel(net), lambda net: net.one])
def test_models_that_no_path_can_be_added_to(net, make) -> None:
    model, batches = net
    dag = dagrow.trace(make(model), batches[0][0][:2])
    with pytest.raises(GrowthError, match=r"trace its .module|put it into an nn.Sequential"):
        dagrow.propose(dag, batches, loss, [AddConnection()])


def test_only_copies_from_before_the_growth_follow(net) -> None:
    model, batches = net
    dag, before = dagrow.trace(model, batches[0][0][:2]), copy.deepcopy(model)
    receipt = dagrow.propose(dag, batches, loss, [AddConnection()])[0].apply(0.3)
    receipt.carry(before)
    for other in (before, model, nn.Sequential(nn.Linear(5, 2)).double()):
        children = list(other._modules)
        with pytest.raises(GrowthError, match=r"carry each copy along once|is no copy of the grown model"):
            receipt.carry(other)
        assert list(other._modules) == children


@pytest.mark.parametrize(
    "damage",
    [
        lambda branch: branch.pop(),
        lambda branch: branch[3].update({"": {"type": "Nothing"}}),
        lambda branch: branch[3].update({"": {"type": "Linear", "in_features": 2, "colour": 1}}),
        lambda branch: branch.__setitem__(3, {}),
        lambda branch: branch.__setitem__(0, "forward"),
    ],
)
def test_damaged_files(net, tmp_path, damage) -> None:
    model, batches = net
    fresh, x = copy.deepcopy(model), batches[0][0]
    dag = dagrow.trace(model, x[:2])
    dagrow.propose(dag, batches, loss, [AddConnection()])[0].apply(0.3)
    dagrow.save(dag, tmp_path / "grown.pt")
    content = torch.load(tmp_path / "grown.pt", weights_only=True)
    damage(content["branches"][0])
    torch.save(content, tmp_path / "grown.pt")
    with pytest.raises(StoreError):
        dagrow.load(fresh, tmp_path / "grown.pt", x[:2])
    assert len(fresh._modules) == 3


class Hooked(Net):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return super().forward(x)
        return super().forward(x).clamp(-9, 9)


def test_a_forward_that_cannot_be_written_refuses(net) -> None:
    _, batches = net
    dag = dagrow.trace(Hooked().double(), batches[0][0][:2])
    with pytest.raises(GrowthError, match="no new path can be added to this Hooked"):
        dagrow.propose(dag, batches, loss, [AddConnection()])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AddConnection(rank=0), "rank=0"),
        (lambda: AddConnection(kernel=1.5), "kernel=1.5"),
        (lambda: AddConnection(targets="two"), "give a tuple of names"),
        (lambda: AddLayer(0), "k=0"),
        (lambda: AddLayer(2, nn.Linear(2, 2)), "entry from itself alone"),
        (lambda: AddLayer(2, "relu"), "entry from itself alone"),
        (lambda: AddLayer(2, nn.RReLU()), "draws random numbers"),
        (lambda: AddLayer(2, nn.Dropout()), "draws random numbers"),
        (lambda: AddLayer(2, seed=0.5), "seed=0.5"),
    ],
)
def test_settings_that_make_no_sense(make, message: str) -> None:
    with pytest.raises(GrowthError, match=message):
        make()


def test_targets_that_no_path_can_lead_to(net) -> None:
    model, batches = net
    dag = dagrow.trace(model, batches[0][0][:2])
    with pytest.raises(GrowthError, match="no new path can lead to one"):
        dagrow.propose(dag, batches, loss, [AddConnection(targets=("one",))])
    with pytest.raises(GrowthError, match="there is no edge 'four'"):
        dagrow.propose(dag, batches, loss, [AddConnection(targets=("four",))])


def test_where_everything_is_joined_nothing_is_proposed() -> None:
    x, y = torch.randn(40, 3), torch.randn(40, 2)
    dag = dagrow.trace(nn.Sequential(nn.Linear(3, 2)), x[:2])
    assert dagrow.propose(dag, [(x, y)], loss, [AddConnection()]) == []


def test_costs_are_those_of_the_grown_model(net) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    for model, batches in (net, images()):
        x = batches[0][0]
        dag = dagrow.trace(model, x[:2])
        for operator in (AddConnection(), AddLayer(2), AddConnection(rank=1)):
            growth = dagrow.propose(dag, batches, loss, [operator])[0]
            with FlopCounterMode(display=False) as before:
                model(x)
            count = dag.parameter_count()
            receipt = growth.apply(0.1)
            with FlopCounterMode(display=False) as after:
                model(x)
            assert growth.cost.parameters == dag.parameter_count() - count
            assert growth.cost.flops * len(x) == after.get_total_flops() - before.get_total_flops()
            receipt.undo()
