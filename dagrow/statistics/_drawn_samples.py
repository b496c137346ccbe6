"""Fewer samples, on purpose: batches that are put together of samples drawn at random, without replacement.

Every sample is as likely as every other one, so that means over those that are drawn are unbiased. Batches are at most
as large as those that were given. Samples are taken out of batches whose tensors all have an entry for each of them; of
other batches, and where a loss is one number of a batch or groups are told batch by batch, whole ones are drawn; where
these have several sizes, samples are not quite equally likely. What is drawn is copied: nothing that is the user's
changes with it.
"""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from math import ceil, inf
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler, Subset

from dagrow._model_state import random_state, restoring, seed_everything
from dagrow._progress import show_batch
from dagrow.statistics._batches import batch_count, check_batches, epoch_seed, generators_of, numbered, sample_count
from dagrow.statistics._options import MeasureOptions, Samples, check_options
from dagrow.statistics._sample_layout import sample_dim

FEWEST = 256  #: samples that "auto" begins with
ALL = 1.5  #: times as many samples as are wanted are all taken


class DrawnSamples:
    """Some samples of batches, as batches. They are drawn when they are first asked for, and stay the same.

    Args:
        batches: a re-iterable.
        samples: how many; "auto" begins with FEWEST, and whoever measures them asks for more where that is too few.
        options: how batches are measured, see :class:`dagrow.statistics.MeasureOptions`.

    Attributes:
        auto: whether more may be asked for.
        count: how many samples are wanted; of whole batches, once they are drawn, how many these are.

    Raises:
        BatchError: the batches cannot be read twice.
    """

    def __init__(self, batches: Iterable[Any], samples: Samples, options: MeasureOptions) -> None:
        check_batches(batches, "batches")
        self.source, self.auto = batches, samples == "auto"
        self.count = FEWEST if samples == "auto" else samples
        self.others = OtherSamples(self)
        self._dim, self._most = options.get("batch_dim", 0), options.get("max_batches")
        self._whole = options.get("groups") is not None or options.get("reduction") == "batch"
        self._seed = epoch_seed()
        self._drawn: _Drawn | None = None

    @property
    def drawn(self) -> "_Drawn":
        """The samples, and as many others."""
        if self._drawn is None:
            with self._seeded():
                self._drawn = self._of_loader() if self._is_indexed else self._of_pool()
        return self._drawn

    def __iter__(self) -> Iterator[Any]:
        return islice(self.source, self._most) if self.is_all else iter(self.drawn.batches)

    def __len__(self) -> int:
        count = batch_count(self.source, self._most) if self.is_all else len(self.drawn.batches)
        if count is None:
            raise TypeError("the batches have no length")
        return count

    @property
    def is_all(self) -> bool:
        """Whether there are no more samples than are wanted, so that they are the batches themselves."""
        return self.drawn.total <= self.count

    def enlarge(self, count: int) -> bool:
        """Draws more, those that are drawn already among them; all where that is not much more.

        Args:
            count: how many samples are wanted.

        Returns:
            Whether there are more.
        """
        if count <= self.count or self.is_all:
            return False
        total = self.drawn.total
        self.count, self._drawn = (total, _Drawn(total)) if ALL * count >= total else (count, None)
        return True

    @property
    def _is_indexed(self) -> bool:
        """Whether the samples of a loader can be asked for one by one."""
        loader = self.source
        return (
            type(loader) is DataLoader
            and not (isinstance(loader.dataset, IterableDataset) or self._whole or self._most)
            and type(loader.batch_sampler) is BatchSampler
            and _takes_all(loader.batch_sampler.sampler, loader.dataset)
        )

    def _of_loader(self) -> "_Drawn":
        loader = self.source
        assert isinstance(loader, DataLoader)
        assert isinstance(loader.batch_sampler, BatchSampler)
        dataset, batches = loader.dataset, loader.batch_sampler
        samples = len(dataset)  # type: ignore[arg-type]
        total = samples - samples % batches.batch_size if batches.drop_last else samples
        among = total if type(batches.sampler) is SequentialSampler else samples  # else it drops others each time
        order = torch.randperm(among, generator=self._generator(), device="cpu")[:total].tolist()
        if total <= self.count:
            return _Drawn(total)
        parts, start = [], min(self.count, total - self.count)
        for chosen in (order[: self.count], order[start : start + self.count]):
            size = ceil(len(chosen) / ceil(len(chosen) / batches.batch_size))
            parts.append([tree_map(_copy, batch) for batch in _like(loader, Subset(dataset, chosen), size)])
        return _Drawn(total, *parts)

    def _of_pool(self) -> "_Drawn":
        """Reads all batches, and keeps what comes first in an order at random."""
        pool, last, size, total = list[_Piece](), inf, 1, 0
        generator, known = self._generator(), batch_count(self.source, self._most)
        for number, batch in numbered(iter(self.source), "batches", self._most, known):
            show_batch(number, known, "drawing samples")
            n = sample_count(batch, self._dim)
            size, total = max(size, n), total + n
            piece = _Piece.of(batch, n, None if self._whole else self._dim, generator)
            pool += [part for part in [piece.within(-inf, last)] if part is not None]
            if _samples(pool) > 4 * self.count + 2 * size:
                last = _bound(pool, 2 * self.count + size)  # whole batches may be more than are wanted
                pool = _within(pool, -inf, last)
        if total <= self.count:
            return _Drawn(total)
        first = _within(pool, -inf, _bound(pool, self.count))
        self.count = _samples(first)
        start, end = _bound(pool, min(self.count, total - self.count)), _bound(pool, 2 * self.count)
        return _Drawn(total, _batches(first, size), _batches(_within(pool, start, end), size))

    @contextmanager
    def _seeded(self) -> Iterator[None]:
        """Inside, loaders draw the same each time; random states are left as they were."""
        states = [*random_state(), *((owner.set_state, owner.get_state()) for owner in generators_of(self.source))]

        def restore() -> None:
            for set_state, state in states:
                set_state(state)

        with restoring(restore), torch.inference_mode(False):
            seed_everything(self._seed)
            yield

    def _generator(self) -> torch.Generator:
        return torch.Generator("cpu").manual_seed(self._seed)


