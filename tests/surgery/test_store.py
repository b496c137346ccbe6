"""Saving grown networks and loading them into freshly built ones."""

import copy
import functools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import dagrow
from dagrow import AddNeurons, DagrowError, GrowthError, StoreError
from dagrow.testing import snapshot
from dagrow.testing._snapshots_and_slopes import same


class Literal(nn.Module):
    """A hidden width written into a view, a BatchNorm, and a flatten."""

    def __init__(self, hidden: int = 3) -> None:
        super().__init__()
        self.a, self.norm, self.b, self.c = (
            nn.Linear(4, 3),
            nn.BatchNorm1d(3),
            nn.Linear(3, hidden),
            nn.Linear(hidden, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.norm(self.a(x))).view(-1, 3).flatten(1)
        return self.c(torch.relu(self.b(h)))


class Cat(nn.Module):
    """Two axes that meet in one consumer, and a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(4, 3), nn.Linear(4, 2), nn.Linear(5, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        a = torch.tanh(self.a(x))
        h = torch.cat([a, torch.selu(self.b(x))], 1)
        return self.d(a + torch.tanh(self.c(h)))


def data(n: int = 40) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 4, generator=generator)
    return [(x, torch.stack([x.prod(1), x[:, 0] * x[:, 1]], 1))]


def sequential() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 1), nn.Tanh(), nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 2))


MODELS = {"literal": Literal, "cat": Cat, "sequential": sequential}


@functools.cache
def grown(name: str, growths: int = 3) -> Any:
    """Shared by the tests: none of them changes it but for its mode."""
    torch.manual_seed(0)
    model, batches = MODELS[name](), data()
    dag = dagrow.trace(model, batches[0][0])
    for turn in range(growths):
        axes = [axis.name for axis in dag.axes if axis.growable]
        dagrow.grow(
            dag, batches, functional.mse_loss, [AddNeurons(k=2, ridge=1e-3, folds=1, axes=(axes[turn % len(axes)],))]
        )
    model.train()(batches[0][0])  # moves running statistics
    return dag


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("training", [False, True])
def test_a_loaded_model_gives_the_same_outputs_bit_for_bit(name: str, training: bool, tmp_path: Path) -> None:
    dag, x = grown(name), data()[0][0]
    dagrow.save(dag, tmp_path / "net.pt")
    model = MODELS[name]()
    parameters = list(map(id, model.parameters()))
    loaded = dagrow.load(model, tmp_path / "net.pt", x)
    assert loaded.model is model
    assert list(map(id, model.parameters())) == parameters
    assert {a.name: a.width for a in loaded.axes} == {a.name: a.width for a in dag.axes}
    dag.model.train(training), model.train(training)
    assert torch.equal(copy.deepcopy(model)(x), copy.deepcopy(dag.model)(x))
    state = model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in dag.model.state_dict().items())


@pytest.mark.parametrize("name", MODELS)
def test_a_loaded_model_grows_and_is_saved_again(name: str, tmp_path: Path) -> None:
    dag, batches = grown(name, 1), data()
    dagrow.save(dag, tmp_path / "net.pt")
    loaded = dagrow.load(MODELS[name](), tmp_path / "net.pt", batches[0][0])
    dagrow.grow(loaded, batches, functional.mse_loss, [AddNeurons(k=1, ridge=1e-3, folds=1)])
    dagrow.save(loaded, tmp_path / "net.pt")
    assert loaded.parameter_count() > dag.parameter_count()
    again = dagrow.load(MODELS[name](), tmp_path / "net.pt", batches[0][0])
    x = batches[0][0]
    assert torch.equal(again.model.eval()(x), loaded.model.eval()(x))


def test_a_model_on_the_way_is_loaded_too(tmp_path: Path) -> None:
    dag, x = grown("cat", 3), data()[0][0]
    dagrow.save(dag, tmp_path / "net.pt")
    model = copy.deepcopy(grown("cat", 1).model)
    dagrow.load(model, tmp_path / "net.pt", x)
    assert torch.equal(model.eval()(x), dag.model.eval()(x))


def test_what_was_loaded_onto_a_grown_model_stays_in_place(tmp_path: Path) -> None:
    batches, model = data(), Cat()
    x = batches[0][0]
    dag = dagrow.trace(model, x)
    receipt = dagrow.propose(dag, batches, functional.mse_loss, [AddNeurons(k=2, axes=("b",), folds=1)])[0].apply()
    wider = dagrow.trace(copy.deepcopy(model), x)
    dagrow.propose(wider, batches, functional.mse_loss, [AddNeurons(k=1, axes=("b",), folds=1)])[0].apply()
    dagrow.save(wider, tmp_path / "net.pt")
    dagrow.load(model, tmp_path / "net.pt", x)
    before = snapshot(dag)
    with pytest.raises(GrowthError, match="reverse order"):
        receipt.undo()
    same(before, snapshot(dag), "a refused undo")


def test_the_file_holds_no_code(tmp_path: Path) -> None:
    dagrow.save(grown("literal"), tmp_path / "net.pt")
    content = torch.load(tmp_path / "net.pt", weights_only=True)
    assert set(content) == {"format", "version", "branches", "widths", "state"}
    assert not list(tmp_path.glob("*.part"))


def test_a_model_wider_than_the_file_was_saved_from_trains_on(tmp_path: Path) -> None:
    dag, (x, y) = grown("literal"), data()[0]
    dagrow.save(dag, tmp_path / "net.pt")
    model = dagrow.load(Literal(), tmp_path / "net.pt", x).model
    optimizer = torch.optim.Adam(model.parameters())
    before = functional.mse_loss(model(x), y)
    before.backward()
    optimizer.step()
    assert functional.mse_loss(model(x), y) < before


def spoiled(tmp_path: Path, **changes: Any) -> Path:
    content = torch.load(tmp_path / "net.pt", weights_only=True)
    torch.save({**content, **changes}, tmp_path / "net.pt")
    return tmp_path / "net.pt"


def wrong_files(tmp_path: Path) -> dict[str, tuple[nn.Module, str]]:
    return {
        "other": (Cat(), "another architecture"),
        "double": (Literal().double(), "float64"),
    }


@pytest.mark.parametrize("case", ["other", "double"])
def test_a_model_that_does_not_fit_is_left_as_it_was(case: str, tmp_path: Path) -> None:
    dagrow.save(grown("literal"), tmp_path / "net.pt")
    model, message = wrong_files(tmp_path)[case]
    before, ids = copy.deepcopy(model.state_dict()), list(map(id, model.parameters()))
    kind = type(model)
    with pytest.raises(StoreError, match=message):
        dagrow.load(model, tmp_path / "net.pt", data()[0][0].to(next(model.parameters()).dtype))
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert list(map(id, model.parameters())) == ids
    assert type(model) is kind


def state_without(tmp_path: Path, key: str) -> dict[str, Tensor]:
    state = torch.load(tmp_path / "net.pt", weights_only=True)["state"]
    return {name: value for name, value in state.items() if name != key}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 99}, "version 99"),
        ({"format": "other"}, "not written by dagrow.save"),
        ({"widths": {"a": 3}}, "another architecture"),
        ({"widths": {"a": 3, "b": 3, "c": 7}}, "cannot grow"),
        ({"widths": {"a": "three", "b": 3, "c": 2}}, "damaged"),
        ({"widths": None}, "damaged"),
        ({"state": 5}, "damaged"),
        ({"state": {}}, "another architecture"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    dagrow.save(grown("literal"), tmp_path / "net.pt")
    model = Literal()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(StoreError, match=message):
        dagrow.load(model, spoiled(tmp_path, **changes), data()[0][0])
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_weights_that_do_not_fit_undo_the_widening(tmp_path: Path) -> None:
    dagrow.save(grown("literal"), tmp_path / "net.pt")
    model = Literal()
    before, keys = copy.deepcopy(model.state_dict()), list(model.state_dict())
    with pytest.raises(StoreError, match=r"lacks \['c.weight'\]"):
        dagrow.load(model, spoiled(tmp_path, state=state_without(tmp_path, "c.weight")), data()[0][0])
    assert list(model.state_dict()) == keys
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert model.a.out_features == 3
    assert type(model) is Literal


@pytest.mark.parametrize("content", [b"", b"hello, this is no checkpoint", pickle.dumps({"a": 1})])
def test_a_file_that_cannot_be_read_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "net.pt").write_bytes(content)
    with pytest.raises(StoreError, match=r"net\.pt"):
        dagrow.load(Literal(), tmp_path / "net.pt", data()[0][0])


def test_other_checkpoints_are_refused(tmp_path: Path) -> None:
    torch.save(Literal().state_dict(), tmp_path / "net.pt")
    with pytest.raises(StoreError, match="load_state_dict"):
        dagrow.load(Literal(), tmp_path / "net.pt", data()[0][0])
    torch.save(Literal(), tmp_path / "net.pt")
    with pytest.raises(StoreError, match="cannot be read"):
        dagrow.load(Literal(), tmp_path / "net.pt", data()[0][0])


def test_paths_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot be read"):
        dagrow.load(Literal(), tmp_path / "none.pt", data()[0][0])
    with pytest.raises(StoreError, match="cannot be written"):
        dagrow.save(grown("cat", 0), tmp_path / "none" / "net.pt")
    with pytest.raises(DagrowError, match="dag"):
        dagrow.save(Literal(), tmp_path / "net.pt")  # type: ignore[arg-type]


def test_a_save_that_fails_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "net.pt"
    dagrow.save(grown("cat", 1), path)
    content = path.read_bytes()

    def fails(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(StoreError, match="disk full"):
        dagrow.save(grown("cat", 2), path)
    assert path.read_bytes() == content
