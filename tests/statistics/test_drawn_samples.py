"""Samples that are drawn at random: which they are, in what batches, and what is left as it was."""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
)

import dagrow
from dagrow import BatchError
from dagrow._model_state import preserve_state
from dagrow.statistics import DrawnSamples, Objective, drawn

N = 40
X = torch.arange(N, dtype=torch.float64)[:, None]  # each sample tells which it is
Y = 3 * X
DATA = TensorDataset(X, Y)
SIZES = [7, 12, 1, 9, 11]
LIST = list(zip(X.split(SIZES), Y.split(SIZES), strict=True))


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(zip(X, Y, strict=True))


class Loader(DataLoader[tuple[Tensor, Tensor]]):
    """Of a class that may do anything."""


class Rewriting:
    """Writes all batches into the same memory."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        x, y = torch.empty(8, 1).double(), torch.empty(8, 1).double()
        for start in range(0, N, 8):
            yield x.copy_(X[start : start + 8]), y.copy_(Y[start : start + 8])


MEMORY = X[:10].clone(), Y[:10].clone()


def rewriting(samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, ...]:
    for memory, column in zip(MEMORY, zip(*samples, strict=True), strict=True):
        memory[: len(samples)] = torch.stack(column)
    return tuple(memory[: len(samples)] for memory in MEMORY)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


FORMS: dict[str, Callable[[], Iterable[Any]]] = {
    "list": lambda: LIST,
    "loader": lambda: DataLoader(DATA, 12),
    "shuffling": lambda: DataLoader(DATA, 12, shuffle=True),
    "own generator": lambda: DataLoader(DATA, 12, shuffle=True, generator=generator()),
    "another class": lambda: Loader(DATA, 12, shuffle=True),
    "batch sampler": lambda: DataLoader(DATA, batch_sampler=BatchSampler(RandomSampler(DATA), 12, False)),
    "list of indices": lambda: DataLoader(DATA, batch_sampler=[range(12), range(12, 17), range(17, 29), range(29, N)]),
    "same memory": Rewriting,
    "collated into the same memory": lambda: DataLoader(DATA, 10, collate_fn=rewriting),
    "stream": lambda: DataLoader(Stream(), 12),
}
OF_ANY_FORM = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def which(batches: Iterable[Any]) -> list[int]:
    """The samples, each with its own target."""
    found = []
    for x, y in batches:
        assert torch.equal(y, 3 * x[:, :1])
        found += x[:, 0].int().tolist()
    return found


@OF_ANY_FORM
def test_so_many_and_as_many_others_each_once_and_the_same_in_each_pass(form: Callable[[], Iterable[Any]]) -> None:
    samples = DrawnSamples(form(), 15, {})
    chosen, others = which(samples), which(samples.others)
    assert len(chosen) == len(others) == 15
    assert len({*chosen, *others}) == 30
    assert chosen == which(samples)
    assert others == which(samples.others)
    assert max(len(x) for x, _ in (*samples, *samples.others)) <= 12
    assert (len(samples), len(samples.others)) == (len(list(samples)), len(list(samples.others)))


@OF_ANY_FORM
def test_more_samples_hold_those_that_were_drawn(form: Callable[[], Iterable[Any]]) -> None:
    samples = DrawnSamples(form(), 5, {})
    few = which(samples)
    torch.rand(1)
    assert not samples.enlarge(5)
    assert samples.enlarge(20)
    more = which(samples)
    assert (len(more), set(few) - set(more)) == (20, set())
    assert not samples.is_all
    assert samples.enlarge(27)  # all, as there are not 1.5 times as many
    assert samples.is_all
    assert sorted(which(samples)) == sorted(which(samples.others)) == list(range(N))
    assert not samples.enlarge(1000)


@pytest.mark.parametrize("form", [FORMS["list"], FORMS["loader"]], ids=["pool", "loader"])
def test_all_samples_are_as_likely(form: Callable[[], Iterable[Any]]) -> None:
    """And all pairs, whether of one batch or of two; each count lies within 4.5 standard deviations."""
    draws, count, singles, others, pairs = 500, 6, Counter[int](), Counter[int](), Counter[tuple[int, int]]()
    for draw in range(draws):
        torch.manual_seed(draw)
        samples = DrawnSamples(form(), count, {})
        chosen = sorted(which(samples))
        singles.update(chosen)
        others.update(which(samples.others))
        pairs.update((a, b) for a in chosen for b in chosen if a < b)
    for counts, chance in ((singles, count / N), (others, count / N), (pairs, count * (count - 1) / N / (N - 1))):
        wide = 4.5 * (draws * chance * (1 - chance)) ** 0.5
        possible = N if counts is not pairs else N * (N - 1) // 2
        assert max(counts.values()) < draws * chance + wide
        assert counts is pairs or min(counts.values()) > draws * chance - wide
        assert len(counts) > 0.9 * possible


def test_where_few_are_left_the_others_are_as_many_and_as_new_as_can_be() -> None:
    for form in (FORMS["list"], FORMS["loader"]):
        samples = DrawnSamples(form(), 30, {})
        chosen, others = which(samples), which(samples.others)
        assert len(others) == len(set(others)) == 30
        assert set(chosen) | set(others) == set(range(N))


@OF_ANY_FORM
@pytest.mark.parametrize("options", [{}, {"max_batches": 2}, {"reduction": "batch"}], ids=["", "most", "whole"])
def test_all_samples_are_the_batches_themselves(form: Callable[[], Iterable[Any]], options: Any) -> None:
    """In each pass in the order in which they come without."""
    model = nn.Linear(1, 1).double()
    plain = Objective(model, form(), functional.mse_loss, **options)
    objective = Objective(model, DrawnSamples(form(), N, options), functional.mse_loss, **options)
    others = objective.with_batches(objective.batches.others)  # type: ignore[attr-defined]
    with preserve_state(model):
        expected = which(batch for batch, _ in plain)
        for each in (objective, objective, others, others):
            assert which(batch for batch, _ in each) == expected
    if form is FORMS["list"]:
        assert all(given is kept for given, (kept, _) in zip(LIST, objective, strict=False))


WHOLE: dict[str, tuple[Any, Callable[[Any], tuple[Tensor, Tensor]]]] = {
    "one number of the batch": ({"reduction": "batch"}, lambda batch: batch),
    "groups": ({"groups": lambda batch: batch[0][:, 0].tolist()}, lambda batch: batch),
    "a name": ({}, lambda batch: (*batch, "name")),  # type: ignore[return-value]
    "a temperature": ({}, lambda batch: (*batch, torch.tensor(2.0))),  # type: ignore[return-value]
    "a tensor without entries for samples": ({}, lambda batch: (*batch, torch.ones(50))),  # type: ignore[return-value]
}


@pytest.mark.parametrize(("options", "given"), WHOLE.values(), ids=WHOLE)
@pytest.mark.parametrize("count", [1, 15, 28])
def test_whole_batches_where_samples_do_not_stand_alone(options: Any, given: Callable[[Any], Any], count: int) -> None:
    samples = DrawnSamples([given(batch) for batch in LIST], count, options)
    chosen, others = ([which([batch[:2]]) for batch in batches] for batches in (samples, samples.others))
    assert all(batch in [which([each]) for each in LIST] for batch in (*chosen, *others))
    sizes = [len(batch) for batch in chosen]
    assert samples.count == sum(sizes) >= count
    assert sum(sizes) - max(sizes) < count  # none too many
    assert any(batch not in chosen for batch in others) or samples.is_all


@pytest.mark.parametrize("given", [list(zip(X.split(10), Y.split(10), strict=True)), DataLoader(DATA, 10)], ids=type)
def test_others_of_whole_batches_are_other_batches(given: Any) -> None:
    samples = DrawnSamples(given, 3, {"reduction": "batch"})
    chosen, others = which(samples), which(samples.others)
    batches = [list(range(first, first + 10)) for first in range(0, N, 10)]
    assert chosen in batches
    assert others in batches
    assert chosen != others


def test_samples_lie_along_any_dimension_and_in_any_nest() -> None:
    sequences = X.T.repeat(3, 1)[:, :, None]
    given = [{"x": sequences[:, part], "rest": [Y[part]]} for part in (slice(0, 11), slice(11, 17), slice(17, N))]
    (batch, *rest) = DrawnSamples(given, 12, {"batch_dim": 1})
    assert not rest
    assert batch["x"].shape == (3, 12, 1)
    assert torch.equal(batch["rest"][0], 3 * batch["x"][2])


def test_samples_of_several_sizes_stay_apart() -> None:
    """Each in a batch of its own kind."""
    given = [(X[part].repeat(1, length), Y[part]) for part, length in ((slice(0, 20), 2), (slice(20, N), 5))]
    samples = DrawnSamples(given, 24, {})
    assert {x.shape[1] for x, _ in samples} == {2, 5}
    assert len(set(which(samples))) == 24


def test_what_is_the_users_stays_as_it_is() -> None:
    x = X.clone().requires_grad_()
    given = [(part, y) for part, y in zip(x.split(10), Y.split(10), strict=True)]
    versions = [(part._version, y._version) for part, y in given]
    for options in ({}, {"reduction": "batch"}):
        for batch, target in DrawnSamples(given, 15, options):
            assert batch.requires_grad
            assert batch.is_leaf
            with torch.no_grad():
                batch.zero_()
                target.zero_()
    assert torch.equal(x, X)
    assert [(part._version, y._version) for part, y in given] == versions


@pytest.mark.parametrize("count", [15, N])
def test_random_states_stay_as_they_are(count: int) -> None:
    """Of the generators that all share, and of the loader's own, wherever they are."""

    def noisy(samples: list[Any]) -> Any:
        random.random(), np.random.rand(), torch.rand(1)
        return rewriting(samples)

    own = [generator() for _ in range(2)]
    inner = BatchSampler(RandomSampler(DATA, num_samples=2 * N, generator=own[1]), 10, False)
    loaders = [
        DataLoader(DATA, 10, shuffle=True, generator=own[0], collate_fn=noisy),
        DataLoader(DATA, batch_sampler=inner, collate_fn=noisy),
    ]
    model = nn.Linear(1, 1).double()
    for loader in loaders:
        before = [torch.get_rng_state(), *(each.get_state() for each in own)]
        others = random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index, union-attr]
        samples = DrawnSamples(loader, count, {})
        assert len(samples) >= 1
        objective = Objective(model, samples, functional.mse_loss)
        for each in (objective, objective.with_batches(samples.others)):
            each.mean()
        assert all(map(torch.equal, before, [torch.get_rng_state(), *(each.get_state() for each in own)]))
        assert others == (random.getstate(), np.random.get_state()[1].tolist())  # type: ignore[index, union-attr]


