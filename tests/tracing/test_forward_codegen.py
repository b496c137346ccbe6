"""A forward written from the graph: it is put on only where a literal size no longer fits, and behaves like the old."""

import copy
import inspect
import io
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import dagrow
from dagrow import AddNeurons
from dagrow.surgery import Draft
from dagrow.surgery._apply import apply

X = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
BATCHES = [(X, X[:, :2] * X[:, 2:])]


class Net(nn.Module):
    """Its forward has a hidden width written into it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(3, 2)
        self.table = [torch.ones(2)]

    def forward(self, x: Tensor, scale: float = 1.0, *, shift: Tensor | None = None) -> Tensor:
        h = torch.tanh(self.a(x)).view(-1, 3)
        h = functional.dropout(h, 0.5, training=self.training)
        with torch.no_grad():
            constant = self.table[0] * 1.0
        return self.b(h) * scale * constant

    def encode(self, x: Tensor) -> Tensor:
        return torch.tanh(self.a(x))

    @property
    def width(self) -> int:
        return self.a.out_features


@dataclass
class Answer:
    logits: Tensor
    extra: tuple[Tensor, int]


class Structured(Net):
    def forward(self, x: Tensor, *others: Tensor) -> Answer:  # type: ignore[override]
        h = torch.tanh(self.a(x)).reshape(x.shape[0], 3)
        logits = self.b(h)
        for other in others:
            logits = logits + other.sum()
        return Answer(logits, (logits.mean(1), 7))


def grown(model: nn.Module | None = None, example: Any = X, k: int = 2) -> tuple[Any, Any, dagrow.Receipt]:
    if model is None:
        torch.manual_seed(0)
        model = Net().eval()
    dag = dagrow.trace(model, example)
    return model, dag, widened(dag, k)


def loss(output: Any, target: Tensor) -> Tensor:
    return functional.mse_loss(output.logits if isinstance(output, Answer) else output, target)


def widened(dag: Any, k: int = 2) -> dagrow.Receipt:
    return dagrow.propose(dag, BATCHES, loss, [AddNeurons(k=k, init="zero")])[0].apply()


def test_a_model_with_a_literal_size_grows_and_keeps_its_function() -> None:
    torch.manual_seed(0)
    before = Net().eval()(X)
    model, dag, receipt = grown()
    assert model.width == model.encode(X).shape[1] == 5
    assert torch.allclose(model(X), before, atol=1e-6)
    assert isinstance(model, Net)
    assert type(model) is not Net
    assert type(model).__name__ == "Net"
    widened(dag)
    assert model.width == 7
    assert torch.allclose(model(X), before, atol=1e-6)
    with pytest.raises(dagrow.GrowthError):
        receipt.undo()


def test_undo_gives_the_users_own_class_back() -> None:
    torch.manual_seed(0)
    state = Net().state_dict()
    model, dag, first = grown()
    kind = type(model)
    second = widened(dag)
    second.undo()
    assert type(model) is kind
    first.undo()
    assert type(model) is Net
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def test_state_dict_keys_stay() -> None:
    assert list(grown()[0].state_dict()) == list(Net().state_dict())


def saved(model: nn.Module) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved])
@pytest.mark.parametrize("kind", [Net, Structured])
def test_copies_compute_the_same_and_grow_again(copied: Any, kind: type[Net]) -> None:
    model = grown(kind().eval())[0]
    twin = copied(model)
    assert isinstance(twin, kind)
    out, again = model(X), twin(X)
    if kind is Structured:
        assert isinstance(again, Answer)
        out, again = out.logits, again.logits
    assert torch.equal(out, again)
    with torch.no_grad():
        twin.a.weight.zero_()
    assert model.a.weight.any()
    widened(dagrow.trace(twin, X))
    assert (twin.width, model.width) == (7, 5)
    twin(X)


def test_dropout_follows_the_mode() -> None:
    model, _, _ = grown(Net().train())
    model.train()
    assert not torch.equal(model(X), model(X))
    model.eval()
    assert torch.equal(model(X), model(X))


class Fixed(Net):
    """A dropout that is always on."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.b(functional.dropout(torch.tanh(self.a(x)).view(-1, 3), 0.5, True))


