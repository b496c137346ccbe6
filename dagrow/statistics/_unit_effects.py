"""How much each unit of an axis does to the loss of each sample, to first order: its activation times the gradient."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from dagrow.layers import with_constant
from dagrow.statistics._captures import Batch
from dagrow.statistics._features import Derived, Feature, InputFeatures, OutputGoal


@dataclass(frozen=True, eq=False)
class UnitEffects(Derived):
    """``|sum over consumers and positions of <v, W_u b_u>|``, with the constant 1: rows ``[n, U + 1]``.

    That is by how much the loss of the sample rises, to first order, if a unit becomes zero. Source: Molchanov et al.
    2017 (Taylor).

    Attributes:
        consumers: for each what it reads, its goal, its weights ``W [o, i]``, and the features of each unit ``[U, m]``.
    """

    consumers: Sequence[tuple[InputFeatures, OutputGoal, Tensor, Tensor]] = field(repr=False)

    @property
    def sources(self) -> Sequence[Feature]:
        return [feature for reads, goal, _, _ in self.consumers for feature in (reads, goal)]

    def count(self, batch: Batch) -> int:
        return batch.samples

    def rows(self, batch: Batch) -> Tensor:
        total = sum(self._effects(batch, *consumer) for consumer in self.consumers)
        assert isinstance(total, Tensor)
        return with_constant(total.abs(), True)

    @staticmethod
    def _effects(batch: Batch, reads: InputFeatures, goal: OutputGoal, weights: Tensor, columns: Tensor) -> Tensor:
        """Of one consumer ``[n, U]``."""
        entries = reads.rows(batch) * goal.projected(batch, weights)
        by_sample = entries.reshape(batch.samples, -1, entries.shape[1]).sum(1)
        return by_sample[:, columns.to(by_sample.device)].sum(2)
