"""Where a network is too small: of each layer's goals the part that its own weights cannot follow."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import Any, Unpack

from rich.table import Table

from dagrow._progress import with_progress
from dagrow._text import Printable, render
from dagrow.errors import GrowthError, check_real
from dagrow.graph import Dag, Edge
from dagrow.growing._left_out import LeftOut, halves, is_of_place
from dagrow.solvers import Moments, Pair, RowProduct, explained
from dagrow.statistics import (
    DrawnSamples,
    Feature,
    InputFeatures,
    Loss,
    MeasureOptions,
    Norms,
    Objective,
    OutputGoal,
    Step,
    drawn,
    measure,
)
from dagrow.surgery import transaction

BOUNDS = "≥, ≤: rounding hides directions of what the layer reads; double precision, or a ridge, tells."
ROWS = 10  #: for each feature, with samples="auto": by chance weights follow about 1 / ROWS of a goal


@dataclass(frozen=True)
class Bottleneck:
    """What one edge cannot follow.

    Attributes:
        edge: the edge's name.
        goal: ``E|v|^2``.
        explained: the part that the best move of its own weights follows.
        bottleneck: the rest, ``E|v_perp|^2``.
        is_bound: whether weights may follow more, in directions of what the layer reads that rounding hides: the rest
            is at most this much then. Double precision, or a ridge, tells.
    """

    edge: str
    goal: float
    explained: float
    bottleneck: float
    is_bound: bool = False

    @property
    def share(self) -> float:
        """The part of the goal that is out of reach, 0 to 1."""
        return self.bottleneck / self.goal if self.goal else 0.0


class Bottlenecks(Printable, Mapping[str, Bottleneck]):
    """Bottlenecks by edge, largest first; prints as a table."""

    def __init__(
        self, bottlenecks: Iterable[Bottleneck], samples: int, loss: float, left_out: tuple[str, ...] = ()
    ) -> None:
        self._by_edge = {b.edge: b for b in sorted(bottlenecks, key=lambda b: -b.bottleneck)}
        self.samples, self.loss, self.left_out = samples, loss, left_out

    def __getitem__(self, edge: str) -> Bottleneck:
        return self._by_edge[edge]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_edge)

    def __len__(self) -> int:
        return len(self._by_edge)

    def __str__(self) -> str:
        table = Table(
            "edge",
            "goal",
            "own weights follow",
            "bottleneck",
            "share",
            title=f"{self.samples} samples, loss {self.loss:.6g}",
        )
        for b in self.values():
            least, most = ("≥ ", "≤ ") if b.is_bound else ("", "")
            sizes = f"{b.goal:.4g}", f"{least}{b.explained:.4g}", f"{most}{b.bottleneck:.4g}", f"{most}{b.share:.1%}"
            table.add_row(b.edge, *sizes)
        bounds = [BOUNDS] if any(b.is_bound for b in self.values()) else []
        return "\n".join([render(table), *bounds, *(f"Left out: {why}." for why in self.left_out)])


@with_progress
def bottlenecks(
    dag: Dag,
    batches: Iterable[Any],
    loss: Loss | None = None,
    *,
    step: Step | None = None,
    mode: str = "eval",
    ridge: float = 0.0,
    **options: Unpack[MeasureOptions],
) -> Bottlenecks:
    """Measures at every edge which part of its goal its own weights can follow. Changes nothing.

    Args:
        dag: what :func:`dagrow.trace` returned.
        batches: any re-iterable of ``(inputs, target)``.
        loss: ``loss(output, target)``, a mean or a sum over samples.
        step: ``step(model, batch)``, instead of ``loss``, for any other training step.
        mode: the mode that the model runs in, ``"eval"`` or ``"train"``.
        ridge: relative to each feature's second moment.
        options: how batches are measured, see :class:`dagrow.statistics.MeasureOptions`.

    Returns:
        Bottlenecks by edge, largest first. Edges that failed are in ``left_out``, with the reason.

    Raises:
        BatchError, LossError: the batches or the loss do not fit.
        GrowthError: no layer can be measured.
    """
    check_real("bottlenecks", 0, ridge=ridge)
    objective = objective_of(dag, batches, loss, step, mode, options)
    return transaction(dag, lambda: _bottlenecks(dag, objective, ridge))


def objective_of(
    dag: Dag, batches: Iterable[Any], loss: Loss | None, step: Step | None, mode: str, options: MeasureOptions
) -> Objective:
    """The loss on the batches. Refuses what is no dag of its model any more before anything runs."""
    if not isinstance(dag, Dag):
        raise GrowthError(
            f"a {type(dag).__name__} was given where a dag belongs; make one first: "
            "dag = dagrow.trace(model, example_inputs)."
        )
    dag.check()
    return Objective(dag.model, drawn(batches, options), loss, step=step, mode=mode, **options)


def _bottlenecks(dag: Dag, objective: Objective, ridge: float) -> Bottlenecks:
    edges = [edge for edge in dag.edges if not edge.shared]
    if not edges:
        raise GrowthError(f"no layer can be measured, as dagrow has a rule for none that acts at one place:\n{dag}")
    enough = False
    while not enough:
        left_out = LeftOut()
        measured = _measured(dag, objective, edges, ridge, left_out)
        if not measured:
            left_out.refuse()
        enough = not _enlarged(objective, measured)
    moments = measured[0][0]
    notes = (*(edge.shared for edge in dag.edges if edge.shared), *left_out.notes)
    return Bottlenecks((each for _, each in measured), moments.samples, objective.reported(moments.loss), notes)


def _enlarged(objective: Objective, measured: Sequence[tuple[Moments, Bottleneck]]) -> bool:
    """Whether more samples were drawn, as a layer's own weights may follow by chance what there are."""
    batches = objective.batches
    if not isinstance(batches, DrawnSamples) or not batches.auto:
        return False
    wanted = [
        ceil(ROWS * len(m.product(feature, feature)) / positions)
        for m in {id(m): m for m, _ in measured}.values()
        for feature, positions in m.positions.items()
        if isinstance(feature, InputFeatures) and positions
    ]
    return batches.enlarge(max(wanted, default=0))


