"""One pass over batches, which leaves no trace."""

import weakref

import pytest
import torch
from measured import GOAL, READS, close, measured, model, samples
from torch import Tensor, nn
from zoo import mean_loss

import dagrow
from dagrow import GrowthError


def hooks(net: nn.Module) -> list[int]:
    tables = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [len(getattr(module, table)) for module in net.modules() for table in tables]


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_no_trace_is_left(error: type[BaseException] | None) -> None:
    net, (x, y) = model(), samples()
    net[2].register_forward_hook(lambda *_: None)
    net[1].eval()
    mean_loss(net(x), y).backward()
    calls, before = [0], hooks(net)
    gradients, modes = [p.grad.clone() for p in net.parameters()], [m.training for m in net.modules()]
    state, random = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()

    def loss(output, target):
        calls[0] += 1
        if error is not None and calls[0] == 5:
            raise error
        return mean_loss(output, target)

    try:
        measured(net, x, y, 9, 13, loss=loss)
    except (Exception, KeyboardInterrupt):
        assert error is not None
    else:
        assert error is None
    assert hooks(net) == before
    assert [m.training for m in net.modules()] == modes
    assert all(torch.equal(a, p.grad) for a, p in zip(gradients, net.parameters(), strict=True))
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in state.items())
    assert torch.equal(random, torch.get_rng_state())
    assert torch.is_grad_enabled()


class Box:
    """Held by a graph in place of a tensor that it saves."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def test_no_graph_outlives_its_batch() -> None:
    net, (x, y) = model(), samples()
    saved: list[weakref.ref] = []

    def boxed(tensor: torch.Tensor) -> Box:
        box = Box(tensor)
        saved.append(weakref.ref(box))
        return box

    def loss(output, target):
        if output.requires_grad:
            assert not any(ref() is not None for ref in saved), "the graph of an earlier batch is alive"
        with torch.autograd.graph.saved_tensors_hooks(boxed, lambda box: box.tensor):
            return mean_loss(output, target)

    m = measured(net, x, y, 5, 5, 12, loss=loss)
    assert len(saved) >= 3
    assert not any(ref() is not None for ref in saved)
    assert not any(total.requires_grad for total in m.sums.values())


@pytest.mark.parametrize("switch", [torch.no_grad, torch.inference_mode])
def test_gradients_need_not_be_enabled(switch) -> None:
    net, (x, y) = model(), samples()
    expected = measured(net, x, y)
    with switch():
        moments = measured(net, x, y)
    close(moments[READS, GOAL], expected[READS, GOAL])


def test_frozen_weights_have_goals_too() -> None:
    net, (x, y) = model(), samples()
    expected = measured(net, x, y)
    moments = measured(net.requires_grad_(False), x, y)
    close(moments[READS, GOAL], expected[READS, GOAL])


def test_a_model_that_takes_another_way_than_when_it_was_traced() -> None:
    class Fickle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.skip = nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 2), False

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.a(x))
            return self.c(h if self.skip else torch.tanh(self.b(h)))

    model, x = Fickle(), torch.randn(8, 4)
    dag = dagrow.trace(model, x)
    model.skip = True
    with pytest.raises(GrowthError, match="another way than when it was traced"):
        dagrow.bottlenecks(dag, [(x, x[:, :2])], nn.functional.mse_loss)
    assert not any(m._forward_hooks for m in model.modules())
