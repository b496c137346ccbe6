"""Axes: the hidden widths between weighted layers, and what new units can start as there."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from dagrow.axes import AxisLayout, Rider, widen
from dagrow.graph._edges import Edge
from dagrow.graph._position_map import PositionMap, position_maps
from dagrow.graph._position_tracker import Traced


@dataclass(frozen=True)
class Axis:
    """One hidden width: all the channels that must grow together.

    Attributes:
        name: the names of those producers that were there first: it stays as it is when new paths join.
        width: its number of units (a unit is one channel, or several that can only grow together).
        producers: the edges that write it.
        consumers: the edges that read it, in any of the examples.
        riders: what carries one entry per channel on the way.
        growable: whether it can widen.
        reason: why not, or None.
        traced: what was read off the model that it is of.
    """

    name: str
    width: int
    producers: tuple[Edge, ...]
    consumers: tuple[Edge, ...]
    riders: tuple[Rider, ...]
    growable: bool
    reason: str | None
    layout: AxisLayout = field(repr=False, compare=False)
    traced: Traced = field(repr=False, compare=False)

    @property
    def elsewhere(self) -> tuple[str, ...]:
        """Layers beside it that other examples run, not the first: they widen along, and are not measured."""
        return tuple(name for name in self._names if name in self.layout.labelling.elsewhere)

    @property
    def measured(self) -> "Axis":
        """The axis as the first example shows it, without the layers that only others run."""
        elsewhere = self.elsewhere
        if not elsewhere:
            return self
        producers, consumers = (
            tuple(edge for edge in edges if edge.name not in elsewhere) for edges in (self.producers, self.consumers)
        )
        riders = tuple(rider for rider in self.riders if rider.name not in elsewhere)
        return replace(self, producers=producers, consumers=consumers, riders=riders)

    @property
    def shared(self) -> str | None:
        """Why no closed form holds for it: a layer beside it does not act once on each sample; or None."""
        shared = self.layout.labelling.shared
        there = self.measured
        if not there.producers or (self.consumers and not there.consumers):
            return shared[self.elsewhere[0]]
        return next((why for name in there._names if (why := shared.get(name))), None)

    @property
    def _names(self) -> list[str]:
        return [edge.name for edge in (*self.producers, *self.consumers)] + [rider.name for rider in self.riders]

    @cached_property
    def writings(self) -> tuple["Writing", ...]:
        """The choices of producers for a new unit, and how it arrives where it is read.

        On a residual stream producers write at different depths: a new unit is written by one of them, and the others
        write zero. Producers whose output arrives everywhere in the same way write it together.
        """
        grouped: dict[tuple, list[tuple[Edge, Mapping[str, PositionMap | None], str | None]]] = {}
        for producer in self.producers:
            arrivals, mixing = position_maps(self.traced, self.layout, producer, self.consumers)
            aligned = all(a is None or a.is_identity for a in arrivals.values())
            key = tuple(None if a is None else a.positions for a in arrivals.values()) if aligned else (producer.name,)
            grouped.setdefault(key, []).append((producer, arrivals, mixing))
        return tuple(
            Writing(tuple(producer for producer, _, _ in group), group[0][1], group[0][2]) for group in grouped.values()
        )

    @property
    def inits(self) -> tuple[str, ...]:
        """What new units can start as, of the initialisations of ``AddNeurons``; none where the axis cannot grow."""
        return tuple(init for init in INITS if self.growable and init not in self.other_inits)

    @cached_property
    def other_inits(self) -> Mapping[str, str]:
        """The other initialisations, and why new units cannot start so."""
        if not self.growable:
            return dict.fromkeys(INITS, str(self.reason))
        if not self.consumers:
            why = "no layer reads it: the channels meet in a product of two layers, where no fan-out can be fitted"
            return dict.fromkeys(_BUT_ZERO, why)
        if self.shared:
            return dict.fromkeys(INITS[:-2], f"no closed form holds for it: {self.shared}")
        return self._beyond_theory

    @property
    def _beyond_theory(self) -> dict[str, str]:
        """Of an axis that layers read, in closed form, the initialisations that do not fit."""
        writings = self.measured.writings
        linear = [any(a is not None for a in writing.arrivals.values()) for writing in writings]
        if not any(linear) and widen(self.traced.program, self.traced.every_layer, self.layout, 1).silent:
            return dict.fromkeys(_BUT_ZERO, "what layers read of a new unit has to start at zero")
        mixing = next((writing.mixing for writing in writings if writing.mixing), "the forward")
        why = f"{mixing} computes with several positions together, which linear theory does not follow"
        return {init: why for init, fits in (("optimal", any(linear)), ("gradmax", linear[0])) if not fits}


#: what new units can start as, see ``AddNeurons``
INITS = ("optimal", "random_features", "random", "gradmax", "zero", "copy")

_BUT_ZERO = tuple(init for init in INITS if init != "zero")


@dataclass(frozen=True, eq=False)
class Writing:
    """Producers that write a new unit together, and how it arrives.

    Attributes:
        producers: all whose output arrives everywhere in the same way.
        arrivals: consumer -> how the unit arrives, or None where linear theory does not reach.
        mixing: what it meets on the way that linear theory does not follow, with the user's line; or None.
    """

    producers: tuple[Edge, ...]
    arrivals: Mapping[str, PositionMap | None]
    mixing: str | None = None


def axes_of(
    edges: Mapping[str, Edge], reasons: Mapping[AxisLayout, str | None], new: Sequence[str], traced: Traced
) -> Iterator[Axis]:
    """Axes, named after their oldest producers; a number tells apart those of the same producers.

    Args:
        edges: by their names.
        reasons: why the axis of each layout cannot widen, or None.
        new: the modules that growths have put into the model, oldest first.
        traced: what was read off the model.

    Yields:
        One axis for each layout.
    """
    base = ["+".join(_oldest(layout.rows, new)) for layout in reasons]
    for index, (layout, why) in enumerate(reasons.items()):
        name = base[index] if base.count(base[index]) == 1 else f"{base[index]}[{base[:index].count(base[index])}]"
        producers, consumers = (tuple(edges[edge] for edge in sides) for sides in (layout.rows, layout.columns))
        yield Axis(name, layout.width, producers, consumers, tuple(layout.entries), why is None, why, layout, traced)


def _oldest(names: Iterable[str], new: Sequence[str]) -> list[str]:
    """Of layers those of the model as it was at first, or else of the module that was put into it before the others."""
    ages = {name: new.index(module) if (module := name.partition(".")[0]) in new else -1 for name in names}
    return [name for name, age in ages.items() if age == min(ages.values())]