class Counted(Dataset[tuple[Tensor, Tensor]]):
    def __init__(self) -> None:
        self.read = list[int]()

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.read.append(index)
        return X[index], Y[index]


def test_of_a_loader_nothing_is_read_but_what_is_drawn() -> None:
    dataset = Counted()
    samples = DrawnSamples(DataLoader(dataset, 8, shuffle=True, drop_last=True), 10, {})
    chosen = which(samples) + which(samples.others) + which(samples)
    assert sorted(dataset.read) == sorted(set(chosen))
    assert [len(x) for x, _ in samples] == [5, 5]


SOME = [3, 5, 8, 13, 21, 34]
PARTS: dict[str, tuple[Any, set[int]]] = {
    "a sampler of some": (DataLoader(DATA, 2, sampler=SubsetRandomSampler(SOME)), set(SOME)),
    "batches of some": (DataLoader(DATA, batch_sampler=BatchSampler(SubsetRandomSampler(SOME), 2, False)), set(SOME)),
    "the first": (DataLoader(DATA, 2, sampler=SequentialSampler(range(6))), set(range(6))),
    "without the last": (DataLoader(TensorDataset(X[:11], Y[:11]), 6, drop_last=True), set(range(6))),
    "some batches": (DataLoader(DATA, 2), {0, 1, 2, 3, 4, 5}),
}


