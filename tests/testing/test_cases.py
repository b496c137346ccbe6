"""Models with batches that laws are checked on."""

import copy

import pytest
import torch
from torch import nn

import dagrow
from dagrow.testing._cases import Case, built_in, case_of, rescaled, squared_error


def test_the_loss_is_half_the_squared_distance() -> None:
    output, target = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 3.0]])
    assert float(squared_error(output, target)) == (1 + 4 + 9) / 2 / 2


@pytest.mark.parametrize("model", [*built_in(), nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 1))])
def test_the_unit_of_an_input_makes_no_difference(model: nn.Module) -> None:
    if isinstance(model[0], nn.Conv2d):
        x, y = torch.randn(6, 2, 5, 5).double(), torch.randn(6, 2, 1, 1).double()
        case = Case(model.double(), [(x[:2], y[:2]), (x[2:], y[2:])])
    else:
        case = case_of(model)
    other = rescaled(case)
    assert other is not None
    assert float((other.batches[0][0] - case.batches[0][0]).abs().max()) > 10
    torch.testing.assert_close(other.outputs(other.model), case.outputs(case.model))


def test_where_more_than_layers_read_the_input_units_cannot_change() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.b(self.a(x).relu())

    x = torch.randn(8, 3).double()
    assert rescaled(Case(Residual().double(), [(x[:4], x[:4]), (x[4:], x[4:])])) is None


def test_built_in_cases_have_samples_that_models_take() -> None:
    for model in built_in():
        case = case_of(model)
        assert case.outputs(case.model).shape == torch.cat([y for _, y in case.batches]).shape
        assert len(case.batches) > 1
        assert {p.dtype for p in case.model.parameters()} == {torch.float64}


def test_outputs_of_a_growth_are_those_of_the_grown_model() -> None:
    case = case_of(built_in()[1])
    before = copy.deepcopy(case.model.state_dict())
    dag = case.copy()
    growth = case.propose(dagrow.AddNeurons(k=1, folds=1), dag)[0]
    previewed = case.grown(growth, 0.3)
    growth.apply(0.3)
    torch.testing.assert_close(previewed, case.outputs(dag.model))
    assert all(torch.equal(value, before[name]) for name, value in case.model.state_dict().items())
