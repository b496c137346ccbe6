"""Plain values that are drawn: what happened in a step of growing, and what a dag looks like at one time."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Grown:
    """One applied growth, see :class:`dagrow.Growth` and :class:`dagrow.Receipt`.

    Attributes:
        operator: its ``repr``.
        parameters, flops: what it added.
    """

    where: str
    operator: str
    neurons: int
    gain: float
    heldout_gain: float | None
    gamma: float
    loss_before: float
    loss_after: float
    parameters: int
    flops: int
    heldout_error: float | None = None
    p_value: float | None = None


@dataclass(frozen=True)
class Record:
    """One step of a :class:`dagrow.Grower`, as a rule after an epoch of training.

    Attributes:
        epoch: as it was given.
        seconds: since the grower was made.
        train_loss, validation_loss: before growing; the second is None without batches for validation.
        asked: whether growing was asked for.
        share: the part of all goals that no layer's own weights can follow, before growing; None where it was not
            measured, which it is when growing is asked for.
        grown: what was applied, first to last.
        widths: of the axes that can grow, after growing.
        parameters, flops: of the whole model, after growing.
        left_out: places that failed meanwhile, each with the reason.
    """

    epoch: int
    seconds: float
    train_loss: float
    validation_loss: float | None
    asked: bool
    share: float | None
    grown: tuple[Grown, ...]
    widths: Mapping[str, int]
    parameters: int
    flops: int
    left_out: tuple[str, ...] = ()

    @property
    def loss(self) -> float:
        """The validation loss, or the training loss where there is none."""
        return self.train_loss if self.validation_loss is None else self.validation_loss

    @property
    def added(self) -> tuple[Grown, ...]:
        """What was applied and added parameters."""
        return tuple(grown for grown in self.grown if grown.parameters)


@dataclass(frozen=True)
class Activation:
    """A node of a dag.

    Attributes:
        name: of the node in the graph.
        label: the axis that it is, where there is one, or "input" or "output".
        width: the units of the axis, or the channels.
    """

    name: str
    label: str
    width: int


@dataclass(frozen=True)
class Link:
    """An edge of a dag, from one activation to another that its output reaches.

    Attributes:
        edge: the layer's name.
        kind: the layer's type.
        source, target: names of activations.
        parameters: of the layer.
    """

    edge: str
    kind: str
    source: str
    target: str
    parameters: int


@dataclass(frozen=True)
class Snapshot:
    """Activations and links of a dag.

    Attributes:
        epoch: after whose growth it was taken, or None for the beginning.
        widths: of the axes that can grow.
    """

    epoch: int | None
    activations: tuple[Activation, ...]
    links: tuple[Link, ...]
    widths: Mapping[str, int]