def drawn(batches: Iterable[Any], options: MeasureOptions) -> Iterable[Any]:
    """Batches of the samples that are to be measured.

    Args:
        batches: of the user's, or of samples that were drawn already.
        options: with the number of samples, if not all are wanted.

    Returns:
        A re-iterable.

    Raises:
        BatchError, GrowthError, LossError, TypeError: an option is none, or does not fit.
    """
    check_options(options)
    samples = options.get("samples")
    return batches if samples is None or isinstance(batches, DrawnSamples) else DrawnSamples(batches, samples, options)


@dataclass(frozen=True)
class OtherSamples:
    """As many samples, as few as can be of those that were drawn."""

    of: DrawnSamples

    @property
    def source(self) -> Iterable[Any]:
        """The batches of which they are."""
        return self.of.source

    def __iter__(self) -> Iterator[Any]:
        return iter(self.of if self.of.is_all else self.of.drawn.others)

    def __len__(self) -> int:
        return len(self.of if self.of.is_all else self.of.drawn.others)


@dataclass(frozen=True)
class _Drawn:
    """Batches of samples that were drawn, of as many others, and how many there are in all; none if all are wanted."""

    total: int
    batches: Sequence[Any] = ()
    others: Sequence[Any] = ()


@dataclass(frozen=True, eq=False)
class _Piece:
    """Samples of a batch, or a whole one, and their places in an order at random.

    Attributes:
        keys: one for each sample; one of a whole batch.
        leaves: the tensors, and whatever else there is.
        spec: of the nest.
        dims: the dimension of each tensor along which samples lie; None of a whole batch.
        each: samples of a key.
    """

    keys: Tensor
    leaves: Sequence[Any]
    spec: TreeSpec
    dims: Sequence[int] | None
    each: int = 1

    @classmethod
    def of(cls, batch: Any, n: int, dim: int | None, generator: torch.Generator) -> "_Piece":
        """A whole batch where that is wanted, or where not all that it holds are tensors with an entry a sample."""
        keys = torch.rand(n, generator=generator, dtype=torch.float64, device="cpu")
        leaves, spec = tree_flatten(batch)
        dims = [None if dim is None else sample_dim(leaf, n, dim) for leaf in leaves]
        known = [each for each in dims if each is not None]
        return cls(keys, leaves, spec, known) if len(known) == len(dims) else cls(keys[:1], leaves, spec, None, n)

    def within(self, after: float, last: float) -> "_Piece | None":
        """A copy of those with keys in an interval: a loader may write the next batch into the same memory."""
        indices = torch.nonzero((self.keys > after) & (self.keys <= last)).flatten()
        if not len(indices):
            return None
        if self.dims is None:
            return replace(self, leaves=[_copy(leaf) for leaf in self.leaves])
        leaves = [_copy(leaf, dim, indices) for leaf, dim in zip(self.leaves, self.dims, strict=True)]
        return replace(self, keys=self.keys[indices], leaves=leaves)

    @property
    def kind(self) -> Hashable:
        """Pieces of one kind can be put together."""
        if self.dims is None:
            return id(self)
        pairs = zip(self.leaves, self.dims, strict=True)
        sizes = [(dim, *leaf.shape[:dim], *leaf.shape[dim + 1 :]) for leaf, dim in pairs]
        return str(self.spec), *sizes, *((leaf.dtype, leaf.device, leaf.requires_grad) for leaf in self.leaves)


