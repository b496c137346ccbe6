"""New entries of state are what the optimizer itself would give a new parameter, or the growth is refused."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimized import BATCHES, X, grow, net, step, trained
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.optimizer import register_optimizer_step_post_hook

import dagrow
from dagrow import AddNeurons, OptimizerError
from dagrow.surgery._first_state import first_state, tensors_in

LR = 0.02


class Written(torch.optim.Optimizer):
    """Plain descent, with some state of its own beside it."""

    def __init__(self, params: Any, lr: float = LR, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    gradient = p.grad + group["weight_decay"] * p
                    self.update(p, gradient, self.state[p], group)
                    p.sub_(group["lr"] * gradient)

    def update(self, p: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        raise NotImplementedError


class ScheduleFree(Written):
    def update(self, p: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if "z" not in state:
            state["z"] = torch.clone(p)
        group["k"] = group.get("k", 0) + 1
        state["z"].sub_(group["lr"] * gradient)


class SlowWeights(Written):
    """As in Lookahead: they come with the third step, in memory that was empty."""

    def update(self, p: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        state["count"] = state.get("count", 0) + 1
        if state["count"] % 3 == 0:
            if "slow" not in state:
                state["slow"] = torch.empty_like(p)
                state["slow"].copy_(p)
            p.copy_(state["slow"].lerp_(p, 0.5))


class InMemory(Written):
    def update(self, p: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            state["accelerator"] = torch.empty_like(p)
            state["accelerator"].fill_(0.3)
            state.update(nested={"moments": [torch.zeros_like(p), None]}, number=torch.ones(1))
        state["nested"]["moments"][0].lerp_(gradient, 0.1)


class Master(Written):
    """Keeps a copy of its own, of another type, of every weight."""

    def update(self, p: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        state.setdefault("master", p.detach().double())
        state["master"].sub_(group["lr"] * gradient)


class Sam(torch.optim.Optimizer):
    """Two steps a step, with a closure, over an optimizer of its own."""

    def __init__(self, params: Any, base: Any) -> None:
        super().__init__(params, {"rho": 0.05})
        self.base = base(self.param_groups)
        self.param_groups = self.base.param_groups

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        assert closure is not None
        with torch.enable_grad():
            closure()
        for p in self.param_groups[0]["params"]:
            self.state[p]["old_p"] = p.detach().clone()
            p.add_(self.param_groups[0]["rho"] * p.grad)
        with torch.enable_grad():
            closure()
        for p in self.param_groups[0]["params"]:
            p.copy_(self.state[p]["old_p"])
        self.base.step()


class Early(Written):
    """Its constructor puts state down, and its step does not."""

    def __init__(self, params: Any, lr: float = LR, start: float = 0.5) -> None:
        super().__init__(params, lr)
        self.start = start
        for p in self.param_groups[0]["params"]:
            self.state[p]["size"] = torch.full_like(p, start)

    def update(self, p: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        state["size"].mul_(1 + gradient.abs())


#: optimizer, place in its state -> what new entries start with: a number, or "weight"
FIRST: dict[str, tuple[Callable[[Any], torch.optim.Optimizer], dict[str, Any]]] = {
    "Rprop": (lambda p: torch.optim.Rprop(p, LR), {"prev": 0.0, "step_size": LR}),
    "Adagrad": (lambda p: torch.optim.Adagrad(p, LR, initial_accumulator_value=0.3), {"sum": 0.3}),
    "ASGD": (lambda p: torch.optim.ASGD(p, LR, t0=2), {"ax": "weight"}),
    "Adamax": (lambda p: torch.optim.Adamax(p, LR), {"exp_avg": 0.0, "exp_inf": 0.0}),
    "decay": (lambda p: torch.optim.SGD(p, LR, momentum=0.9, weight_decay=0.1), {"momentum_buffer": 0.0}),
    "RMSprop": (lambda p: torch.optim.RMSprop(p, LR, centered=True), {"square_avg": 0.0, "grad_avg": 0.0}),
    "ScheduleFree": (lambda p: ScheduleFree(p, weight_decay=0.1), {"z": "weight"}),
    "SlowWeights": (SlowWeights, {"slow": "weight"}),
    "InMemory": (InMemory, {"accelerator": 0.3, "nested.moments.0": 0.0}),
    "Master": (Master, {"master": "weight"}),
    "Sam": (lambda p: Sam(p, lambda groups: torch.optim.SGD(groups, LR, momentum=0.9)), {"old_p": "weight"}),
    "Early": (Early, {"size": 0.5}),
}


def random_growth(dag: dagrow.Dag, gamma: float = 0.5, **kwargs: Any) -> dagrow.Receipt:
    (growth,) = dagrow.propose(dag, BATCHES, functional.mse_loss, [AddNeurons(k=2, init="random")])
    return growth.apply(gamma, **kwargs)


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = functional.mse_loss(model(X), BATCHES[0][1])
        loss.backward()
        return loss

    closure()
    optimizer.step(closure)  # type: ignore[arg-type]


def named(state: dict[str, Any]) -> dict[str, Tensor]:
    return {
        ".".join(str(getattr(key, "key", getattr(key, "idx", ""))) for key in path): t
        for path, t in tensors_in(state).items()
    }


@pytest.mark.parametrize("hidden", [1, 3])
@pytest.mark.parametrize("name", FIRST)
def test_new_entries_start_as_those_of_a_new_parameter(name: str, hidden: int) -> None:
    make, first = FIRST[name]
    model = net(hidden)
    optimizer = make(model.parameters())
    for _ in range(3):
        train(model, optimizer)
    before = {p: {k: v.clone() for k, v in named(optimizer.state[p]).items()} for p in model.parameters()}
    receipt = random_growth(dagrow.trace(model, X), optimizer=optimizer)
    for path, start in first.items():
        for parameter, old in ((model[0].weight, slice(0, hidden)), (model[0].bias, slice(0, hidden))):
            state = named(optimizer.state[parameter])[path]
            assert torch.equal(state[old], before[parameter][path])
            expected = parameter.detach() if start == "weight" else torch.full_like(parameter, start).detach()
            assert torch.equal(state[hidden:], expected.to(state.dtype)[hidden:]), path
        assert named(optimizer.state[model[2].weight])[path].shape == (2, hidden + 2)
    train(model, optimizer)
    receipt.undo()
    for name in receipt.parameters:
        p = model.get_parameter(name)
        assert all(torch.equal(v, named(optimizer.state[p])[k]) for k, v in before[p].items()), name
    train(model, optimizer)


class Rows(Written):
    def update(self, p: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        state["row"] = gradient.reshape(len(p), -1).square().mean(1)


class Half(Written):
    """Its state is neither a constant nor a copy."""

    def update(self, p: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        state["average"] = 0.5 * state.get("average", torch.zeros_like(p)) + 0.5 * p


class Own(Written):
    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.slow = [p.detach().clone() for p in self.param_groups[0]["params"]]

    def update(self, p: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        return


class Bytes(Written):
    def update(self, p: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        state["code"] = torch.zeros_like(p, dtype=torch.uint8)


class Projector:
    def __init__(self, p: Tensor) -> None:
        self.basis = torch.eye(len(p))


class Objects(Written):
    def update(self, p: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        state.setdefault("projector", Projector(p))


class Holder(Written):
    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.network = nn.Linear(2, 2)

    def update(self, p: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        state["average"] = torch.zeros_like(p)


class Curvature(Written):
    """Steps only on what has a graph."""

    def update(self, p: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not p.requires_grad:
            raise ValueError("no graph")
        state["hessian"] = torch.zeros_like(p)


@pytest.mark.parametrize("hidden", [1, 3])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Rows, "keeps 'row' of shape"),
        (Half, "keeps 'average'"),
        (Own, "keeps tensors in 'slow'"),
        (Bytes, "keeps 'code'"),
        (Objects, "keeps 'projector', an object"),
        (Holder, "it holds a module, as 'network'"),
        (Curvature, "its step on a new parameter fails: ValueError: no graph"),
    ],
)
def test_state_that_nothing_is_known_of_is_refused(make: Any, message: str, hidden: int) -> None:
    model, optimizer, dag = trained(make, hidden)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(OptimizerError, match=message):
        grow(dag, optimizer=optimizer)
    assert all(map(torch.equal, before, model.parameters()))
    grow(dag)
    with pytest.raises(OptimizerError, match=message):
        optimizer.step()


def test_a_trial_is_noticed_by_nobody() -> None:
    class Noisy(ScheduleFree):
        def update(self, p: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
            super().update(p, gradient, state, group)
            p.add_(torch.randn_like(p) * random.random())
            state["seen"].append(1) if "seen" in state else state.update(seen=[])

    model, optimizer, _ = trained(Noisy)
    optimizer.shared, optimizer.listed = {"calls": [3]}, list(model.parameters())
    torch.optim.lr_scheduler.StepLR(optimizer, 1)  # puts a step of its own on the optimizer
    weights, group = [p.detach().clone() for p in model.parameters()], {**optimizer.param_groups[0]}
    state, drawn, seen = len(optimizer.state), (torch.get_rng_state(), random.getstate()), list[object]()
    handle = register_optimizer_step_post_hook(lambda one, *_: seen.append(one))
    try:
        learnt = first_state(optimizer, model[0].weight, torch.ones(4, 4), [])
    finally:
        handle.remove()
    assert learnt.failure is None
    assert learnt.tensors.keys() == {path for path in learnt.tensors if path[0].key == "z"} != set()
    assert not seen
    assert torch.equal(torch.get_rng_state(), drawn[0])
    assert random.getstate() == drawn[1]
    assert {**optimizer.param_groups[0]} == group
    assert len(optimizer.state) == state
    assert all(map(torch.equal, weights, model.parameters()))
    step(model, optimizer)
