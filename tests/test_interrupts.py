"""An interrupt at any call inside a verb leaves everything as it was found, and the next call works."""

import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import dagrow
from dagrow import AddNeurons, MoveWeights


class Net(nn.Module):
    """A literal size, a BatchNorm, a dropout and two axes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b, self.c = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.norm(self.a(x))).view(-1, 4)
        return self.c(torch.relu(self.b(functional.dropout(h, 0.1, training=self.training))))


class Loader:
    """A loader that draws from every global random generator."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            random.random(), np.random.rand(), torch.rand(1)
            yield batch


def loss(output: Tensor, target: Tensor) -> Tensor:
    return functional.mse_loss(output, target)


class Setting:
    """A model in the middle of its training."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = Net().double()
        x, y = torch.randn(12, 3).double(), torch.randn(12, 2).double()
        self.loader = Loader([(x[:7], y[:7]), (x[7:], y[7:])])
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01)
        self.dag = dagrow.trace(self.model, x)
        self.model.b.bias.requires_grad_(False)
        self.fired: list[int] = []
        self.model.a.register_forward_hook(lambda *_: self.fired.append(1))
        for _ in range(2):
            self.optimizer.zero_grad()
            loss(self.model(x), y).backward()
            self.optimizer.step()
        self.model.norm.eval()

    def state(self) -> dict[str, Any]:
        """Everything that a verb could leave changed."""
        model, found = self.model, {}
        for name, p in [*model.named_parameters(), *model.named_buffers()]:
            found[name] = (id(p), p.detach().clone(), p.requires_grad, None if p.grad is None else p.grad.clone())
        for name, module in model.named_modules():
            plain = {k: v for k, v in vars(module).items() if isinstance(v, (int, float, str, bool))}
            hooks = {k: list(v) for k, v in vars(module).items() if "hooks" in k and v is not None}
            found[f"{name}:module"] = (type(module), plain, hooks, list(module._parameters), list(module._buffers))
        for index, state in enumerate(self.optimizer.state[p] for p in model.parameters() if p in self.optimizer.state):
            found[f"optimizer {index}"] = {key: value.clone() for key, value in state.items()}
        numpy = np.random.get_state()
        found["random"] = (torch.get_rng_state(), random.getstate(), numpy[1], numpy[2], torch.is_grad_enabled())
        found["dag"] = (str(self.dag), id(self.dag.program), [id(u) for u in self.dag.applied])
        return found


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return bool((a == b).all())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    return [key for key in {**a, **b} if key not in a or key not in b or not same(a[key], b[key])]


class Interrupt(BaseException):
    """Like KeyboardInterrupt: not an Exception."""


class UserError(Exception):
    """Like a user's own bug."""


class Injector:
    """Raises at the i-th call of a Python function of dagrow or of this file (the model, the loss, the loader)."""

    def __init__(self, at: int, kind: type[BaseException]) -> None:
        self.at, self.kind, self.calls, self.where = at, kind, 0, ""

    def __call__(self, frame: Any, event: str, arg: Any) -> None:
        if event != "call":
            return
        name = frame.f_globals.get("__name__", "")
        if not (name == "dagrow" or name.startswith("dagrow.") or name == __name__):
            return
        self.calls += 1
        if self.calls == self.at:
            self.where = f"{name}.{frame.f_code.co_qualname}"
            raise self.kind(self.where)

    def run_raw(self, function: Callable[[], Any]) -> Any:
        """Calls the function; what it raises passes."""
        previous = sys.getprofile()
        sys.setprofile(self)
        try:
            return function()
        finally:
            sys.setprofile(previous)

    def run(self, function: Callable[[], Any]) -> bool:
        """Whether the call was reached. Python ignores what is raised while a generator closes: then undo by hand."""
        previous = sys.getprofile()
        sys.setprofile(self)
        try:
            result = function()
            sys.setprofile(previous)
            if self.where and isinstance(result, dagrow.Receipt):
                result.undo()
        except BaseException as error:
            sys.setprofile(previous)
            if not (isinstance(error, self.kind) or isinstance(error.__cause__, self.kind)):
                raise
        finally:
            sys.setprofile(previous)
        return bool(self.where)


OPERATORS = [MoveWeights(), AddNeurons(k=1, axes=("a",), ridge=0.0, folds=2)]


def grow(setting: Setting, operators: Any = None) -> Any:
    return dagrow.grow(
        setting.dag, setting.loader, loss, OPERATORS if operators is None else operators, optimizer=setting.optimizer
    )


class Sites:
    """Finds the first and the last call from each line to each function."""

    def __init__(self) -> None:
        self.calls, self.first, self.last = 0, {}, {}  # type: ignore[var-annotated]

    def __call__(self, frame: Any, event: str, arg: Any) -> None:
        name = frame.f_globals.get("__name__", "")
        if event == "call" and (name == "dagrow" or name.startswith("dagrow.") or name == __name__):
            self.calls += 1
            key = (frame.f_code, frame.f_back.f_code, frame.f_back.f_lineno)
            self.first.setdefault(key, self.calls)
            self.last[key] = self.calls

    def run(self, function: Callable[[], Any]) -> list[int]:
        sys.setprofile(self)
        try:
            function()
        finally:
            sys.setprofile(None)
        return sorted({*self.first.values(), *self.last.values()})


def chosen(sites: list[int], count: int) -> list[int]:
    """Some of them, other ones than those that a regular pattern would hit; all with DAGROW_EVERY_CALL=1."""
    if os.environ.get("DAGROW_EVERY_CALL"):
        return sites
    return sorted(random.Random(0).sample(sites, min(count, len(sites))))


