"""What is read off a model: ways between activations, and the model as it was."""

import copy

import torch
from torch import nn
from zoo import Stream

import dagrow


def test_layers_lead_from_what_they_read_to_all_that_their_output_reaches() -> None:
    dag = dagrow.trace(Stream(), torch.rand(2, 3))
    drawing = dag.network()
    read = {edge.name: edge.layer.inputs.name for edge in dag.edges}
    ways: dict[str, set[str]] = {}
    for source, target, layer in drawing.edges(keys=True):
        assert source == read[layer]
        ways.setdefault(layer, set()).add(target)
    readers = {name: read[name] for name in ("ups.0", "ups.1", "head")}
    assert ways["embed"] == set(readers.values())  # a residual stream
    assert ways["downs.0"] == {readers["ups.1"], readers["head"]}
    assert ways["downs.1"] == {readers["head"]}
    assert ways["ups.0"] == {read["downs.0"]}
    assert ways["head"] == {"output"}


def test_looking_at_computed_weights_changes_nothing() -> None:
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4)), nn.Linear(4, 2)).train()
    before = copy.deepcopy(model.state_dict())
    view = dagrow.trace(model, torch.rand(2, 3)).view
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert view.widths == {"0": (3, 4), "1": (4, 2)}


def test_a_growth_gives_another_view_and_undo_the_old_one_back() -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.rand(8, 3)
    dag = dagrow.trace(model, x)
    view, operators = dag.view, [dagrow.AddNeurons(k=2, init="zero")]
    receipt = dagrow.propose(dag, [(x, torch.rand(8, 2))], nn.functional.mse_loss, operators)[0].apply(0.0)
    assert (dag.view.widths, len(dag.view.growths)) == ({"0": (3, 6), "2": (6, 2)}, 1)
    assert (view.widths, len(view.growths)) == ({"0": (3, 4), "2": (4, 2)}, 0)
    receipt.undo()
    assert dag.view is view
