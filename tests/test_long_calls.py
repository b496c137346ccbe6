"""What takes long, or never ends: progress bars, a limit to batches, loaders without an end, and the logger."""

import io
import itertools
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from rich.console import Console
from small_net import BATCHES, MSE, X, Y, setting
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, TensorDataset

import dagrow
import dagrow._progress as progress
from dagrow import AddNeurons, BatchError, MoveWeights
from dagrow._progress import ProgressBar, progress_bar

OPERATORS = [MoveWeights(folds=1), AddNeurons(k=1, ridge=0.1, folds=1)]


class Stream(IterableDataset[Any]):
    """Batches without a length, perhaps without an end."""

    def __init__(self, count: int | None) -> None:
        self.count = count

    def __iter__(self) -> Iterator[Any]:
        yield from itertools.repeat((X, Y)) if self.count is None else itertools.repeat((X, Y), self.count)


class Cycle:
    def __iter__(self) -> Iterator[Any]:
        return itertools.cycle(BATCHES)


class Endless(RandomSampler):
    """A sampler that goes on and on."""

    def __iter__(self) -> Iterator[int]:
        while True:
            yield from super().__iter__()

    def __len__(self) -> int:
        raise NotImplementedError


DATA = TensorDataset(X, Y)
ENDLESS: dict[str, Any] = {
    "stream": Stream(None),
    "loader of a stream": DataLoader(Stream(None), batch_size=None),
    "cycle": Cycle(),
    "endless sampler": DataLoader(DATA, batch_size=4, sampler=Endless(DATA)),
}


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of batches that are too many to have an end, lowered for a test to be short."""
    monkeypatch.setattr("dagrow.statistics._batches.ENDLESS", 50)


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("name", ENDLESS)
def test_a_loader_that_never_ends_is_noticed(name: str) -> None:
    model, dag = setting()
    before = [parameter.clone() for parameter in model.parameters()]
    for call in (
        lambda: dagrow.bottlenecks(dag, ENDLESS[name], MSE),
        lambda: dagrow.grow(dag, ENDLESS[name], MSE, OPERATORS),
        lambda: dagrow.grow(dag, BATCHES, MSE, OPERATORS, validation=ENDLESS[name]),
        lambda: dagrow.Grower(dag, MSE, OPERATORS).step(0, ENDLESS[name]),
    ):
        with pytest.raises(BatchError, match=r"no length and has not ended after 50 batches.*max_batches="):
            call()
    assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("name", ENDLESS)
def test_of_an_endless_loader_some_batches_are_measured(name: str) -> None:
    _, dag = setting()
    assert dagrow.bottlenecks(dag, ENDLESS[name], MSE, max_batches=5).samples in (20, 40)
    receipt = dagrow.grow(dag, ENDLESS[name], MSE, OPERATORS, max_batches=3, validation=ENDLESS[name])
    assert receipt.loss_after < receipt.loss_before


@pytest.mark.usefixtures("few")
def test_streams_with_an_end_are_read_to_it() -> None:
    _, dag = setting()
    assert dagrow.bottlenecks(dag, Stream(49), MSE).samples == 49 * 8
    assert dagrow.bottlenecks(dag, [*BATCHES] * 60, MSE).samples == 60 * 8  # with a length there is no limit
    assert dagrow.bottlenecks(dag, Stream(60), MSE, max_batches=1000).samples == 60 * 8
    optimizer = torch.optim.SGD(dag.model.parameters(), lr=1e-2)
    with pytest.warns(UserWarning, match="an epoch of training needs an end"):
        dagrow.fit(dag, Stream(60), MSE, OPERATORS, epochs=1, optimizer=optimizer, measured=BATCHES)


def test_max_batches_limits_what_is_measured_and_not_what_is_trained_on() -> None:
    model, dag = setting()
    seen: list[bool] = []

    def step(network: nn.Module, batch: Any) -> Tensor:
        seen.append(network.training)
        return MSE(network(batch[0]), batch[1])

    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    dagrow.fit(dag, BATCHES * 7, step=step, operators=OPERATORS, epochs=2, optimizer=optimizer, max_batches=2)
    assert seen.count(True) == 14
    runs = {}
    for most in (2, None):
        seen.clear()
        dagrow.bottlenecks(dag, BATCHES * 7, step=step, max_batches=most, reduction="mean")
        runs[most] = len(seen)
    assert runs[None] - runs[2] == len(BATCHES * 7) - 2


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What is written to a terminal, on which bars appear at once."""
    written = io.StringIO()
    monkeypatch.setattr(progress, "DELAY", 0.0)
    monkeypatch.setattr(
        progress, "Console", lambda stderr: Console(file=written, force_terminal=True, width=100, color_system=None)
    )
    return written


