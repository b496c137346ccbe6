"""How a parameter has grown, for optimizers that keep state of how it was.

A log belongs to one parameter, is an attribute of it, and goes with it. Copies and pickles of a parameter have none:
their optimizers are copied with them.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter_ns
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dagrow.axes import IndexMap
from dagrow.surgery._draft import laid_out

_ATTRIBUTE = "_growth_log"


@dataclass(frozen=True, eq=False)
class Resize:
    """One growth of a parameter, or its undoing."""

    before: torch.Size
    after: torch.Size
    index_maps: Sequence[IndexMap]
    undone: bool

    def undoes(self, other: "Resize") -> bool:
        return self.undone and not other.undone and self.index_maps == other.index_maps

    @property
    def drops(self) -> bool:
        """Whether entries go, so that a shape that comes back later holds others."""
        return any(len(at.kept) < len(at.old) for at in self.index_maps)

    def follow(self, places: Tensor) -> Tensor:
        """Numbers of entries of the shape before brought to the one after, with -1 at entries that are new there."""
        index = [torch.arange(size) for size in self.before]
        index_after = [torch.arange(size) for size in self.after]
        for at in self.index_maps:
            kept, landed = (at.landed, at.kept) if self.undone else (at.kept, at.landed)
            index[at.dim], index_after[at.dim] = kept, landed
        grown = places.new_full(self.after, -1)
        grown[_grid(index_after, places)] = places[_grid(index, places)]
        return grown


def _less_undone(resizes: Sequence[Resize]) -> list[Resize]:
    """Without those that were undone, and their undoing."""
    left: list[Resize] = []
    for resize in resizes:
        if left and resize.undoes(left[-1]):
            left.pop()
        else:
            left.append(resize)
    return left


def _grid(index: Sequence[Tensor], like: Tensor) -> tuple[Tensor, ...]:
    return torch.meshgrid(*(at.to(like.device) for at in index), indexing="ij")


@dataclass(eq=False)
class GrowthLog:
    """What happened to a parameter.

    Attributes:
        resizes: its growths, oldest first, less those that no shape leads to any more.
        dropped: how many those are.
        versions: optimizer -> the version of the parameter that its state is of.
        new: new parameters of new layers, to be optimized with this one.
        beside: of a new parameter, the one that it is optimized with.
        model: of a new parameter, the model that it is in.
        removed: whether it was new and has been taken out again.
        since: when the log was opened, by a clock.
        informed: optimizers that know all that is noted here.
    """

    resizes: list[Resize] = field(default_factory=list)
    dropped: int = 0
    versions: WeakKeyDictionary[Optimizer, int] = field(default_factory=WeakKeyDictionary)
    new: list[ref[Tensor]] = field(default_factory=list)
    beside: ref[Tensor] | None = None
    model: ref[nn.Module] | None = None
    removed: bool = False
    since: int = field(default_factory=perf_counter_ns)
    informed: set[ref[Optimizer]] = field(default_factory=set)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """What a copy or a pickle holds in its place: something empty that every reader of pickles knows."""
        return OrderedDict, ()

    @property
    def version(self) -> int:
        return self.dropped + len(self.resizes)

    def add(self, resize: Resize) -> None:
        self.informed.clear()
        last = self.resizes[-1] if self.resizes else None
        if last is not None and last.after == resize.after:
            return  # an interrupted undo runs twice
        if last is not None and resize.undoes(last) and self.version not in self.versions.values():
            self.resizes.pop()  # nobody saw it
            return
        self.resizes.append(resize)
        if any(other.drops for other in self.resizes):
            return
        newest = {resize.before: index for index, resize in enumerate(self.resizes)}
        unreachable = min(newest.values())
        self.dropped, self.resizes = self.dropped + unreachable, self.resizes[unreachable:]

    def start(self, shape: torch.Size, version: int | None = None) -> int | None:
        """The first resize that state of this shape has still to follow; None if no version had the shape.

        Args:
            shape: of the state.
            version: that it is of; if that is not known, it is of the newest of that shape.

        Returns:
            Its number.
        """
        if version is not None and version >= self.dropped:
            at = version - self.dropped
            if at == len(self.resizes) or self.resizes[at].before == shape:
                return at
        shapes = [*(resize.before for resize in self.resizes), self.resizes[-1].after]
        found = [at for at, other in enumerate(shapes) if other == shape]
        return found[-1] if found else None

    def follow(self, state: Tensor, version: int | None, first: Tensor) -> Tensor:
        """State of a version, or of one of its shape, brought to the present one.

        Args:
            state: of a shape that the parameter has or had.
            version: that it is of, if that is known.
            first: what new entries start with, in the present shape.

        Returns:
            State in the present shape.
        """
        start = self.start(state.shape, version)
        resizes = _less_undone(self.resizes[len(self.resizes) if start is None else start :])
        if not resizes:
            return state
        places = torch.arange(state.numel(), device=state.device).reshape(state.shape)
        for resize in resizes:
            places = resize.follow(places)
        entries = state.reshape(-1)[places.clamp(min=0)]
        return laid_out(state, places.shape).copy_(torch.where(places < 0, first.to(state), entries))

    def is_behind(self, optimizer: Optimizer) -> bool:
        """Whether an optimizer's state is of an earlier version."""
        return bool(self.resizes) and self.versions.get(optimizer) != self.version


def log_of(parameter: Tensor) -> GrowthLog | None:
    """The log of a parameter, if anything has happened to it."""
    log = vars(parameter).get(_ATTRIBUTE)
    return log if isinstance(log, GrowthLog) else None


def opened_log(parameter: Tensor) -> GrowthLog:
    """The log of a parameter, a new one if there is none."""
    log = log_of(parameter)
    if log is None:
        log = vars(parameter)[_ATTRIBUTE] = GrowthLog()
    return log
