"""Batches: what can be read again and again, how many samples one holds, and what messages say of it."""

import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import Dataset, IterableDataset

from dagrow._model_state import torch_state
from dagrow._pytree import tensors_in
from dagrow.errors import BatchError

RAISED = "dagrow: raised "  #: how notes on users' exceptions begin
_INSTALLED = tuple(sysconfig.get_paths()[path] for path in ("stdlib", "platstdlib", "purelib", "platlib"))
ENDLESS = 10_000  #: batches of something without a length that are too many to have an end


@dataclass
class Place:
    """A batch of a pass, the one that was read last."""

    number: int = 0
    samples: int = 0
    first: int = 0  #: the samples of the first batch


def check_batches(batches: object, name: str) -> None:
    """Refuses what holds no batches, or cannot be read twice.

    Args:
        batches: what was given.
        name: what messages call it.

    Raises:
        BatchError: it is none of the kind.
    """
    if isinstance(batches, Dataset) and not isinstance(batches, IterableDataset):
        raise BatchError(
            f"{name} is a {type(batches).__name__}, which holds single samples; give batches of them: "
            "torch.utils.data.DataLoader(dataset, batch_size=...)."
        )
    if isinstance(batches, (Tensor, Mapping, str)) or not isinstance(batches, Iterable):
        raise BatchError(f"{name} is a {type(batches).__name__}; give a list of (inputs, target) or a DataLoader.")
    if isinstance(batches, Iterator):
        raise BatchError(
            f"{name} is a {type(batches).__name__}, which can be read only once; give a list, list({name}), or a "
            "DataLoader."
        )


def batch_count(batches: object, most: int | None = None) -> int | None:
    """How many batches there are to read.

    Args:
        batches: a re-iterable.
        most: the largest number that is wanted.

    Returns:
        Their number, or None where it is not known.
    """
    try:
        length = len(batches)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):  # what a loader of a stream says
        return None
    return length if most is None else min(length, most)


def numbered(
    source: Iterator[Any], name: str, most: int | None, length: int | None, training: bool = False
) -> Iterator[tuple[int, Any]]:
    """Batches with their numbers, of something that has an end.

    Args:
        source: an iterator over batches; what it raises gets a note.
        name: what messages call the batches.
        most: the largest number that is wanted.
        length: of the batches, if it is known.
        training: whether an epoch may be as long as it likes; then it is only warned.

    Yields:
        A number, from 0, and a batch.

    Raises:
        BatchError: there are too many to have an end.
    """
    number = -1
    try:
        for number, batch in enumerate(islice(source, most)):
            if number == ENDLESS and most is None and length is None:
                if not training:
                    break
                warnings.warn(
                    f"{name} has no length and has not ended after {ENDLESS:,} batches; an epoch of training needs an "
                    "end, such as itertools.islice gives it.",
                    stacklevel=2,
                )
            yield number, batch
        else:
            return
    except BaseException as error:
        add_note(error, f"{RAISED}where batch {number + 1} of {name}, counted from 0, was to be read")
        raise
    raise BatchError(
        f"{name} has no length and has not ended after {ENDLESS:,} batches. If it never ends, give max_batches=, as "
        "many as are to be measured; if it does, give it a __len__, or a max_batches= above it."
    )


def generators_of(batches: object) -> list[torch.Generator]:
    """The random generators of a loader's own.

    Args:
        batches: a loader, or anything else.

    Returns:
        The generators, often none.
    """
    loaders = (batches, getattr(batches, "source", None))  # of samples that are drawn
    owners = [owner for loader in loaders for owner in (loader, getattr(loader, "batch_sampler", None))]
    owners += [getattr(owner, "sampler", None) for owner in owners]
    generators = [getattr(owner, "generator", None) for owner in owners]
    return [generator for generator in generators if isinstance(generator, torch.Generator)]