@pytest.mark.parametrize("verb", ["bottlenecks", "propose", "grow", "tangent", "fit", "step", "plan"])
def test_every_verb_shows_a_bar_unless_it_is_told_not_to(verb: str, terminal: io.StringIO) -> None:
    for shown in (False, True):
        model, dag = setting()
        given: Any = {"progress": shown}
        if verb == "fit":
            given |= {"epochs": 2, "optimizer": torch.optim.SGD(model.parameters(), lr=1e-2)}
        if verb == "step":
            dagrow.Grower(dag, MSE, OPERATORS, **given).step(0, BATCHES)
        elif verb == "plan":
            dagrow.plan(dagrow.propose(dag, BATCHES, MSE, **given))
        else:
            getattr(dagrow, verb)(dag, BATCHES, MSE, **given)
        assert ("batches" in terminal.getvalue()) == shown
    assert ("training" in terminal.getvalue()) == (verb == "fit")


def test_a_bar_goes_away_with_its_call(terminal: io.StringIO) -> None:
    _, dag = setting()
    with pytest.raises(KeyError):
        dagrow.bottlenecks(dag, BATCHES * 3, lambda o, t: {}["missing"])  # type: ignore[misc]
    with progress_bar() as bar, progress_bar() as inner:
        assert inner is bar
    assert terminal.getvalue().count("\x1b[?25h") == terminal.getvalue().count("\x1b[?25l")  # the cursor is back


def test_bars_are_quiet_in_files_and_at_first(capfd: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(progress, "DELAY", 0.0)
    _, dag = setting()
    dagrow.grow(dag, BATCHES, MSE, OPERATORS)
    assert capfd.readouterr() == ("", "")
    monkeypatch.setattr(progress, "DELAY", 60.0)
    bar = ProgressBar(console=Console(force_terminal=True))
    bar.update("batches", 1, 2)
    assert capfd.readouterr() == ("", "")


def test_the_logger_tells_what_happened(caplog: pytest.LogCaptureFixture) -> None:
    assert any(isinstance(handler, logging.NullHandler) for handler in logging.getLogger("dagrow").handlers)
    _, dag = setting()
    with caplog.at_level(logging.INFO, "dagrow"):
        receipt = dagrow.grow(dag, BATCHES, MSE, [AddNeurons(k=1, ridge=0.1, folds=1)])
        receipt.undo()
    assert [record.name for record in caplog.records] == ["dagrow"] * 2
    assert caplog.messages[0].startswith("applied AddNeurons(k=1")
    assert str(receipt) in caplog.messages[0]
    assert caplog.messages[1] == "undone: 0"


def test_tables_show_in_notebooks() -> None:
    _, dag = setting()
    growths = dagrow.propose(dag, BATCHES, MSE, OPERATORS)
    history = dagrow.Grower(dag, MSE).history
    shown = [
        dag,
        dag.coverage(),
        dagrow.bottlenecks(dag, BATCHES, MSE),
        dagrow.tangent(dag, BATCHES, MSE),
        growths,
        growths[0],
        history,
        growths[0].apply(),
    ]
    for value in shown:
        html = value._repr_html_()  # type: ignore[attr-defined]
        assert html.startswith("<pre")
        assert str(value).splitlines()[0].strip() in html.replace("&gt;", ">").replace("&#x27;", "'")
    assert "<b>" not in dagrow.Bottlenecks([dagrow.Bottleneck("<b>", 1.0, 0.0, 1.0)], 1, 0.0)._repr_html_()
    assert isinstance(growths, list)
    assert all(growth.where in str(growths) for growth in growths)


def test_the_package_has_a_version() -> None:
    assert dagrow.__version__[0].isdigit()
