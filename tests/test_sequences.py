"""Random sequences of growths, training, undoing, copies and files, on random DAGs; the laws hold after each step."""

from __future__ import annotations

import contextlib
import copy
import os
import pickle
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import replace as with_fields
from pathlib import Path
from typing import Any

import dags
import torch
from hypothesis import HealthCheck, Phase, event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn
from torch.optim import Optimizer

import dagrow
from dagrow import AddConnection, AddLayer, AddNeurons, DagrowError, Growth, MoveWeights, Receipt, RemoveNeurons
from dagrow.operators import Operator
from dagrow.statistics import Objective
from dagrow.surgery._draft import pad
from dagrow.surgery._optimizers import carry
from dagrow.testing import check_descent, check_drop, check_slope, gentle
from dagrow.testing._snapshots_and_slopes import assert_close, same, snapshot

EXAMPLES = int(os.environ.get("LAW_EXAMPLES", "0"))  # more than CI's, and other ones each time
STEPS = 8
MODES = ("eval", "train")
GAMMAS = (0.0, 0.01, 0.1, 0.3, 1.0, -0.1)
OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Optimizer | None]] = {
    "none": lambda parameters: None,
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.02, momentum=0.9),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, amsgrad=True),
}
#: what may be refused -> whether the dag gives a reason to
REFUSALS: dict[str, Callable[[dagrow.Dag], bool]] = {
    "no axis can grow": lambda dag: not any(axis.growable for axis in dag.axes),
    "no axis can lose units": lambda dag: not any(axis.growable and axis.consumers for axis in dag.axes),
    "a zero does not stay zero": lambda dag: bool({"Sigmoid", "Softplus"} & _activations(dag)),
}

ridges, folds = st.sampled_from((None, 0.0, 1e-3)), st.sampled_from((1, 1, 3))
activations = st.sampled_from((nn.Tanh(), nn.ReLU(), nn.GELU(), nn.Sigmoid()))
moves = st.builds(MoveWeights, ridge=ridges, folds=folds)
neurons = st.builds(
    AddNeurons,
    k=st.integers(1, 3),
    solver=st.sampled_from(("sequential", "joint", "unprojected", "als")),
    init=st.sampled_from(("optimal", "optimal", "random_features", "random", "gradmax", "copy", "zero")),
    paired=st.booleans(),
    ridge=ridges,
    folds=folds,
    seed=st.integers(0, 9),
)
connections = st.builds(
    AddConnection, rank=st.sampled_from((None, 1, 2)), kernel=st.integers(1, 3), ridge=ridges, folds=folds
)
layers = st.builds(
    AddLayer, k=st.integers(1, 3), activation=activations, kernel=st.integers(1, 3), ridge=ridges, folds=folds
)
scores = st.sampled_from(("refit", "refit", "magnitude", "taylor"))
removals = st.one_of(
    st.builds(RemoveNeurons, k=st.integers(1, 2), score=scores, ridge=ridges, folds=folds),
    st.builds(RemoveNeurons, score=scores, folds=st.just(3)),
)
operators = st.one_of(moves, neurons, connections, layers, removals, st.just(AddNeurons()))
GROWING = {"which": st.integers(0, 9), "gamma": st.sampled_from(GAMMAS), "handed": st.booleans()}


def _activations(dag: dagrow.Dag) -> set[str]:
    return {type(module).__name__ for module in dag.model.modules()}


class Traced(nn.Module):
    """The graph of a dag as a model."""

    def __init__(self, dag: dagrow.Dag) -> None:
        super().__init__()
        self.model, self.dag = dag.model, dag

    def forward(self, *args: Any) -> Tensor:
        return self.dag.program.run(*args)


@dataclass(eq=False)
class Applied:
    """A growth in place, and how things were before it.

    Attributes:
        handed: whether the optimizer was passed.
        trained: whether weights or the optimizer's state have moved since.
    """

    dag: dagrow.Dag
    receipt: Receipt
    handed: bool
    before: Mapping[str, Any]
    outputs: Mapping[str, Tensor]
    outside: frozenset[str]
    halfway: nn.Module
    training: bool
    trained: bool = False

    @property
    def touched(self) -> set[int]:
        """The parameters and buffers that were there and that the growth has written."""
        changes = [part.growth.change for part in self.receipt.parts if part.growth is not None]
        names = {name for change in changes for name in change.final.names}
        return {self.before["tensors"][name][0] for name in names & self.before["tensors"].keys()}

    def expected(self, now: Mapping[str, Any]) -> Mapping[str, Any]:
        """What undo leaves: all as it was; after training, what the growth has written as it was, all else as it is."""
        if not self.trained:
            return self.before
        touched, before = self.touched, self.before
        tensors = {name: old if old[0] in touched else now["tensors"][name] for name, old in before["tensors"].items()}
        held = now["optimizer"]
        if held is not None and self.handed:
            moved = dict(held.values())
            held = {
                at: (key, state if key in touched else moved[key]) for at, (key, state) in before["optimizer"].items()
            }
        return {**before, "tensors": tensors, "optimizer": held, "random": now["random"]}