def sample_count(batch: object, dim: int = 0) -> int:
    """The size of a batch's first tensor along its samples.

    Args:
        batch: any nest of tensors.
        dim: the dimension along which samples lie; tensors that have no such dimension do not count.

    Returns:
        The number of samples.

    Raises:
        BatchError: there are none, or no tensor to tell.
    """
    for leaf in tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.ndim > dim:
            if not leaf.shape[dim]:
                raise BatchError(f"a batch has no samples: {description(batch)}.")
            return leaf.shape[dim]
    raise BatchError(f"a batch holds no tensor with a sample dimension {dim}: {description(batch)}.")


def description(batch: object) -> str:
    """Shapes and types of a batch, for messages.

    Args:
        batch: any nest of tensors.

    Returns:
        The nest, with words for its leaves.
    """

    def describe(leaf: object) -> str:
        if not isinstance(leaf, Tensor):
            return type(leaf).__name__
        return f"{tuple(leaf.shape)} {str(leaf.dtype).removeprefix('torch.')}"

    return str(tree_map(describe, batch))


def add_note(error: BaseException, note: str) -> None:
    """Adds a note to an error that is the user's own, once.

    Args:
        error: it stays what it is.
        note: a sentence.
    """
    if not isinstance(error, GeneratorExit) and note not in getattr(error, "__notes__", ()):
        error.add_note(note)


def is_noted(error: BaseException) -> bool:
    """Whether an exception came out of the user's loss, step, model or loader, and stays what it is.

    Args:
        error: what was raised.

    Returns:
        Whether a note says so.
    """
    return any(note.startswith(RAISED) for note in getattr(error, "__notes__", ()))


def is_of_own_class(error: BaseException) -> bool:
    """Whether an exception is of a class of the user's, as for control flow: not of Python, a library, or ours.

    Args:
        error: what was raised.

    Returns:
        Whether the class was written in no installed module.
    """
    module = type(error).__module__
    if module.partition(".")[0] == __name__.partition(".")[0]:
        return False
    file = getattr(sys.modules.get(module), "__file__", None)
    return module == "__main__" or (file is not None and not file.startswith(_INSTALLED))


def failure(model: nn.Module, batch: object, name: str, place: Place) -> str:
    """What an exception of the user's code was about, for a note.

    Args:
        model: that may have raised it.
        batch: that it was raised on.
        name: what messages call the batches.
        place: of the batch among them.

    Returns:
        A few sentences.
    """
    kinds = sorted({f"{p.dtype} on {p.device}".removeprefix("torch.") for p in model.parameters()})
    note = (
        f"{RAISED}on batch {place.number} of {name}: {description(batch)}. The model's parameters are "
        f"{', '.join(kinds)}; check that the batch has the shapes, types and device that the model takes and the loss "
        "compares."
    )
    if place.samples != place.first:
        note += (
            f" This batch has {place.samples} samples, the first had {place.first}: where the model or the loss is "
            "written for that many, leave it out (drop_last=True)."
        )
    return note


def epoch_seed() -> int:
    """A seed that follows from torch's generator: reproducible, and another one after each epoch of training."""
    return crc32(torch_state().numpy().tobytes())


def mark_of(batch: object) -> int | None:
    """By what a batch is known again: for each of its tensors the sums over all dimensions but the first.

    Args:
        batch: any nest of tensors.

    Returns:
        A checksum; None of a batch without tensors that can be summed.
    """
    mark, tensors = 0, [tensor for tensor in tensors_in(batch) if _is_usual(tensor)]
    for tensor in tensors:
        numbers = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
        sums = numbers.detach().double()
        sums = sums.flatten(1).sum(1) if sums.ndim > 1 else sums
        mark = crc32(sums.cpu().numpy().tobytes(), mark)
    return mark if tensors else None


def _is_usual(tensor: Tensor) -> bool:
    return type(tensor) is Tensor and tensor.layout is torch.strided and not (tensor.is_nested or tensor.is_quantized)