@pytest.mark.parametrize("training", [False, True])
def test_a_flag_that_does_not_follow_the_mode_stays(training: bool) -> None:
    model = Fixed().train(training)
    dag = dagrow.trace(model, X)
    axis = dag.axis("a")
    apply(dag, Draft(dag, [(axis, dag.widening(axis, 2))]).change(), 0.0)
    assert model.width == 5
    for mode in (True, False):
        model.train(mode)
        assert not torch.equal(model(X), model(X))


def test_the_users_hooks_run() -> None:
    model = Net().eval()
    seen: list[Any] = []
    model.register_forward_hook(lambda *_: seen.append("root"))
    model.a.register_forward_hook(lambda m, _, y: seen.append(tuple(y.shape)))
    grown(model)
    seen.clear()
    model(X)
    assert seen == [(20, 5), "root"]


def test_signature_and_defaults_stay() -> None:
    model, _, _ = grown()
    assert list(inspect.signature(model.forward).parameters) == ["x", "scale", "shift"]
    assert torch.equal(model(x=X, scale=1.0, shift=None), model(X))
    with pytest.raises(dagrow.TraceError, match=r"traced with scale = 1\.0"):
        model(X, 2.0)
    with pytest.raises(dagrow.TraceError, match="traced with shift = None"):
        model(X, shift=X)


def test_gradients_stay_switched_as_they_are() -> None:
    model, _, _ = grown()
    assert model(X).requires_grad
    with torch.no_grad():
        assert not model(X).requires_grad
    with pytest.raises(RuntimeError):
        model(X[:, :2])
    assert torch.is_grad_enabled()


def test_other_batch_sizes_run() -> None:
    model, _, _ = grown()
    assert torch.allclose(model(X[:7]), model(X)[:7], atol=1e-6)


def test_structured_outputs_and_starred_arguments() -> None:
    model = Structured().eval()
    before = model(X)
    grown(model)
    after = model(X)
    assert isinstance(after, Answer)
    assert torch.allclose(after.logits, before.logits, atol=1e-6)
    assert after.extra[1] == 7
    with pytest.raises(dagrow.TraceError, match="others"):
        model(X, X)


@pytest.mark.filterwarnings("ignore")
def test_compiled_before_and_after_growth() -> None:
    torch._dynamo.reset()
    model = Net().eval()
    before = torch.compile(model, backend="eager")
    first = before(X)
    grown(model)
    assert torch.allclose(before(X), first, atol=1e-6)
    assert torch.equal(torch.compile(model, backend="eager")(X), model(X))
    torch._dynamo.reset()


class Branching(Net):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        h = torch.tanh(self.a(x)).view(-1, 3)
        return self.b(h + torch.rand_like(h) if self.training else h)


class Setting(Net):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(2, 2))

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.inner(self.b(torch.tanh(self.a(x)).view(-1, 3)))


def on_the_object(model: nn.Module) -> nn.Module:
    model.forward = model.forward  # type: ignore[method-assign]
    return model


def hooked(model: Setting) -> nn.Module:
    model.inner.register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Branching(), "does other things in training"),
        (on_the_object(Net()), "put on the object"),
        (hooked(Setting()), "skip the hooks of inner"),
    ],
)
def test_a_forward_that_cannot_be_written_is_refused_when_planning(model: nn.Module, reason: str) -> None:
    before = copy.deepcopy(model.state_dict())
    modes: Sequence[bool] = [m.training for m in model.modules()]
    axis = dagrow.trace(model, X).axis("a")
    assert not axis.growable
    assert reason in str(axis.reason)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