def interrupted_everywhere(make: Callable[[Setting], Callable[[], Any]], kind: type[BaseException], count: int) -> None:
    make(Setting())()  # what is cached by then is cached in every run, so that calls are counted alike
    setting, missed = Setting(), 0
    setting.state()  # which a dag remembers parts of
    sites = chosen(Sites().run(make(setting)), count)
    setting = Setting()
    verb = make(setting)
    before = setting.state()
    for at in sites:
        injector = Injector(at, kind)
        injector.run(verb)
        if not injector.where:  # this run made fewer calls, and ended
            setting, missed = Setting(), missed + 1
            verb, before = make(setting), setting.state()
            continue
        changed = differences(before, setting.state())
        assert not changed, f"stopped at call {at}, {injector.where}: {changed}"
    assert missed <= len(sites) // 10
    verb()


def apply(setting: Setting) -> Callable[[], Any]:
    growth = dagrow.propose(setting.dag, setting.loader, loss, OPERATORS[1:])[0]
    return lambda: growth.apply(0.5, optimizer=setting.optimizer)


pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def test_an_interrupted_grow_leaves_everything_as_it_was() -> None:
    interrupted_everywhere(lambda setting: lambda: grow(setting), Interrupt, 40)


def test_a_failing_grow_leaves_everything_as_it_was() -> None:
    interrupted_everywhere(lambda setting: lambda: grow(setting), UserError, 15)


def test_an_interrupted_apply_leaves_everything_as_it_was() -> None:
    interrupted_everywhere(apply, Interrupt, 40)


def test_an_interrupted_undo_is_done_or_not_done() -> None:
    setting = Setting()
    before, verb = setting.state(), apply(setting)
    sites = Sites().run(verb().undo)
    receipt = verb()
    grown = setting.state()
    for at in chosen(sites, 60):
        injector = Injector(at, Interrupt)
        injector.run(receipt.undo)
        now = setting.state()
        if differences(grown, now):
            changed = differences(before, now)
            assert not changed, f"stopped at call {at}, {injector.where}: {changed}"
            receipt = verb()
            grown = setting.state()
    receipt.undo()
    assert not differences(before, setting.state())


def test_interrupted_measurements_leave_everything_as_it_was() -> None:
    interrupted_everywhere(lambda s: lambda: dagrow.bottlenecks(s.dag, s.loader, loss), Interrupt, 15)
    interrupted_everywhere(lambda s: lambda: dagrow.propose(s.dag, s.loader, loss, OPERATORS), Interrupt, 15)


def test_an_interrupted_load_leaves_everything_as_it_was(tmp_path: Path) -> None:
    setting = Setting()
    grow(setting)
    dagrow.save(setting.dag, tmp_path / "net.pt")
    example = torch.randn(3, 3).double()

    loaded: list[dagrow.Dag] = []

    def load(s: Setting) -> Callable[[], Any]:
        return lambda: loaded.append(dagrow.load(s.model, tmp_path / "net.pt", example))

    sites = Sites().run(load(Setting()))
    for at in chosen(sites, 25):
        fresh = Setting()
        before = fresh.state()
        loaded.clear()
        Injector(at, Interrupt).run(load(fresh))
        if not loaded:
            changed = differences(before, fresh.state())
            assert not changed, f"stopped at call {at}: {changed}"


class Second(AddNeurons):
    """Fails when its turn has come."""

    def candidates(self, dag: Any) -> Any:
        assert dag.applied, "the first operator should have been applied"
        raise UserError("second")


def test_a_second_operator_that_fails_undoes_the_first() -> None:
    setting = Setting()
    before = setting.state()
    with pytest.raises(UserError):
        grow(setting, [OPERATORS[1], Second()])
    assert not differences(before, setting.state())
    assert grow(setting, OPERATORS[1:]).neurons == 1


def test_an_interrupt_while_cleaning_up_finishes_the_cleaning() -> None:
    """The second operator fails, and the undoing of the first is interrupted at each of its calls."""
    setting = Setting()
    before = setting.state()

    class Cleaning(Injector):
        def __call__(self, frame: Any, event: str, arg: Any) -> None:
            if self.calls or frame.f_code.co_name == "restore":
                super().__call__(frame, event, arg)

    for at in range(1, 60, 1 if os.environ.get("DAGROW_EVERY_CALL") else 7):
        injector = Cleaning(at, Interrupt)
        with pytest.raises((Interrupt, UserError)):
            injector.run_raw(lambda: grow(setting, [OPERATORS[1], Second()]))
        assert not differences(before, setting.state()), (at, injector.where)


def test_the_next_grow_works_as_if_nothing_had_happened() -> None:
    setting, untouched = Setting(), Setting()
    for at in (50, 1500, 4000):
        Injector(at, Interrupt).run(lambda: grow(setting))
    assert str(grow(setting)) == str(grow(untouched))
    for a, b in zip(setting.model.parameters(), untouched.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("verb", ["bottlenecks", "propose", "grow"])
def test_verbs_that_end_well_leave_no_trace(verb: str) -> None:
    setting = Setting()
    before = setting.state()
    if verb == "grow":
        grow(setting).undo()
    elif verb == "propose":
        dagrow.propose(setting.dag, setting.loader, loss, OPERATORS)
    else:
        dagrow.bottlenecks(setting.dag, setting.loader, loss)
    assert not differences(before, setting.state())
