"""Whether a loss is a mean or a sum over samples: it is asked for what the model returned, and for that twice over.

The model itself runs on batches of the size that they have: a batch size may be written into it. Only where the loss is
no function of what the model's own forward returns does the model run on a batch that is repeated.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from dagrow._pytree import mapped
from dagrow.errors import first_line
from dagrow.statistics._hooks import ForwardProbe

TURNS = 8  #: of random numbers, over which noise is averaged
EXACT = 1e-3  #: a relative difference that is rounding, in float32 and float64
ROUGH = 1.35  #: a factor between averages over noise that is chance
FACTORS: dict[Literal["mean", "sum"], int] = {"mean": 1, "sum": 2}  #: by which repeating a batch multiplies them


@dataclass(frozen=True)
class Finding:
    """What a batch tells about a loss.

    Attributes:
        reduction: over its samples; None if it is neither of the two, or cannot be told.
        why: there is none, for a message.
        sure: whether nothing else would tell more.
    """

    reduction: Literal["mean", "sum"] | None
    why: str = ""
    sure: bool = False


class Recording:
    """What the calls of a model returned, in their order."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.outputs = model, list[Any]()

    def recorded(self) -> AbstractContextManager[object]:
        """A context in which calls of the model are recorded."""

        def call(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            self.outputs.append(mapped(_copy, output))
            return output

        return ForwardProbe(self.model, call)

    def replayed(self, outputs: Sequence[Any]) -> AbstractContextManager[object]:
        """A context in which calls of the model return these outputs, and nothing runs."""
        rest = iter(outputs)

        def call(_: Callable[..., Any], *_args: Any, **_kwargs: Any) -> Any:
            for output in rest:
                return output
            raise _UnclearError("the step calls the model another number of times for a batch that is repeated")

        return ForwardProbe(self.model, call)


def _copy(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


class _UnclearError(Exception):
    """What is compared does not tell; ``last`` if nothing else would tell more."""

    def __init__(self, reason: str, last: bool = False) -> None:
        super().__init__(reason)
        self.last = last


@dataclass(frozen=True)
class _Slope:
    """The loss's gradient at a tensor that the model returned, whose samples lie along a dimension, if anywhere."""

    gradient: Tensor
    dim: int | None


@dataclass(frozen=True)
class ReductionProbe:
    """One batch, and the same repeated.

    Attributes:
        evaluate: gives the loss of a batch, and whether it draws random numbers, which follow from a turn alone.
        batch: of ``samples`` along ``dim``.
        recording: of the model's calls on it.
        loss: of it, in turn 0, as the user's loss gives it.
    """

    evaluate: Callable[[object, int], tuple[Tensor, bool]]
    batch: object
    samples: int
    dim: int
    recording: Recording
    loss: float

    def finding(self) -> Finding | None:
        """What this batch tells; None if it tells nothing, as where the loss has no slope."""
        replays = list[Finding]()
        for multiples in (True, False):
            found = self._tried(partial(self._compare_slopes, multiples))
            if found is None or found.reduction is not None:
                return found
            replays.append(found)
        whole = replays[-1]  # where several entries may be one sample's, their order is unknown
        return whole if whole.sure else self._tried(self._compare_losses)

    def _tried(self, compare: Callable[[], Finding | None]) -> Finding | None:
        """A finding, also where the loss takes no such batch. An exception for another reason is the user's own."""
        try:
            return compare()
        except _UnclearError as error:
            return Finding(None, str(error), error.last)
        except Exception as error:
            if self._answers(compare):
                raise
            self.evaluate(self.batch, 0)  # as given, too, if that is not the reason
            return Finding(None, f"the loss cannot be computed for a batch that is repeated ({first_line(error)})")

    @staticmethod
    def _answers(compare: Callable[[], Finding | None]) -> bool:
        try:
            compare()
        except _UnclearError:
            return True
        except Exception:  # the same again
            return False
        return True

    def _compare_slopes(self, multiples: bool) -> Finding | None:
        """Compares the loss's slopes at what the model returned, with ``multiples`` also at tokens of samples."""
        one, noisy = self._slopes(1, multiples, 0)
        two, _ = self._slopes(2, multiples, 0)
        if not any(slope.gradient.any() for slope in one):
            return None
        if not noisy:
            return _compared(one, two)
        energies = [
            sum(_energy(slope.gradient) for turn in range(TURNS) for slope in self._slopes(times, multiples, turn)[0])
            for times in (1, 2)
        ]
        return _averaged("the size of the loss's gradient", (2 * energies[1] / energies[0]) ** 0.5)

    def _slopes(self, times: int, multiples: bool, turn: int) -> tuple[list[_Slope], bool]:
        """Where the model returned tensors, and whether the loss draws random numbers."""
        leaves, dims = list[Tensor](), list[int | None]()

        def repeat(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            dim = self._sample_dim(leaf, multiples)
            leaf = leaf.clone() if dim is None else torch.cat([leaf] * times, dim)
            if not (leaf.is_floating_point() or leaf.is_complex()):
                return leaf
            leaves.append(leaf.requires_grad_())
            dims.append(dim)
            return leaf.clone()  # what follows may work in place, which leaves do not allow

        with torch.inference_mode(False), torch.enable_grad():
            outputs = mapped(repeat, self.recording.outputs)
            with self.recording.replayed(outputs):
                loss, noisy = self.evaluate(self._repeated(times, multiples), turn)
            found: Sequence[Tensor | None] = ()
            if loss.requires_grad and leaves:
                found = torch.autograd.grad(loss, leaves, allow_unused=True)
        slopes = [_Slope(g, dim) for g, dim in zip(found, dims, strict=False) if g is not None]
        if not slopes:
            raise _UnclearError("the loss is no function of what the model's own forward returns")
        if not all(bool(slope.gradient.isfinite().all()) for slope in slopes):
            raise _UnclearError("the loss's gradient is not finite")
        if any(slope.dim is None and slope.gradient.any() for slope in slopes):
            raise _UnclearError("the loss reads what the model returns for a whole batch, not for each sample")
        return [slope for slope in slopes if slope.dim is not None], noisy

    def _compare_losses(self) -> Finding | None:
        """Compares the loss of the batch with that of the batch repeated, on which the model runs."""
        if self.loss == 0:
            return None
        repeated = self._repeated(2, False)
        loss, noisy = self.evaluate(repeated, 0)
        if not noisy:
            return _exact("the loss", float(loss) / self.loss, 0.0, EXACT)
        one, two = (
            sum(float(self.evaluate(batch, turn)[0]) for turn in range(TURNS)) for batch in (self.batch, repeated)
        )
        return _averaged("the loss", two / one)

    def _repeated(self, times: int, multiples: bool) -> object:
        def repeat(leaf: Any) -> Any:
            dim = self._sample_dim(leaf, multiples) if isinstance(leaf, Tensor) else None
            return leaf if dim is None else torch.cat([leaf] * times, dim)

        return tree_map(repeat, self.batch)

    def _sample_dim(self, tensor: Tensor, multiples: bool) -> int | None:
        """The dimension with an entry for each sample, or with several, such as one for each token."""
        dims = [dim for dim in dict.fromkeys((self.dim, 0)) if dim < tensor.ndim]
        exact = [dim for dim in dims if tensor.shape[dim] == self.samples]
        several = [dim for dim in dims if multiples and self.samples > 1 and tensor.shape[dim] % self.samples == 0]
        return next(iter([*exact, *(dim for dim in several if tensor.shape[dim])]), None)


def _compared(one: Sequence[_Slope], two: Sequence[_Slope]) -> Finding:
    """How slopes at the samples of a batch answer to its repetition."""
    scale = max(float(slope.gradient.abs().max()) for slope in one)
    rows = []
    for before, after in zip(one, two, strict=True):
        assert before.dim is not None
        rows.append([g.to(_wide(g)) / scale for g in (before.gradient, *after.gradient.chunk(2, before.dim))])
    if not any(second.any() for *_, second in rows):
        raise _UnclearError("the loss reads some of what the model returns by its place in the batch", last=True)
    size = sum(_energy(g) for g, *_ in rows)
    factor = sum(float(torch.vdot(g.flatten(), copy.flatten()).real) for g, *copies in rows for copy in copies) / size
    off = sum(_energy(copy - factor / 2 * g) for g, *copies in rows for copy in copies)
    precision = max(torch.finfo(slope.gradient.dtype).eps for slope in one)
    return _exact("the loss's gradient", factor, (2 * off / size) ** 0.5, max(EXACT, 8 * precision))


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.complex128 if tensor.is_complex() else torch.float64


def _energy(tensor: Tensor) -> float:
    return float(tensor.to(_wide(tensor)).abs().square().sum())


def _exact(of: str, factor: float, spread: float, rounding: float) -> Finding:
    """By a factor that is known but for rounding, and how far single entries are from it."""
    for reduction, expected in FACTORS.items():
        if max(abs(factor - expected), spread) < rounding * expected:
            return Finding(reduction)
    how = f"by {factor:.4g}" if spread < rounding * abs(factor) else "by another factor at each sample"
    return Finding(None, f"repeating a batch multiplies {of} {how}; a mean over samples gives 1, a sum gives 2", True)


def _averaged(of: str, factor: float) -> Finding:
    """By an average over noise."""
    for reduction, expected in FACTORS.items():
        if 1 / ROUGH < factor / expected < ROUGH:
            return Finding(reduction)
    return Finding(
        None,
        f"repeating a batch multiplies {of} by about {factor:.2g}, on average over what it draws at random; a mean "
        "over samples gives 1, a sum gives 2",
        True,
    )
