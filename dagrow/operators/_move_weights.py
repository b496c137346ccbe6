"""``MoveWeights``: the best move of a layer's own weights, without changing the architecture."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from dagrow.errors import GrowthError
from dagrow.graph import Dag, Edge
from dagrow.operators._base import Candidate, Needs, Operator, Steps, check_names, scored
from dagrow.solvers import RIDGES, Moments, Move, best_move, validate_move
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
        return [Candidate(edge.name, partial(self._move, dag, edge)) for edge in self._edges(dag)]

    def _edges(self, dag: Dag) -> list[Edge]:
        if self.edges is None:
            return [edge for edge in dag.edges if edge.trainable and not edge.shared]
        edges = [dag.edge(name) for name in self.edges]
        frozen = [edge.name for edge in edges if not edge.trainable]
        if frozen:
            raise GrowthError(
                f"the weights of {', '.join(frozen)} are frozen (requires_grad=False); leave them out of edges=."
            )
        shared = [edge.shared for edge in edges if edge.shared]
        if shared:
            raise GrowthError(f"no closed form moves weights that act at several places: {'; '.join(shared)}.")
        return edges

    def _move(self, dag: Dag, edge: Edge, objective: Objective) -> Steps:
        reads, goal = InputFeatures(edge.name, edge.bias), OutputGoal(edge.name)
        move, scores = self._fitted(reads, goal, (yield Needs([(reads, reads), (reads, goal)])))
        draft = Draft(dag)
        draft.move(edge, move.weights)
        growth = Growth(
            self,
            edge.name,
            0,
            move.gain,
            {edge.name: move.gain},
            Cost(),
            drop=move.drop,
            notes=(move.note,) if move.note else (),
            change=draft.change(),
            dag=dag,
            objective=objective,
        )
        return growth if scores is None else (yield from scored(growth, scores))

    def _fitted(self, reads: InputFeatures, goal: OutputGoal, m: Moments) -> tuple[Move, SampleScores | None]:
        """The move, and its scores if there are folds."""
        if m.folds == 1:
            return best_move(m, reads, goal, self.ridge or 0.0), None
        split = m.split()
        ridge = validate_move(split, reads, goal, RIDGES if self.ridge is None else (self.ridge,)).ridge
        scores = SampleScores([move_score(split, reads, goal, ridge)])
        return best_move(m, reads, goal, ridge), scores