@pytest.mark.parametrize(("loader", "all_of_it"), PARTS.values(), ids=PARTS)
def test_only_what_the_loader_gives_is_drawn(loader: Any, all_of_it: set[int]) -> None:
    options: Any = {"max_batches": 3} if loader is PARTS["some batches"][0] else {}
    assert set(which(DrawnSamples(loader, 5, options))) < all_of_it
    everything = DrawnSamples(loader, 6, options)
    assert everything.is_all
    assert set(which(everything)) == all_of_it


def test_what_a_loader_draws_twice_counts_twice() -> None:
    for number in (N, 100):
        loader = DataLoader(DATA, 10, sampler=RandomSampler(DATA, replacement=True, num_samples=number))
        chosen = which(DrawnSamples(loader, 35, {}))
        assert len(chosen) == 35 > len(set(chosen))


def test_of_whole_loaders_as_many_as_full_batches_hold() -> None:
    loader = DataLoader(DATA, 12, shuffle=True, drop_last=True)
    assert DrawnSamples(loader, 36, {}).is_all
    assert not DrawnSamples(loader, 35, {}).is_all
    assert DrawnSamples(DataLoader(DATA, 64, drop_last=True), 5, {}).drawn.total == 0


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong: list[tuple[Any, Any, str]] = [
        (iter(LIST), {}, "read only once"),
        (LIST, {"groups": list(range(N))}, "samples=5 draws samples at random, and groups is a list.*function"),
    ]
    for batches, options, message in wrong:
        with pytest.raises(BatchError, match=message):
            drawn(batches, {"samples": 5, **options})
    monkeypatch.setattr("dagrow.statistics._batches.ENDLESS", 50)

    class Endless:
        def __iter__(self) -> Iterator[Any]:
            while True:
                yield from LIST

    with pytest.raises(BatchError, match="no length and has not ended after 50 batches"):
        list(DrawnSamples(Endless(), 5, {}))
    assert len(which(DrawnSamples(Endless(), 50, {"max_batches": 12}))) == 50
    with pytest.raises(TypeError, match="no length"):
        len(DrawnSamples(Rewriting(), 1000, {}))


