"""``MoveWeights``: the best move of a layer's own weights, without changing the architecture."""

from collections.abc import Sequence
from dataclasses import dataclass

from dagrow.dag import Dag, Edge
from dagrow.draft import Draft
from dagrow.errors import GrowthError
from dagrow.features import Goal, Reads
from dagrow.growth import Cost, Growth
from dagrow.moments import Moments, Pair
from dagrow.objective import Objective
from dagrow.operators.base import Candidate, Operator, check_names
from dagrow.solve import best_move
from dagrow.validate import RIDGES, validate_move

__all__ = ["MoveWeights"]


@dataclass(frozen=True)
class MoveWeights(Operator):
    """Equation 1: ``dW = M^T S^-1``, the regression of the goal on what the layer reads. Gain ``tr(dW M)``.

    Args:
        edges: names of the edges to consider; all whose weights are trainable by default.
        ridge: relative to each feature's second moment; None chooses it by cross-validation.
        folds: folds of the cross-validation; 1 for none.
    """

    edges: tuple[str, ...] | None = None
    ridge: float | None = None
    folds: int = 4

    def __post_init__(self) -> None:
        check_names(self, "edges")
        self.check_regularisation(self.ridge)

    def candidates(self, dag: Dag) -> Sequence[Candidate]:
        if self.edges is None:
            return [MoveCandidate(self, dag, edge) for edge in dag.edges if edge.trainable and not edge.shared]
        chosen = [dag.edge(name) for name in self.edges]
        frozen = [edge.name for edge in chosen if not edge.trainable]
        if frozen:
            raise GrowthError(
                f"the weights of {', '.join(frozen)} are frozen (requires_grad=False); leave them out of edges=."
            )
        shared = [edge.shared for edge in chosen if edge.shared]
        if shared:
            raise GrowthError(f"no closed form moves weights that act at several places: {'; '.join(shared)}.")
        return [MoveCandidate(self, dag, edge) for edge in chosen]


@dataclass(frozen=True)
class MoveCandidate(Candidate):
    """One edge."""

    operator: MoveWeights
    dag: Dag
    edge: Edge

    @property
    def _features(self) -> tuple[Reads, Goal]:
        return Reads(self.edge.name, self.edge.bias), Goal(self.edge.name)

    def pairs(self) -> list[Pair]:
        reads, goal = self._features
        return [(reads, reads), (reads, goal), (goal, goal)]

    def solve(self, moments: Moments, objective: Objective) -> Growth | None:
        reads, goal = self._features
        held, ridge = None, self.operator.ridge or 0.0
        if moments.folds > 1:
            held = validate_move(moments.split(), reads, goal, RIDGES if self.operator.ridge is None else (ridge,))
            ridge = held.ridge
        move = best_move(moments, reads, goal, ridge)
        draft = Draft(self.dag)
        draft.move(self.edge, move.weights)
        return Growth(
            self.operator, self.edge.name, 0, move.gain, {self.edge.name: move.gain}, Cost(),
            None if held is None else held.gain, None if held is None else held.error, move.goal - move.bottleneck,
            significant=held is None or held.significant, notes=(move.note,) if move.note else (),
            change=draft.change(), dag=self.dag, objective=objective,
        )  # fmt: skip
