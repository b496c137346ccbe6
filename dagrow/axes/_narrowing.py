"""What has to change where when units of an axis go: a widening read backwards.

In come an axis and the units that go, out goes a plan. Where their rows, columns and entries are the layout of the axis
tells. Sizes follow the width in a straight line, so that what k more units make of a size says what k fewer do: where n
becomes n', it becomes 2 n - n'. That is a proposal: before anything is written, the narrowed model is compared with the
one in which nothing reads these units.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from dagrow.axes._grouping import AxisLayout
from dagrow.axes._index_map import CannotWidenError, IndexMap, drop_units
from dagrow.axes._label_interpreter import Values, located, name_of
from dagrow.axes._label_tensors import NO_CHANNEL
from dagrow.axes._size_rewriting import Arguments
from dagrow.axes._widening import WideningPlan, widen
from dagrow.layers import LayerSite
from dagrow.tracing import Program


def narrow(program: Program, layers: Mapping[fx.Node, LayerSite], layout: AxisLayout, units: Tensor) -> WideningPlan:
    """Plans an axis without some of its units. Changes nothing.

    Args:
        program: the graph of the model's forward.
        layers: its layers, as :func:`labelled` gives them.
        layout: of the axis.
        units: those that go, each once ``[k]``.

    Returns:
        A plan whose maps drop entries.

    Raises:
        CannotWidenError: the model cannot do without them; the message is the reason.
    """
    if not 0 < len(units) <= layout.width - layout.least:
        raise CannotWidenError(f"it is {layout.width} wide, and {layout.least} have to stay")
    wider = widen(program, layers, layout, len(units))
    attributes = {
        name: {key: _Mirror().of(getattr(program.model.get_submodule(name), key), size) for key, size in sizes.items()}
        for name, sizes in wider.attributes.items()
    }
    return WideningPlan(
        {edge: _dropped(places, units, wider.rows[edge]) for edge, places in layout.rows.items()},
        {edge: _dropped(places, units, wider.columns[edge]) for edge, places in layout.columns.items()},
        {rider: _dropped_along(of, units, wider.entries[rider]) for rider, of in layout.entries.items()},
        {node: _mirrored(node, arguments, layout.labelling.values) for node, arguments in wider.literals.items()},
        attributes,
        wider.written,
    )


def _dropped(places: Tensor, gone: Tensor, wider: IndexMap) -> IndexMap:
    """Of a layer whose channels of each unit are at these places ``[U, slots]``."""
    units = torch.full((len(wider.old),), NO_CHANNEL)
    units[places] = torch.arange(len(places))[:, None]
    return drop_units(units, gone, wider.dim)


def _dropped_along(units: Tensor, gone: Tensor, wider: IndexMap) -> IndexMap:
    """Of a tensor whose entries are of these units."""
    by_position = units.movedim(wider.dim, 0).reshape(units.shape[wider.dim], -1)
    return drop_units(by_position.amax(1), gone, wider.dim)  # entries that no activation reached are of none


def _mirrored(node: fx.Node, arguments: Arguments, before: Values) -> Arguments:
    """A node's arguments with as much less as these have more."""
    (args, kwargs), mirror = arguments, _Mirror(before)
    try:
        return mirror.of(tuple(node.args), tuple(args)), mirror.of(dict(node.kwargs), dict(kwargs))
    except CannotWidenError as error:
        raise CannotWidenError(located(node, f"{name_of(node)} {error}")) from error


@dataclass(frozen=True)
class _Mirror:
    """Reads a change of a size backwards.

    Attributes:
        before: of nodes, the sizes that some of them are.
    """

    before: Values | None = None

    def of(self, old: Any, new: Any) -> Any:
        """What takes the place of ``old`` where ``new`` would in a wider network.

        Args:
            old: a size, or a nest of them.
            new: the same, wider.

        Returns:
            The same, narrower.

        Raises:
            CannotWidenError: that is not a matter of sizes.
        """
        if isinstance(old, (tuple, list)) and isinstance(new, (tuple, list)):
            items = _spelt_out(old, len(new))
            if len(items) == len(new):
                return type(new)(self.of(*pair) for pair in zip(items, new, strict=True))
        if isinstance(old, dict) and isinstance(new, dict) and old.keys() == new.keys():
            return {key: self.of(old[key], new[key]) for key in old}
        if isinstance(old, slice) and isinstance(new, slice):
            return slice(*(self.of(getattr(old, end), getattr(new, end)) for end in ("start", "stop", "step")))
        if old is new or (type(old) is type(new) and old == new):
            return new
        size = self.before.get(old) if self.before is not None and isinstance(old, fx.Node) else old
        if isinstance(size, int) and isinstance(new, int) and not isinstance(size, bool):
            return 2 * int(size) - new if size != new else new
        raise CannotWidenError("would be called in another way, not with other sizes alone")


def _spelt_out(items: Any, count: int) -> list[Any]:
    """With an ellipsis written as whole dimensions, where that makes so many."""
    found = list(items)
    at = next((at for at, item in enumerate(found) if item is Ellipsis), None)
    if at is not None and len(found) <= count:
        found[at : at + 1] = [slice(None)] * (count - len(found) + 1)
    return found
