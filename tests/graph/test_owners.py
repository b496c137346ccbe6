"""Others that hold the parameters of a model are found before it grows, and the way out is said."""

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

import dagrow
from dagrow import AddNeurons, GrowthError, TraceError

X = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
BATCHES = [(X, X[:, :2].sin())]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))


def growth(model: nn.Module) -> dagrow.Growth:
    return dagrow.propose(dagrow.trace(model, X), BATCHES, mse_loss, [AddNeurons(k=2)])[0]


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of one process."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


def sharded(model: nn.Module) -> nn.Module:
    mesh: Any = init_device_mesh("cpu", (1,))
    return fully_shard(model, mesh=mesh)


def spread(model: nn.Module) -> nn.Module:
    return parallelize_module(model, init_device_mesh("cpu", (1,)), {"0": ColwiseParallel()})


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("wrap", "named"),
    [
        (DistributedDataParallel, "a DistributedDataParallel is bound"),
        (lambda model: nn.Sequential(DistributedDataParallel(model)), "a DistributedDataParallel is bound"),
        (sharded, "a FSDPSequential is bound"),
        (spread, "0.weight is a DTensor"),
    ],
)
def test_a_wrapper_is_refused_with_the_recipe(wrap: Any, named: str) -> None:
    with pytest.raises(TraceError, match=f"{named}.* then wrap the grown model"):
        dagrow.trace(wrap(net()), X)


@pytest.mark.usefixtures("alone")
def test_a_wrapper_of_the_model_itself_is_found_while_it_lives() -> None:
    model = net()
    proposed, receipt = growth(model), growth(net()).apply(0.1)
    before = [p.detach().clone() for p in model.parameters()]
    wrapper = DistributedDataParallel(model)
    for change in (proposed.apply, lambda: dagrow.grow(proposed.dag, BATCHES, mse_loss)):
        with pytest.raises(GrowthError, match="a DistributedDataParallel holds parameters of this model"):
            change()
    assert all(map(torch.equal, before, model.parameters()))
    dagrow.bottlenecks(proposed.dag, BATCHES, mse_loss)
    receipt.undo()  # of another model
    del wrapper
    grown = proposed.apply(0.1)
    wrapper = DistributedDataParallel(model)
    mse_loss(wrapper(X), BATCHES[0][1]).backward()
    with pytest.raises(GrowthError, match="a DistributedDataParallel holds"):
        grown.undo()
    mse_loss(wrapper(X), BATCHES[0][1]).backward()
    del wrapper
    grown.undo()


def test_each_of_several_processes_is_told_to_grow_alike() -> None:
    proposed = growth(net())
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        with pytest.warns(UserWarning, match="torch.distributed runs 2 processes"):
            receipt = proposed.apply(0.1)
    finally:
        dist.destroy_process_group()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        receipt.undo()
        growth(nn.DataParallel(net())).apply(0.1)  # copies the model anew at every call


def test_a_flat_tensor_that_holds_all_parameters_is_named() -> None:
    model = net()
    flat = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    nn.utils.vector_to_parameters(flat, model.parameters())
    proposed = growth(model)
    with pytest.raises(GrowthError, match=r"0.weight is a part of a tensor of shape \(23,\)"):
        proposed.apply()
    assert torch.equal(nn.utils.parameters_to_vector(model.parameters()), flat)
    with torch.no_grad():
        flat.add_(1)  # is still the model's
    assert torch.equal(nn.utils.parameters_to_vector(model.parameters()), flat)
    del flat
    growth(model).apply(0.1)


def test_memory_that_processes_share_stays_shared_and_is_named() -> None:
    model = net().share_memory()
    with pytest.warns(UserWarning, match="memory that processes share"):
        receipt = growth(model).apply(0.1)
    assert all(p.is_shared() for p in model.parameters())
    with pytest.warns(UserWarning, match="memory that processes share"):
        receipt.undo()
    assert all(p.is_shared() for p in model.parameters())
