"""What a stranger might do: a clear refusal or the right answer, never a wrong one, and nothing changed."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from perceptrons import Batches, data, mlp
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.nn.utils.parametrizations import weight_norm

import dagrow
from dagrow import AddConnection, AddLayer, AddNeurons, MoveWeights
from dagrow.layers import RiderRule
from dagrow.testing import snapshot
from dagrow.testing._snapshots_and_slopes import same


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def measured_slope(dag: dagrow.Dag, batches: Batches, operator: Any, step: float = 1e-5) -> tuple[float, float]:
    """Minus the slope of the loss along a growth, by finite differences, and what the growth says."""
    growth = dagrow.propose(dag, batches, mse_loss, [operator])[0]
    return (growth.loss(-step) - growth.loss(step)) / (2 * step), growth.gain


@pytest.mark.parametrize("operator", [AddNeurons(k=2, axes=("0",)), MoveWeights(edges=("2",))])
def test_goals_are_those_at_the_layer_and_not_behind_hooks_of_the_user(operator: Any) -> None:
    model = mlp(3, 2, 2)
    model[2].register_forward_hook(lambda _module, _args, output: output**3)
    dag = dagrow.trace(model, torch.randn(2, 3).double())
    slope, gain = measured_slope(dag, data(), operator)
    assert slope == pytest.approx(gain, rel=1e-6)


@pytest.mark.parametrize("operator", [AddNeurons(k=2), MoveWeights()])
def test_gradients_that_are_no_numbers_are_refused(operator: Any) -> None:
    dag = dagrow.trace(mlp(3, 2, 2), torch.randn(2, 3).double())

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return mse_loss(output, target) + 0 * torch.sqrt(0 * output.sum() ** 2)

    with pytest.raises(dagrow.DagrowError, match="not finite"):
        dagrow.propose(dag, data(), loss, [operator])
    with pytest.raises(dagrow.DagrowError, match="not finite"):
        dagrow.bottlenecks(dag, data(), loss)


def test_products_that_overflow_are_refused() -> None:
    batches = [(x * torch.tensor([1.0, 1.0, 1e25]), y) for x, y in data(dtype=torch.float32)]
    dag = dagrow.trace(mlp(3, 2, 2).float(), batches[0][0])
    with pytest.raises(dagrow.DagrowError, match="too large for their type when squared"):
        dagrow.bottlenecks(dag, batches, mse_loss)


def test_a_step_that_trains_is_refused_and_undone() -> None:
    model = mlp(3, 2, 2)
    dag, before = dagrow.trace(model, torch.randn(2, 3).double()), weights(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)

    def step(model: nn.Module, batch: Any) -> Tensor:
        with torch.enable_grad():
            loss = mse_loss(model(batch[0]), batch[1])
            loss.backward()
            optimizer.step()
        return loss

    with pytest.raises(dagrow.DagrowError, match="changes the model's weights"):
        dagrow.propose(dag, data(), step=step)
    assert torch.equal(weights(model), before)


def test_factored_state_of_a_single_weight_is_refused() -> None:
    model, batches = mlp(1, 1, 1), data(i=1, o=1)
    dag = dagrow.trace(model, batches[0][0])
    optimizer = torch.optim.Adafactor(model.parameters())
    mse_loss(model(batches[0][0]), batches[0][1]).backward()
    optimizer.step()
    growth = dagrow.propose(dag, batches, mse_loss, [AddNeurons(k=1)])[0]
    with pytest.raises(dagrow.DagrowError, match="Adafactor keeps 'row_var'"):
        growth.apply(optimizer=optimizer)
    assert dag.axis("0").width == 1


@pytest.mark.parametrize("which", ["no optimizer", "of another model"])
def test_apply_refuses_what_does_not_train_the_model(which: str) -> None:
    dag = dagrow.trace(mlp(3, 2, 2), torch.randn(2, 3).double())
    optimizer: Any = "adam" if which == "no optimizer" else torch.optim.Adam(mlp(3, 2, 2).parameters())
    growth = dagrow.propose(dag, data(), mse_loss, [AddNeurons(k=1)])[0]
    with pytest.raises(dagrow.DagrowError, match=r"give a torch\.optim\.Optimizer|give the one that trains this model"):
        growth.apply(optimizer=optimizer)


def test_a_computed_weight_freezes_its_axis() -> None:
    model = mlp(3, 4, 4, 2)
    weight_norm(model[2])
    dag = dagrow.trace(model, torch.randn(2, 3).double())
    assert [axis.growable for axis in dag.axes] == [False, False, False]
    assert "computed, not a parameter" in str(dag.axis("0").reason)


class Last(nn.Module):
    """Reads the last position of a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x))[:, -1])