def test_the_usual_batches_without_a_number_and_those_that_were_drawn() -> None:
    assert drawn(LIST, {}) is LIST
    samples = drawn(LIST, {"samples": "auto"})
    assert drawn(samples, {"samples": "auto"}) is samples


def test_exceptions_of_a_loader_come_out_with_a_note() -> None:
    def failing(_: Any) -> None:
        raise ZeroDivisionError

    model = nn.Linear(1, 1).double()
    loader = DataLoader(DATA, 10, collate_fn=failing)
    for options in ({}, {"max_batches": 2}):
        objective = Objective(model, DrawnSamples(loader, 5, options), functional.mse_loss)  # type: ignore[arg-type]
        with pytest.raises(ZeroDivisionError) as caught:
            objective.mean()
        assert any("were to be read" in note for note in caught.value.__notes__)


def test_modes_of_torch_make_no_difference() -> None:
    model = nn.Sequential(nn.Linear(1, 2), nn.Tanh(), nn.Linear(2, 1)).double()
    dag = dagrow.trace(model, X)
    expected = dagrow.bottlenecks(dag, LIST, functional.mse_loss, samples=20)
    assert expected.samples == 20
    with torch.inference_mode():
        assert dagrow.bottlenecks(dag, LIST, functional.mse_loss, samples=20).loss == expected.loss
    try:
        torch.set_default_device("meta")
        chosen = which(DrawnSamples(LIST, 15, {}))
    finally:
        torch.set_default_device(None)
    assert len(chosen) == 15