class Sequences(RuleBasedStateMachine):
    """A model of linear layers with all that can happen to it."""

    plans = dags.plans()
    case: dagrow.testing.Case

    # ---------------------------------------------------------------- what can happen

    @initialize(data=st.data(), optimizer=st.sampled_from(tuple(OPTIMIZERS)))
    def start(self, data: st.DataObject, optimizer: str) -> None:
        self.case, self.kind, self.applied = dags.built(data.draw(self.plans)), optimizer, list[Applied]()
        self.origin = copy.deepcopy(self.case.model)
        self._take(dagrow.trace(self.case.model, self._example))

    @rule(operator=moves, **GROWING)
    def move(self, operator: Operator, which: int, gamma: float, handed: bool) -> None:
        self._grow(operator, which, gamma, handed)

    @rule(operator=neurons, **GROWING)
    def widen(self, operator: Operator, which: int, gamma: float, handed: bool) -> None:
        self._grow(operator, which, gamma, handed)

    @rule(operator=connections, **GROWING)
    def connect(self, operator: Operator, which: int, gamma: float, handed: bool) -> None:
        self._grow(operator, which, gamma, handed)

    @rule(operator=layers, **GROWING)
    def lay(self, operator: Operator, which: int, gamma: float, handed: bool) -> None:
        self._grow(operator, which, gamma, handed)

    @rule(operator=removals, **GROWING)
    def narrow(self, operator: Operator, which: int, gamma: float, handed: bool) -> None:
        self._grow(operator, which, gamma, handed)

    @rule(operators=st.lists(operators, min_size=1, max_size=2), handed=st.booleans())
    def search(self, operators: Sequence[Operator], handed: bool) -> None:
        before = self._reported_loss()
        if handed:
            self._catch_up()
        with self._refused():
            entry = self._grown(handed, lambda optimizer: self._searched(operators, optimizer))
            removes = any(isinstance(operator, RemoveNeurons) for operator in operators)
            assert removes or entry.receipt.loss_after <= before * (1 + 1e-12)
            assert_close(
                self._reported_loss(), entry.receipt.loss_after, "the loss after a search", rtol=1e-9, atol=1e-12
            )

    @rule(steps=st.integers(1, 3), mode=st.sampled_from(MODES))
    def train(self, steps: int, mode: str) -> None:
        found, parameters = self.model.training, list(self.model.parameters())
        self.model.train(mode == "train")
        for step in range(steps):
            self.model.zero_grad()
            inputs, target = self.case.batches[step % 2]
            self.case.loss(self.model(inputs), target).backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            self._step(parameters)
        self.model.train(found)
        self._moved()

    @precondition(lambda self: self.applied)
    @rule()
    def undo(self) -> None:
        self._undo()

    @rule(mode=st.sampled_from(MODES))
    def switch(self, mode: str) -> None:
        self.model.train(mode == "train")

    @rule()
    def trace_again(self) -> None:
        found = dagrow.trace(self.model, self._example)
        self._looks_alike(found)
        self.dag = found

    @rule(how=st.sampled_from((copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both)))))
    def go_on_with_a_copy(self, how: Callable[[Any], Any]) -> None:
        self._catch_up()
        dag, optimizer = how((self.dag, self.optimizer))
        self._go_on(dag, optimizer)

    @rule(data=st.data())
    def go_on_with_what_was_saved(self, data: st.DataObject) -> None:
        starts = [self.origin, *(entry.halfway for entry in self.applied)]
        model = copy.deepcopy(starts[data.draw(st.integers(0, len(starts) - 1))])
        with tempfile.TemporaryDirectory() as folder:
            dagrow.save(self.dag, Path(folder, "grown.pt"))
            dag = dagrow.load(model, Path(folder, "grown.pt"), self._example)
        self._catch_up()
        optimizer = self._optimizer(model)
        if optimizer is not None and not self.outside:
            optimizer.load_state_dict(self.optimizer.state_dict())
        self._go_on(dag, optimizer)
        self.outside = frozenset()

    # ---------------------------------------------------------------- what holds all the time

    @invariant()
    def the_graph_computes_what_the_model_computes(self) -> None:
        self.dag.check()
        for mode in MODES:
            assert_close(
                self.case.outputs(Traced(self.dag), mode), self.case.outputs(self.model, mode), mode, atol=1e-12
            )

    @invariant()
    def parameters_keep_their_identity_and_keys_are_only_added(self) -> None:
        now = {name: id(p) for name, p in self.model.named_parameters()}
        assert {name: now.get(name) for name in self.identities} == self.identities
        assert self.keys <= set(self.model.state_dict())

    def teardown(self) -> None:
        """Back through the whole sequence."""
        while getattr(self, "applied", ()):
            self._undo()

    # ---------------------------------------------------------------- how it is done

    @property
    def model(self) -> nn.Module:
        return self.dag.model

    @property
    def _example(self) -> Tensor:
        return self.case.batches[0][0][:3]

    def _take(self, dag: dagrow.Dag, optimizer: Optimizer | None = None) -> None:
        """Goes on with a dag, and an optimizer of its model."""
        self.dag, self.case = dag, with_fields(self.case, model=dag.model)
        self.optimizer = self._optimizer(dag.model) if optimizer is None else optimizer
        self.behind, self.outside = False, frozenset[str]()  # new parameters that no optimizer will take
        self.identities = {name: id(p) for name, p in dag.model.named_parameters()}
        self.keys = set(dag.model.state_dict())

    def _optimizer(self, model: nn.Module) -> Optimizer | None:
        return OPTIMIZERS[self.kind]([p for p in model.parameters() if p.requires_grad])

    def _seen(self) -> dict[str, Any]:
        return snapshot(self.dag, self.optimizer)

    def _loss(self) -> float:
        return Objective(self.model, self.case.batches, self.case.loss, mode="eval").mean()

    def _reported_loss(self) -> float:
        """The user's own, which is no mean over samples where it is a sum."""
        objective = Objective(self.model, self.case.batches, self.case.loss, mode="eval")
        return objective.reported(objective.mean())

    def _outputs_are(self, expected: Mapping[str, Tensor], what: str, atol: float = 1e-10) -> None:
        for mode in MODES:
            assert_close(self.case.outputs(self.model, mode), expected[mode], f"{what} in {mode} mode", atol=atol)

    @contextlib.contextmanager
    def _refused(self) -> Iterator[dict[str, Any]]:
        """What is refused has a reason that fits, and leaves all as it was, which is given."""
        before, refused = self._seen(), None
        try:
            yield before
        except DagrowError as error:
            refused = str(error)
        if refused is not None:
            assert any(text in refused and fits(self.dag) for text, fits in REFUSALS.items()), refused
            event(f"refused: {refused[:40]}")
            same(before, self._seen(), f"refused, as {refused}")

    def _grow(self, operator: Operator, which: int, gamma: float, handed: bool) -> None:
        """Applies one of the growths that an operator proposes, and checks it before and after."""
        growths = self._proposed(operator)
        if not growths:
            return
        growth = growths[which % len(growths)]
        self._obeys_the_laws(growth)
        gamma = gentle(growth, gamma)
        predicted, twin = growth.loss(gamma), copy.deepcopy(self.model)
        entry = self._grown(handed, lambda optimizer: growth.apply(gamma, optimizer=optimizer))
        assert_close(self._loss(), predicted, f"{growth} applied", rtol=1e-9, atol=1e-12)
        if gamma == 0:
            self._outputs_are(entry.outputs, f"{growth} applied at 0")
        entry.receipt.carry(twin)
        shapes = ({name: t.shape for name, t in model.state_dict().items()} for model in (twin, self.model))
        assert next(shapes) == next(shapes)

    def _undo(self) -> None:
        entry, now = self.applied.pop(), self._seen()
        entry.receipt.undo()
        self.dag, self.outside = entry.dag, entry.outside
        self.model.train(entry.training)
        self.behind = self.behind or not entry.handed
        same(entry.expected(now), self._seen(), f"undo of {entry.receipt}")
        if not entry.trained:
            for mode in MODES:
                assert_close(
                    self.case.outputs(self.model, mode), entry.outputs[mode], f"outputs in {mode} mode", atol=0
                )

    def _proposed(self, operator: Operator) -> list[Growth]:
        found = list[Growth]()
        with self._refused() as before:
            found = self.case.propose(operator, self.dag)
        same(before, self._seen(), f"proposals of {operator!r}")
        return found

    def _searched(self, operators: Sequence[Operator], optimizer: Optimizer | None) -> Receipt:
        return dagrow.grow(self.dag, self.case.batches, self.case.loss, operators, optimizer=optimizer)

    def _obeys_the_laws(self, growth: Growth) -> None:
        for mode in MODES:
            before = self.case.outputs(self.model, mode)
            assert_close(self.case.grown(growth, 0.0, mode), before, f"{growth} previewed in {mode} mode", atol=1e-10)
        for law in (check_slope, check_descent):
            law(growth)
        if growth.operator.folds == 1 and growth.operator.ridge == 0:
            check_drop(growth, self.case)

    def _grown(self, handed: bool, work: Callable[[Optimizer | None], Receipt]) -> Applied:
        """Grows, and notes how things were."""
        if handed:
            self._catch_up()
        found, outside, training = self.case, self.outside, self.model.training
        outputs = {mode: found.outputs(self.model, mode) for mode in MODES}
        before, halfway = self._seen(), copy.deepcopy(self.model)
        receipt = work(self.optimizer if handed else None)
        entry = Applied(self.dag, receipt, handed, before, outputs, outside, halfway, training)
        if not receipt.parts:
            same(before, self._seen(), "nothing was worth it")
            return entry
        self.applied.append(entry)
        added = {name for part in receipt.parts for name in part.growth.change.added}
        assert set(self.model.state_dict()) >= set(halfway.state_dict())
        assert added == {n for n, _ in self.model.named_parameters()} - {n for n, _ in halfway.named_parameters()}
        if handed and self.optimizer is not None:
            self._state_has_followed(entry)
        if not handed:
            self.behind = True
            for part in receipt.parts:
                self.outside |= self._left_outside(part.growth)
        return entry

    def _state_has_followed(self, entry: Applied) -> None:
        """The optimizer's state is where it was before the growth, and zero where parameters are new."""
        held = dict(entry.before["optimizer"].values())
        for name, p in self.model.named_parameters():
            for key, old in held.get(id(p), {}).items():
                kept = old
                for part in entry.receipt.parts if old.ndim else ():
                    kept = pad(kept, part.growth.change.final.index_maps.get(name, ()))
                assert torch.equal(self.optimizer.state[p][key], kept), f"{key} of {name}"

    def _left_outside(self, growth: Growth) -> set[str]:
        """New parameters beside one that no optimizer has: nobody passed one that would take them."""
        alone = {
            b
            for b in growth.change.new_paths
            if b.beside in self.outside or not self.model.get_parameter(b.beside).requires_grad
        }
        return {name for b in alone for name in growth.change.added if name.startswith(f"{b.name}.")}

    def _step(self, parameters: Sequence[nn.Parameter]) -> None:
        if self.optimizer is None:
            with torch.no_grad():
                for p in parameters:
                    p -= 0 if p.grad is None else 0.02 * p.grad
            return
        self.optimizer.step()
        self.behind = False
        held = [p for group in self.optimizer.param_groups for p in group["params"]]
        for p in held:
            assert all(s.shape in (p.shape, ()) for s in self.optimizer.state[p].values())
        wanted = [p for name, p in self.model.named_parameters() if p.requires_grad and name not in self.outside]
        assert sorted(map(id, held)) == sorted(map(id, wanted))

    def _moved(self) -> None:
        for entry in self.applied:
            entry.trained = True

    def _catch_up(self) -> None:
        """What would happen at the optimizer's next step."""
        if self.optimizer is not None and self.behind:
            carry(self.optimizer)
            self._moved()
        self.behind = False

    def _looks_alike(self, dag: dagrow.Dag) -> None:
        assert [repr(edge) for edge in dag.edges] == [repr(edge) for edge in self.dag.edges]
        for axis, other in zip(dag.axes, self.dag.axes, strict=True):
            assert (axis.name, axis.width, axis.growable) == (other.name, other.width, other.growable)

    def _go_on(self, dag: dagrow.Dag, optimizer: Optimizer | None) -> None:
        """A copy is like the model, and stays what it is while everything is undone in the model."""
        outputs, outside = {mode: self.case.outputs(self.model, mode) for mode in MODES}, self.outside
        self._looks_alike(dag)
        self.teardown()
        self._take(dag, optimizer)
        self.outside = outside
        self._outputs_are(outputs, "a copy", atol=0)


class SequencesOfImages(Sequences):
    """A model of convolutions."""

    plans = dags.plans(image=True, most=3)


PROFILE = settings(
    max_examples=EXAMPLES or 10,
    stateful_step_count=STEPS,
    derandomize=not EXAMPLES,
    deadline=None,
    database=None,
    phases=(Phase.explicit, Phase.generate),  # plans are short as they are drawn
    suppress_health_check=list(HealthCheck),
)
TestSequences = Sequences.TestCase
TestSequences.settings = PROFILE
TestSequencesOfImages = SequencesOfImages.TestCase
TestSequencesOfImages.settings = settings(PROFILE, max_examples=EXAMPLES or 5)
