"""Examples of several calls: an axis has the layers of all of them, and growing it keeps the function of each."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import dagrow
from dagrow import GrowthError, TraceError

torch.manual_seed(0)
X, C = torch.randn(40, 4).double(), torch.randn(40, 5).double()


class Net(nn.Module):
    """Two layers, and parts of which the function of the case runs some."""

    def __init__(self, function: Any, **parts: Any) -> None:
        super().__init__()
        self.function, self.a, self.b = function, nn.Linear(4, 7), nn.Linear(7, 2)
        for name, part in parts.items():
            setattr(self, name, part)
        self.double()

    def forward(self, x: Any, option: Any = None) -> Any:
        return self.function(self, x, option)


def conditioned(m: Any, x: Tensor, cond: Tensor | None) -> Any:
    h = torch.tanh(m.a(x))
    return m.b(h if cond is None else h * m.scale(cond))


def early(m: Any, x: Tensor, exits: bool | None) -> Any:
    h = torch.tanh(m.a(x))
    return m.head(h) if exits else m.b(h)


def encoded(m: Any, x: Tensor, kind: str | None) -> Any:
    return m.b(torch.tanh(m.a(x) if kind is None else m.other(x[:, :3])))


def adapted(m: Any, x: Tensor, adapts: bool | None) -> Any:
    h = torch.tanh(m.a(x))
    return m.b(h) + m.up(m.down(h)) if adapts else m.b(h)


def normed(m: Any, x: Tensor, task: int | None) -> Any:
    return m.b(torch.tanh(m.norms[task or 0](m.a(x))))


def shifted(m: Any, x: Tensor, shifts: bool | None) -> Any:
    h = torch.tanh(m.a(x))
    return m.b(h + m.shift if shifts else h)


def several(m: Any, x: Tensor, both: bool | None) -> Any:
    h = torch.tanh(m.a(x))
    return {"y": m.b(h), "z": m.head(h)} if both else {"y": m.b(h)}


CASES = {
    "an optional input": (Net(conditioned, scale=nn.Linear(5, 7)), C, "scale"),
    "an early exit": (Net(early, head=nn.Linear(7, 3)), True, "head"),
    "another encoder": (Net(encoded, other=nn.Linear(3, 7)), "z", "other"),
    "an adapter": (Net(adapted, down=nn.Linear(7, 1), up=nn.Linear(1, 2)), True, "down"),
    "a norm of its own": (Net(normed, norms=nn.ModuleList([nn.BatchNorm1d(7), nn.BatchNorm1d(7)])), 1, "norms.1"),
    "a shift": (Net(shifted, shift=nn.Parameter(torch.randn(7))), True, ""),
    "more outputs": (Net(several, head=nn.Linear(7, 3)), True, "head"),
}


def _loss(output: Any, target: Tensor) -> Tensor:
    return functional.mse_loss(output["y"] if isinstance(output, dict) else output, target)


def _outputs(model: nn.Module, option: object) -> list[Tensor]:
    with torch.no_grad():
        outputs = [model(X), model(X, option)]
    return [value for output in outputs for value in (output.values() if isinstance(output, dict) else [output])]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("init", ["optimal", "copy", "zero", "gradmax"])
def test_a_growth_keeps_the_function_of_every_example(case: str, init: Any) -> None:
    model, option, part = CASES[case]
    model = copy.deepcopy(model).eval()
    dag = dagrow.trace(model, X[:2], also=[(X[:2], option if not isinstance(option, Tensor) else option[:2])])
    axis = next(axis for axis in dag.axes if "a" in [edge.name for edge in axis.producers])
    assert axis.growable, axis.reason
    (growth,) = dagrow.propose(dag, [(X, X[:, :2])], _loss, [dagrow.AddNeurons(k=2, init=init, axes=(axis.name,))])
    assert [part in note for note in growth.notes if "not measured" in note] == ([True] if part else [])
    before = _outputs(model, option)
    receipt = growth.apply(0.0)
    assert model.a.out_features == 9
    for old, new in zip(before, _outputs(model, option), strict=True):
        torch.testing.assert_close(old, new, rtol=0, atol=1e-10)
    receipt.undo()
    assert all(map(torch.equal, before, _outputs(model, option)))


def test_new_weights_of_layers_that_only_others_run_are_zero_and_learn() -> None:
    model = copy.deepcopy(CASES["an early exit"][0])
    dag = dagrow.trace(model, X[:2], also=[(X[:2], True)])
    dagrow.propose(dag, [(X, X[:, :2])], _loss, [dagrow.AddNeurons(k=2)])[0].apply(1.0)
    assert not model.head.weight[:, 7:].any()
    model(X, True).square().sum().backward()
    assert model.head.weight.grad[:, 7:].any()


def test_a_layer_that_only_another_example_runs_is_left_out_of_measurements() -> None:
    dag = dagrow.trace(copy.deepcopy(CASES["an early exit"][0]), X[:2], also=[(X[:2], True)])
    report = dagrow.bottlenecks(dag, [(X, X[:, :2])], _loss)
    assert "head is run by other examples than the first" in str(report)
    with pytest.raises(GrowthError, match="head is run by other examples than the first"):
        dagrow.propose(dag, [(X, X[:, :2])], _loss, [dagrow.MoveWeights(edges=("head",))])


def test_an_axis_that_only_another_example_has_grows_unmeasured() -> None:
    def function(m: Any, x: Tensor, other: bool | None) -> Any:
        return m.d(torch.tanh(m.c(x))) if other else m.b(torch.tanh(m.a(x)))

    model = Net(function, c=nn.Linear(4, 6), d=nn.Linear(6, 2))
    dag = dagrow.trace(model, X[:2], also=[(X[:2], True)])
    assert dag.axis("c").growable
    with pytest.raises(GrowthError, match=r"run by other examples than the first.* Give init='zero'"):
        dagrow.propose(dag, [(X, X[:, :2])], _loss, [dagrow.AddNeurons(k=1, axes=("c",))])
    names = [growth.where for growth in dagrow.propose(dag, [(X, X[:, :2])], _loss, [dagrow.AddNeurons(k=1)])]
    assert names == ["a"]
    before = _outputs(model, True)
    dagrow.propose(dag, [(X, X[:, :2])], _loss, [dagrow.AddNeurons(k=1, init="zero", axes=("c",))])[0].apply()
    assert model.c.out_features == 7
    torch.testing.assert_close(before, _outputs(model, True), rtol=0, atol=1e-10)


def test_what_one_example_freezes_is_frozen() -> None:
    def function(m: Any, x: Tensor, gives: bool | None) -> Any:
        h = torch.tanh(m.a(x))
        return h if gives else m.b(h)

    dag = dagrow.trace(Net(function), X[:2], also=[(X[:2], True)])
    assert dag.axis("a").reason == "is an output of the model"


def test_copies_and_files_keep_the_examples(tmp_path: Any) -> None:
    model, also = copy.deepcopy(CASES["an early exit"][0]), [(X[:2], True)]
    fresh = copy.deepcopy(model)
    dag = dagrow.trace(model, X[:2], also=also)
    dagrow.propose(dag, [(X, X[:, :2])], _loss, [dagrow.AddNeurons(k=2)])[0].apply(0.5)
    assert [edge.name for edge in copy.deepcopy(dag).edges] == [edge.name for edge in dag.edges]
    dagrow.save(dag, tmp_path / "net")
    loaded = dagrow.load(fresh, tmp_path / "net", X[:2], also=also)
    assert all(map(torch.equal, _outputs(loaded.model, True), _outputs(model, True)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"example_inputs": X, "also": X}, r"also= was given a Tensor; give a list of examples"),
        ({"also": [X]}, "also= was given without example_inputs"),
        ({"example_inputs": X, "also": [(X, None, None)]}, "cannot be called with these inputs"),
    ],
)
def test_examples_that_do_not_fit_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TraceError, match=message):
        dagrow.trace(CASES["an early exit"][0], **arguments)


def shared_path(m: Any, x: Tensor, other: bool | None) -> Any:
    h = torch.tanh(m.c(torch.tanh(m.a(x))))
    return m.d(h) if other else m.b(h)


@pytest.mark.parametrize("operator", [dagrow.AddConnection(targets=("c",)), dagrow.AddLayer(2, targets=("c",))])
def test_a_new_path_is_in_the_forward_of_every_example_that_runs_its_layers(operator: Any) -> None:
    model = Net(shared_path, c=nn.Linear(7, 7), d=nn.Linear(7, 2))
    dag = dagrow.trace(model, X[:2], also=[(X[:2], True)])
    before = _outputs(model, True)
    receipt = dagrow.propose(dag, [(X, X[:, :2])], _loss, [operator])[0].apply(0.0)
    torch.testing.assert_close(before, _outputs(model, True), rtol=0, atol=1e-10)
    receipt.undo()
    dagrow.propose(dag, [(X, X[:, :2])], _loss, [operator])[0].apply(0.7)
    changed = [not torch.allclose(a, b) for a, b in zip(before, _outputs(model, True), strict=True)]
    assert changed == [True, True]
    assert copy.deepcopy(dag).added_paths == dag.added_paths


def test_a_new_path_to_a_layer_that_another_example_does_not_run_is_not_in_its_forward() -> None:
    model = Net(early, head=nn.Linear(7, 3))
    dag = dagrow.trace(model, X[:2], also=[(X[:2], True)])
    before = _outputs(model, True)
    dagrow.propose(dag, [(X, X[:, :2])], _loss, [dagrow.AddConnection(targets=("b",))])[0].apply(0.7)
    after = _outputs(model, True)
    assert not torch.allclose(before[0], after[0])
    torch.testing.assert_close(before[1], after[1])
