"""A change in the making: grown shapes, and the ray of parameters."""

import pytest
import torch
from perceptrons import mlp
from torch import Tensor

import dagrow
from dagrow.axes import IndexMap
from dagrow.errors import GrowthError
from dagrow.surgery import Draft
from dagrow.surgery._draft import pad

ROWS = IndexMap(0, 4, torch.tensor([0, 2]), torch.tensor([[1], [3]]))
COLUMNS = IndexMap(1, 5, torch.tensor([0, 1, 4]), torch.tensor([[2], [3]]))


def test_old_entries_land_where_they_are_told_and_new_ones_are_fresh() -> None:
    old, fresh = torch.rand(2, 3), torch.rand(4, 5)
    grown = pad(old, (ROWS, COLUMNS), fresh)
    assert torch.equal(grown[ROWS.old][:, COLUMNS.old], old)
    is_new = torch.ones(4, 5, dtype=torch.bool)
    is_new[ROWS.old[:, None], COLUMNS.old] = False
    assert torch.equal(grown[is_new], fresh[is_new])
    assert not pad(old, (ROWS, COLUMNS))[is_new].any()
    assert pad(old, ()) is old


def test_a_tensor_of_another_size_is_refused() -> None:
    with pytest.raises(GrowthError, match="changed its widths since"):
        pad(torch.rand(3, 3), (ROWS,))


def drafted() -> tuple[dagrow.Dag, Draft, Tensor, Tensor, Tensor]:
    """Two new units, and a move of the weights that read them."""
    dag = dagrow.trace(mlp(3, 4, 2), torch.randn(2, 3).double())
    axis, alpha, omega, delta = dag.axis("0"), torch.randn(2, 1, 4), torch.randn(2, 2, 1), torch.randn(2, 5)
    plan = dag.widening(axis, 2)
    draft = Draft(dag, [(axis, plan)])
    draft.fan_in(dag.edge("0"), plan.rows["0"], alpha)
    draft.fan_out(dag.edge("2"), plan.columns["2"], omega)
    for part in (delta - 1, torch.ones_like(delta)):  # moves add up
        draft.move(dag.edge("2"), part)
    return dag, draft, alpha[:, 0], omega[..., 0], delta


def test_a_change_is_a_ray_from_the_network_as_it_was() -> None:
    dag, draft, alpha, omega, delta = drafted()
    change, model = draft.change(), dag.model
    for gamma in (0.0, 0.5):
        tensors = {name: tensor.float() for name, tensor in change.tensors(model, gamma).items()}
        first, second, bias = (tensors[name] for name in ("0.weight", "2.weight", "2.bias"))
        torch.testing.assert_close(torch.cat([first, tensors["0.bias"][:, None]], 1)[4:], alpha)
        torch.testing.assert_close(second[:, 4:], gamma * omega)
        torch.testing.assert_close(second[:, :4] - model[2].weight.detach().float(), gamma * delta[:, :4])
        torch.testing.assert_close(bias - model[2].bias.detach().float(), gamma * delta[:, 4])
    assert change.attributes == {"0": {"in_features": 3, "out_features": 6}, "2": {"in_features": 6, "out_features": 2}}
    assert not change.written


def test_drafting_changes_no_model() -> None:
    dag, draft, *_ = drafted()
    before = {name: value.clone() for name, value in dag.model.state_dict().items()}
    start = draft.change().start(dag.model)
    for tensor in draft.change().at(start, 0.0).values():
        tensor.fill_(7.0)
    assert not any((tensor == 7.0).any() for tensor in start.values())
    assert all(torch.equal(value, before[name]) for name, value in dag.model.state_dict().items())
