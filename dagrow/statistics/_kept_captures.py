"""What batches left at layers, kept from pass to pass while it is small, so that later passes need not run the model.

Of the network as it is, and of the preview that was measured last. A preview does not change the function, so the goals
in it are those of the network as it is: it runs forward only.
"""

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from dagrow.statistics._batches import mark_of
from dagrow.statistics._calls import Calls
from dagrow.statistics._captures import Capture
from dagrow.statistics._features import Feature

LEAST = 2**27  #: bytes that may be kept; of large models twice what their parameters take, as an optimizer takes
SAME = 1e-4  #: a relative difference of a batch's losses that is rounding


@dataclass(frozen=True, eq=False)
class LeftBatch:
    """What one batch left.

    Attributes:
        calls: at each layer, call by call.
        views: the same, calls of the same sizes joined, samples first.
        samples: how many.
        loss: the sum over them.
        units: the number of the group that each is of, if there are groups.
        ran: whether the model's own forward did.
        mark: by which the batch is known again, see :func:`mark_of`.
    """

    calls: Calls
    views: Sequence[Mapping[str, Capture]]
    samples: int
    loss: float
    units: Tensor | None
    ran: bool
    mark: int | None

    def tensors(self) -> Iterator[Tensor]:
        """All that it holds."""
        captures = [capture for calls in self.calls.values() for capture in calls]
        for capture in (*captures, *(capture for view in self.views for capture in view.values())):
            yield from (t for t in (capture.inputs, capture.output_goal, capture.input_goal) if t is not None)

    def is_of(self, batch: object, loss: float) -> bool:
        """Whether it is what this batch left, in a network of the same function, where the sum of its losses is that.

        Args:
            batch: in a later pass.
            loss: the sum.

        Returns:
            Not where the loader gives other batches in each pass, or the same samples in another order.
        """
        mark = mark_of(batch)
        return mark is not None and mark == self.mark and abs(self.loss - loss) <= SAME * abs(loss)

    @property
    def is_unchanged(self) -> bool:
        """Whether nothing has been written into what layers read."""
        return all(capture.inputs._version == capture.version for view in self.views for capture in view.values())


@dataclass(eq=False)
class Record:
    """What the batches of one pass left, if it is not too much.

    Attributes:
        key: what was in the network, besides what it is.
        places: the edges that were captured, those with goals at their outputs, and those with goals at their inputs.
        most: bytes.
        batches: one after the other.
        ended: whether there are no more.
    """

    key: frozenset[Hashable]
    places: tuple[frozenset[str], frozenset[str], frozenset[str]]
    most: int
    batches: list[LeftBatch] = field(default_factory=list)
    ended: bool = False
    _sizes: dict[int, int] = field(default_factory=dict)

    def add(self, batch: LeftBatch) -> None:
        """Keeps a batch; none any more once they are too much, or share memory, which may be written for each anew."""
        if self.most <= 0:
            return
        storages = [tensor.untyped_storage() for tensor in batch.tensors() if tensor.numel()]
        sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
        shared = self._sizes.keys() & sizes.keys()
        self.batches.append(batch)
        self._sizes |= sizes
        if shared or sum(self._sizes.values()) > self.most:
            self.most, self.batches = 0, []

    @property
    def complete(self) -> bool:
        """Whether all batches are kept."""
        return self.ended and self.most > 0

    def covers(self, features: Iterable[Feature]) -> bool:
        """Whether it holds what these features are computed from."""
        wanted = _places(features)
        return self.complete and all(map(frozenset.issubset, wanted, self.places))


class KeptCaptures:
    """What is kept for the passes of one call.

    Args:
        model: which is measured; None keeps nothing.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        parameters = 0 if model is None else sum(p.numel() * p.element_size() for p in model.parameters())
        self.most = 0 if model is None else max(LEAST, 2 * parameters)
        self.plain: Record | None = None
        self.preview: Record | None = None

    def record(self, key: Iterable[Hashable], features: Iterable[Feature]) -> Record:
        """What a pass is kept in that is about to begin; of the network as it is, or of the preview that is newest.

        Args:
            key: what is in the network, besides what it is.
            features: what is measured.

        Returns:
            An empty record.
        """
        record = Record(frozenset(key), _places(features), self.most)
        if record.key:
            self.preview = record
        else:
            self.plain = record
        return record

    def find(self, key: Iterable[Hashable], features: Iterable[Feature]) -> Sequence[LeftBatch] | None:
        """What all batches left in an earlier pass, if it was kept.

        Args:
            key: what is in the network, besides what it is.
            features: what is to be computed from it.

        Returns:
            The batches, or None.
        """
        wanted = frozenset(key)
        record = self.preview if wanted else self.plain
        if record is None or not record.covers(features) or not wanted <= record.key:
            return None
        return record.batches if all(batch.is_unchanged for batch in record.batches) else None

    def shows(self, key: Iterable[Hashable]) -> bool:
        """Whether the last pass with a preview came to its end with all of this in the network.

        Args:
            key: what is in the network.

        Returns:
            Also where what it left was too much to be kept.
        """
        return self.preview is not None and self.preview.ended and frozenset(key) <= self.preview.key

    def goals(self, features: Iterable[Feature]) -> Sequence[LeftBatch] | None:
        """The network as it is, for the goals that features need, where its layers were called once.

        Args:
            features: what is to be measured in a preview.

        Returns:
            The batches, or None.
        """
        _, goals, input_goals = _places(features)
        if self.plain is None or not self.plain.complete or input_goals or not goals <= self.plain.places[1]:
            return None
        once = all(len(calls) == 1 for batch in self.plain.batches for calls in batch.calls.values())
        return self.plain.batches if once else None

    def drop(self) -> None:
        """Keeps nothing any more."""
        self.most, self.plain, self.preview = 0, None, None


def _places(features: Iterable[Feature]) -> tuple[frozenset[str], frozenset[str], frozenset[str]]:
    """Edges, those with goals at their outputs, and at their inputs."""
    features = list(features)
    return (
        frozenset(edge for feature in features for edge in feature.edges),
        frozenset(edge for feature in features for edge in feature.goals),
        frozenset(edge for feature in features for edge in feature.input_goals),
    )
