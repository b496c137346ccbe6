"""Arguments that are no tensors: what a forward that is written anew holds for, and what it follows."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import dagrow

torch.manual_seed(0)
X, Y = torch.randn(20, 4), torch.randn(20, 2)


class Net(nn.Module):
    """Has a size written into it, and the arguments of a language model."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(
        self, x: Tensor, labels: Tensor | None = None, use_cache: bool | None = None, items: Any = None, **more: Any
    ) -> dict[str, Tensor]:
        h = self.a(x).view(-1, 8).relu()
        outputs = {"y": self.b(h)}
        if labels is not None:
            total = functional.mse_loss(outputs["y"], labels, reduction="sum")
            outputs["loss"] = total / (x.shape[0] if items is None else items)
        if use_cache:
            outputs["cache"] = 2 * outputs["y"]
        return outputs


CALLS: dict[str, dict[str, Any]] = {
    "plain": {"x": X},
    "labels": {"x": X, "labels": Y},
    "counted": {"x": X, "labels": Y, "items": torch.tensor(8)},
    "cached": {"x": X, "use_cache": True},
}


def loss(output: dict[str, Tensor], target: Tensor) -> Tensor:
    return functional.mse_loss(output["y"], target)


def growth_of(model: nn.Module, example: Any, also: Any = ()) -> dagrow.Growth:
    dag = dagrow.trace(model, example, also=also)
    return dagrow.propose(dag, [(example, Y)], loss, [dagrow.AddNeurons(k=2, init="zero")])[0]


def test_each_example_gets_a_forward_for_its_form() -> None:
    model, (first, *others) = Net(), CALLS.values()
    before = {name: model(**call) for name, call in CALLS.items()}
    growth = growth_of(model, first, others)
    assert growth.notes[-1] == (
        "the forward is written anew, for calls with labels = None or a tensor, use_cache = None or True, items = None "
        "or a tensor, as in the examples"
    )
    growth.apply(0.0)
    assert type(model) is not Net
    for name, call in CALLS.items():
        torch.testing.assert_close(model(**call), before[name])
    half = {"x": X[:10], "labels": Y[:10], "items": torch.tensor(3)}
    expected = functional.mse_loss(model(X[:10])["y"], Y[:10], reduction="sum") / 3
    torch.testing.assert_close(model(**half)["loss"], expected)
    with pytest.raises(dagrow.TraceError, match="traced with use_cache = None"):
        model(X, use_cache=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [("labels", "labels = None"), ("cached", "use_cache = None")],
)
def test_a_call_that_no_example_shows_is_refused_by_name(call: str, message: str) -> None:
    model = Net()
    growth = growth_of(model, CALLS["plain"])
    assert message in growth.notes[-1]
    growth.apply(0.0)
    with pytest.raises(dagrow.TraceError, match=rf"traced with {message}.* also="):
        model(**CALLS[call])


def test_a_tensor_that_is_missing_is_refused_by_name() -> None:
    model = Net()
    growth_of(model, CALLS["labels"]).apply(0.0)
    with pytest.raises(dagrow.TraceError, match=r"traced with labels = a tensor, .* None was given"):
        model(X)


@pytest.mark.parametrize("call", [{"items": 8}, {"more": 0.5}])
def test_a_number_that_would_be_fixed_is_refused_before(call: dict[str, Any]) -> None:
    example = {"x": X, "labels": Y, **call}
    axis = dagrow.trace(Net(), example).axis("a")
    assert f"= {next(iter(call.values()))} would be fixed in one that is written anew" in str(axis.reason)
    assert dagrow.trace(Net(), example, also=[{"x": X, "labels": Y, **{k: 3 for k in call}}]).axis("a").growable


def test_batches_that_are_called_otherwise_are_refused_before_the_growth() -> None:
    model = Net()
    dag = dagrow.trace(model, CALLS["plain"])
    with pytest.raises(dagrow.DagrowError, match="labels = None"):
        dagrow.propose(dag, [(CALLS["labels"], Y)], loss, [dagrow.AddNeurons(k=2)])
    assert type(model) is Net
    assert model.a.out_features == 8