def _within(pool: Sequence[_Piece], after: float, last: float) -> list[_Piece]:
    """What lies in an interval."""
    return [part for piece in pool if (part := piece.within(after, last)) is not None]


def _samples(pool: Sequence[_Piece]) -> int:
    """How many there are."""
    return sum(len(piece.keys) * piece.each for piece in pool)


def _bound(pool: Sequence[_Piece], samples: int) -> float:
    """The key up to which there are so many samples, or a few more."""
    if not samples:
        return -inf
    keys, order = torch.cat([piece.keys for piece in pool]).sort()
    each = torch.cat([torch.full_like(piece.keys, piece.each) for piece in pool])[order]
    place = int(torch.searchsorted(each.cumsum(0), float(samples)))
    return float(keys[min(place, len(keys) - 1)])


def _batches(pool: Sequence[_Piece], size: int) -> list[Any]:
    """Samples of one kind put together, up to so many; whole batches as they are."""
    kinds, batches = defaultdict[Hashable, list[_Piece]](list), list[Any]()
    for piece in pool:
        kinds[piece.kind].append(piece)
    for pieces in kinds.values():
        first = pieces[0]
        if first.dims is None:
            batches.append(tree_unflatten(first.leaves, first.spec))
            continue
        order = torch.cat([piece.keys for piece in pieces]).argsort()
        columns = zip(*(piece.leaves for piece in pieces), strict=True)
        joined = [(torch.cat(column, dim), dim) for column, dim in zip(columns, first.dims, strict=True)]
        for chosen in order.tensor_split(ceil(len(order) / size)):
            leaves = [_copy(leaf, dim, chosen) for leaf, dim in joined]
            batches.append(tree_unflatten(leaves, first.spec))
    return batches


def _copy(leaf: Any, dim: int = 0, indices: Tensor | None = None) -> Any:
    """A tensor of its own, of some entries or of all; anything else as it is."""
    if not isinstance(leaf, Tensor):
        return leaf
    copy = leaf.detach().clone() if indices is None else leaf.detach().index_select(dim, indices.to(leaf.device))
    return copy.requires_grad_(leaf.requires_grad)


def _takes_all(sampler: object, dataset: Any) -> bool:
    """Whether a sampler takes every sample once."""
    if type(sampler) not in (SequentialSampler, RandomSampler) or getattr(sampler, "replacement", False):
        return False
    return len(sampler) == len(sampler.data_source) == len(dataset)  # type: ignore[arg-type, attr-defined]


def _like(loader: DataLoader[Any], dataset: Subset[Any], size: int) -> DataLoader[Any]:
    """A loader of other samples."""
    return DataLoader(
        dataset,
        size,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
    )