def test_an_example_with_other_positions_than_the_batches_is_refused() -> None:
    dag = dagrow.trace(Last().double(), torch.randn(2, 1, 3).double())
    x = torch.randn(40, 5, 3).double()
    batches = list(zip(x.split(20), torch.sin(x[:, -1, :2]).split(20), strict=True))
    with pytest.raises(dagrow.DagrowError, match="Trace with a batch as they are"):
        dagrow.propose(dag, batches, mse_loss, [AddNeurons(k=1)])


class Mixed(nn.Module):
    """A layer in float32 behind one in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3).double(), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)).float()).double()


def test_layers_of_different_precision() -> None:
    dag = dagrow.trace(Mixed(), torch.randn(2, 3).double())
    slope, gain = measured_slope(dag, data(), AddNeurons(k=2), 1e-2)
    assert slope == pytest.approx(gain, rel=2e-2)


class Output(nn.Module):
    """What a recurrent layer gives, without its state."""

    def forward(self, given: tuple[Tensor, Tensor]) -> Tensor:
        return given[0]


def test_a_model_without_layers_that_can_be_measured() -> None:
    dag = dagrow.trace(nn.Sequential(nn.GRU(2, 2), Output()), torch.randn(2, 4, 2))
    batches = [(torch.randn(8, 4, 2), torch.randn(8, 4, 2))]
    for verb in (dagrow.bottlenecks, dagrow.tangent):
        with pytest.raises(dagrow.DagrowError, match="no layer can be measured"):
            verb(dag, batches, mse_loss)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda dag: pickle.loads(pickle.dumps(dag))])
def test_a_copy_of_a_dag_is_one_of_the_copied_model(copied: Callable[[dagrow.Dag], dagrow.Dag]) -> None:
    dag, batches = dagrow.trace(mlp(3, 2, 2), torch.randn(2, 3).double()), data()
    other = copied(dag)
    receipt = dagrow.propose(other, batches, mse_loss, [AddNeurons(k=2)])[0].apply()
    assert (receipt.neurons, other.axis("0").width, dag.axis("0").width) == (2, 4, 2)
    assert other.model is not dag.model


def test_a_file_beside_the_one_that_is_written_stays(tmp_path: Path) -> None:
    other = tmp_path / "net.pt.part"
    other.write_text("mine")
    dagrow.save(dagrow.trace(mlp(3, 2, 2), torch.randn(2, 3).double()), tmp_path / "net.pt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.pt", "net.pt.part"]
    assert other.read_text() == "mine"


@pytest.mark.parametrize("path", [None, 3, ""])
def test_paths_that_are_none(path: Any) -> None:
    dag = dagrow.trace(mlp(3, 2, 2), torch.randn(2, 3).double())
    for verb in (lambda: dagrow.save(dag, path), lambda: dagrow.load(mlp(3, 2, 2), path, torch.randn(2, 3).double())):
        with pytest.raises(dagrow.DagrowError, match="give the path of a file"):
            verb()


class Remembering(nn.Linear):
    def get_extra_state(self) -> dict[str, int]:
        return {"seen": 1}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Nothing to keep."""


def test_state_that_cannot_be_loaded_is_not_saved(tmp_path: Path) -> None:
    dag = dagrow.trace(nn.Sequential(Remembering(3, 2), nn.ReLU(), nn.Linear(2, 2)), torch.randn(2, 3))
    with pytest.raises(dagrow.DagrowError, match="_extra_state"):
        dagrow.save(dag, tmp_path / "net.pt")
    assert not list(tmp_path.iterdir())


class StraightPReLU(RiderRule):
    """``nn.PReLU`` with a slope per channel, where new channels start at slope 1: they pass unchanged."""

    types = (nn.PReLU,)

    def channel_dim(self, ndim: int) -> int:
        return 1

    def attributes(self, module: nn.Module, width: int) -> dict[str, int]:
        return {"num_parameters": width}

    def passing(self, module: nn.Module) -> dict[str, Tensor]:
        return {"weight": torch.ones(())}


