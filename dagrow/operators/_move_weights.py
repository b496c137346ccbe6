"""``MoveWeights``: the best move of a layer's own weights, without changing the architecture."""

from collections.abc import Sequence
from dataclasses import dataclass

from dagrow.errors import GrowthError
from dagrow.graph import Dag, Edge
from dagrow.operators._base import Candidate, Judged, Operator, check_names
from dagrow.solvers import RIDGES, Moments, Move, Pair, best_move, validate_move
from dagrow.statistics import InputFeatures, Objective, OutputGoal, SampleScores, move_score
from dagrow.surgery import Cost, Draft, Growth


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

    @property
    def least_neurons(self) -> None:
        return None

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
    def _features(self) -> tuple[InputFeatures, OutputGoal]:
        return InputFeatures(self.edge.name, self.edge.bias), OutputGoal(self.edge.name)

    def pairs(self) -> list[Pair]:
        reads, goal = self._features
        return [(reads, reads), (reads, goal), (goal, goal)]

    def solve(self, moments: Moments, objective: Objective) -> Growth | Candidate | None:
        reads, goal = self._features
        if moments.folds == 1:
            return self._growth(best_move(moments, reads, goal, self.operator.ridge or 0.0), objective)
        split, ridge = moments.split(), self.operator.ridge
        held = validate_move(split, reads, goal, RIDGES if ridge is None else (ridge,))
        growth = self._growth(best_move(moments, reads, goal, held.ridge), objective)
        return Judged(growth, SampleScores([move_score(split, reads, goal, held.ridge)]))

    def _growth(self, move: Move, objective: Objective) -> Growth:
        draft = Draft(self.dag)
        draft.move(self.edge, move.weights)
        return Growth(
            self.operator,
            self.edge.name,
            0,
            move.gain,
            {self.edge.name: move.gain},
            Cost(),
            drop=move.goal - move.bottleneck,
            notes=(move.note,) if move.note else (),
            change=draft.change(),
            dag=self.dag,
            objective=objective,
        )
