"""Batches that wait for others, so that products which are larger than what they are made of are taken less often.

The products of a convolution with many channels and few positions are far more numbers than its images, and adding them
up batch by batch takes longer than to multiply.
"""

from collections.abc import Iterable
from fractions import Fraction

from dagrow.statistics._captures import Batch, Capture
from dagrow.statistics._heldout_scores import SampleScores
from dagrow.statistics._kept_rows import FeaturePair

MOST = 2**23  #: entries that wait; where sums take much more, such a part of these
PART = 8


class WaitingBatches:
    """What batches left at some layers, in memory of their own, until it is as much as the sums that it goes into."""

    def __init__(self) -> None:
        self.pairs: list[FeaturePair] = []
        self._batches: list[Batch] = []
        self._sums = 0

    def begin(self, pairs: Iterable[FeaturePair], first: Batch) -> None:
        """Chooses the pairs that wait: those with more sums than the first batch leaves for them.

        Args:
            pairs: of features.
            first: a batch with samples of all folds, such as will follow.
        """
        one = first.subset(slice(0, 1))
        for x, y in pairs:
            if isinstance(x, SampleScores):
                continue
            sums = first.folds * x.entries(one) * y.entries(one)
            if sum(first[edge].entries for edge in {*x.edges, *y.edges}) < sums:
                self.pairs.append((x, y))
                self._sums += sums

    def add(self, batch: Batch) -> list[Batch]:
        """One batch more.

        Args:
            batch: what was left there.

        Returns:
            What need not wait any longer: batches as one, as soon as they are enough.
        """
        edges = {edge for pair in self.pairs for feature in pair for edge in feature.edges}
        if not edges:
            return []
        captures = {edge: Capture.joined([batch[edge]]) for edge in edges}
        own = Batch(captures, batch.samples, batch.seen, batch.folds)
        done = [] if all(_alike(each, own) for each in self._batches[-1:]) else self.rest()
        self._batches.append(own)
        waiting = sum(capture.entries for each in self._batches for capture in each.captures.values())
        most = min(self._sums, max(MOST, self._sums // PART))
        return done if waiting < most else [*done, *self.rest()]

    def rest(self) -> list[Batch]:
        """All that wait, as one; they then wait no longer."""
        batches, self._batches = self._batches, []
        if not batches:
            return []
        first, samples = batches[0], sum(batch.samples for batch in batches)
        captures = {edge: Capture.joined([batch[edge] for batch in batches]) for edge in first.captures}
        return [Batch(captures, samples, first.seen, first.folds)]


def _alike(batch: Batch, other: Batch) -> bool:
    """Whether two batches hold as much of each sample."""

    def of_sample(capture: Capture, samples: int) -> tuple[object, ...]:
        rows = Fraction(len(capture.inputs), samples), Fraction(capture.output_shape[0], samples)
        return (*rows, capture.sizes, capture.output_goal is None, capture.input_goal is None)

    pairs = ((batch[edge], other[edge]) for edge in batch.captures)
    return all(of_sample(x, batch.samples) == of_sample(y, other.samples) for x, y in pairs)