def test_a_layer_rule_of_the_users_own(tmp_path: Path) -> None:
    def network() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 4), nn.PReLU(4), nn.Linear(4, 2)).double()

    model, example, rules = network(), torch.randn(2, 3).double(), [StraightPReLU()]
    dag = dagrow.trace(model, example, rules=rules)
    slope, gain = measured_slope(dag, data(), AddNeurons(k=2))
    assert slope == pytest.approx(gain, rel=1e-6)
    dagrow.grow(dag, data(), mse_loss, [AddNeurons(k=2)])
    assert model[1].weight.tolist() == [0.25] * 4 + [1.0] * 2
    dagrow.save(dag, tmp_path / "net.pt")
    other = network()
    dagrow.load(other, tmp_path / "net.pt", example, rules=rules)
    assert torch.equal(other(example), model(example))


def test_two_growths_in_a_row_tell_where_all_new_entries_are() -> None:
    model = mlp(3, 2, 2, 2)
    dag, before = dagrow.trace(model, torch.randn(2, 3).double()), copy.deepcopy(model)
    receipt = dagrow.grow(dag, data(), mse_loss, [AddNeurons(k=2, axes=(name,)) for name in ("0", "2", "0")])
    assert [part.where for part in receipt.parts] == ["0", "2", "0"]
    for name, old in before.named_parameters():
        grown = model.get_parameter(name)
        kept = [
            [i for i in range(size) if i not in receipt.parameters.get(name, {}).get(dim, [])]
            for dim, size in enumerate(grown.shape)
        ]
        assert [len(places) for places in kept] == list(old.shape), name
        if name.endswith("weight"):
            assert torch.equal(grown[torch.meshgrid(*map(torch.tensor, kept), indexing="ij")], old)


class Stepped(nn.Module):
    """As in Lightning: the step that trains is a method beside forward."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 2), nn.Linear(2, 2), nn.Linear(2, 2)

    def encode(self, x: Tensor) -> Tensor:
        return torch.tanh(self.b(torch.tanh(self.a(x))))

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.encode(x))

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return mse_loss(self.c(self.encode(batch[0])), batch[1])


class Around(nn.Module):
    """Hands everything on, as DistributedDataParallel does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


PATHS = [AddConnection(folds=1), AddConnection(exact=1), AddLayer(3, nn.Tanh())]


@pytest.mark.parametrize("sometimes", [False, True])
@pytest.mark.parametrize("operator", PATHS)
def test_a_path_that_the_step_would_not_run_is_refused(operator: Any, sometimes: bool) -> None:
    model, batches = Stepped().double(), data()
    dag = dagrow.trace(model, batches[0][0])

    def step(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        called = sometimes and batch is not batches[-1]
        return mse_loss(model(batch[0]), batch[1]) if called else model.training_step(batch)

    before = snapshot(dag)
    for verb in (dagrow.propose, dagrow.grow):
        with pytest.raises(dagrow.GrowthError, match=r"would not run.*Stepped.*model\(\.\.\.\)"):
            verb(dag, batches, step=step, operators=[AddNeurons(k=1, axes=("a",)), operator])
        same(before, snapshot(dag), "a refused path")
    assert dagrow.grow(dag, batches, step=step, operators=[AddNeurons(k=1)]).neurons == 1
    assert dagrow.bottlenecks(dag, batches, step=step)


@pytest.mark.parametrize("operator", PATHS)
def test_a_path_grows_however_the_step_calls_the_model(operator: Any) -> None:
    model, batches = Stepped().double(), data()
    outer = Around(model)
    expected, *others = (
        dagrow.propose(dagrow.trace(model, batches[0][0]), batches, step=step, operators=[operator])
        for step in (
            lambda model, batch: mse_loss(model(batch[0]), batch[1]),
            lambda model, batch: mse_loss(model.forward(batch[0]), batch[1]),
            lambda _, batch: mse_loss(outer(batch[0]), batch[1]),
        )
    )
    assert [[str(growth) for growth in growths] for growths in others] == [list(map(str, expected))] * 2
    assert "forward" not in vars(model)


def test_a_module_that_only_hands_on_is_no_place_for_paths_of_a_step_that_calls_the_inner_one() -> None:
    outer, batches = Around(Stepped().double()), data()
    dag = dagrow.trace(outer, batches[0][0])
    with pytest.raises(dagrow.GrowthError, match="trace the module that the step calls"):
        dagrow.propose(
            dag, batches, operators=[AddConnection()], step=lambda m, batch: mse_loss(m.module(batch[0]), batch[1])
        )


def test_a_forward_that_was_put_on_the_object_is_still_there_when_it_was_measured() -> None:
    model, batches = mlp(3, 2, 2), data()
    model.forward = own = nn.Sequential(*model).forward  # type: ignore[method-assign]
    dagrow.propose(dagrow.trace(model, batches[0][0]), batches, mse_loss, [AddNeurons(k=1)])
    assert vars(model)["forward"] is own