def _measured(
    dag: Dag, objective: Objective, edges: Sequence[Edge], ridge: float, left_out: LeftOut
) -> list[tuple[Moments, Bottleneck]]:
    """In one pass, or where that fails in halves, but for the edges that fail alone."""
    keys = [(InputFeatures(edge.name, edge.bias), goal := OutputGoal(edge.name), Norms(goal)) for edge in edges]
    pairs: list[Pair] = [pair for b, v, norm in keys for pair in ((b, b), (b, v), (norm, norm))]
    try:
        m = measure(dag, objective, pairs, folds=1)
        sizes = [_sizes(m, b, v, norm, ridge) for b, v, norm in keys]
    except Exception as error:
        if isinstance(error, GrowthError):
            raise
        place = partial(is_of_place, dag=dag, objective=objective, grown=False)
        parts = halves(edges, error, left_out, lambda edge: edge.name, place)
        return [each for half in parts for each in _measured(dag, objective, half, ridge, left_out)]
    found = zip(edges, sizes, strict=True)
    return [(m, Bottleneck(e.name, goal, part, goal - part, is_bound)) for e, (goal, part, is_bound) in found]


def _sizes(m: Moments, reads: Feature, goal: Feature, norm: Feature, ridge: float) -> tuple[float, float, bool]:
    """``E|v|^2``, what weights follow of it, and whether that may be more."""
    size, S = float(m[norm, norm]), m.product(reads, reads)
    if not ridge and isinstance(S, RowProduct) and S.is_independent(m.resolution):
        return size, size, False
    return size, *explained(m, reads, goal, ridge)
