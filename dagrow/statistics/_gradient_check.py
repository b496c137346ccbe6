"""Whether goals are all that a loss wants of a layer's weights: closed forms hold for nothing else.

``E v b^T`` has to be minus autograd's gradient of the weight. Where weights reach the loss by another way than the
layer's output it is not: derivatives by inputs are refused, penalties on weights noted. And goals have to be minus the
slope of the loss, as a finite difference shows: where something is detached, or straight-through, that is noted.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dagrow._model_state import ModelState
from dagrow.errors import LossError
from dagrow.graph import Dag, Edge
from dagrow.solvers import Pair
from dagrow.statistics._captures import Batch, Capture
from dagrow.statistics._features import Feature, InputFeatures, OutputGoal
from dagrow.statistics._objective import Objective
from dagrow.statistics._products import product
from dagrow.statistics._trials import Hooks, Ray, Trials
from dagrow.tracing import tensor_at

ROUNDING = 64  #: times what a type tells apart, relative to what is summed
ROUNDED_PRODUCTS = 2.0**-8  #: what products in reduced precision tell apart
Entry = tuple[str, str]  #: a layer, and the name of a parameter there
Gradients = dict[str, dict[str, Tensor | None]]  #: layer -> by the names of its parameters


class BesideOutputsError(LossError):
    """Weights reach the loss by another way than the outputs of their layers."""


class GradientCheck:
    """Looks at the first batch of a pass, for every layer that no earlier pass of the objective has looked at.

    Args:
        dag: of the model.
        objective: the loss, which keeps what is found.
        hooks: at the layers.
        pairs: what is measured. Goals that meet other features stand for gradients of weights.
    """

    def __init__(self, dag: Dag, objective: Objective, hooks: Hooks, pairs: Iterable[Pair]) -> None:
        self.objective, self.hooks, self.model = objective, hooks, dag.model
        wanted, meeting = set[str](), set[str]()
        for x, y in pairs:
            for feature in (x, y):
                assert isinstance(feature, Feature)
                wanted.update(feature.goals, feature.input_goals)
                meeting.update(*((feature.goals, feature.input_goals) if x != y else ()))
        wanted -= objective.findings.compared
        self.watched = {edge.name: edge for edge in dag.edges if edge.name in wanted and not edge.shared}
        self.edges = {name: edge for name, edge in self.watched.items() if name in meeting}

    def begin(self) -> None:
        """Before the batch runs."""
        if not self.watched:
            return
        self.goals, self.hooks.goals = self.hooks.goals, self.hooks.goals | self.edges.keys()
        self.weights = {key: w for edge in self.watched.values() for key, w in _weights(edge, self.model).items()}
        self.hooks.weights = [*self.weights.values()]
        self.frozen = [weight for weight in self.hooks.weights if not weight.requires_grad]
        for weight in self.frozen:
            weight.requires_grad_()
        self.before = self._state()

    def end(self, batch: object, calls: Mapping[str, Sequence[Capture]], scale: float, loss: float) -> None:
        """After the batch has run forward and back. The next one is not looked at.

        Args:
            batch: what has run.
            calls: what each call of a layer left.
            scale: from its gradient to the goals of single samples.
            loss: of the batch.

        Raises:
            LossError: goals are not all that the loss wants.
        """
        if not self.watched:
            return
        after, gradients = self._state(), self._by_edge(self.hooks.weight_gradients)
        trials = Trials(self.objective, self.hooks, self.before, batch)
        left = self._left(calls, gradients, scale)
        if left:
            self._explain(left, trials)
        ray = self._ray(gradients)
        if trials.contradict(ray, loss):  # one ray each would clear no layer
            self.objective.findings.detached |= ray.layers
        after.restore()
        for weight in self.frozen:
            weight.requires_grad_(False)
        self.hooks.goals, self.hooks.weights, self.hooks.weight_gradients = self.goals, (), ()
        self.objective.findings.compared.update(self.edges)
        self.watched, self.edges = {}, {}

    def _state(self) -> ModelState:
        """Of the model, and of what the loss runs beside it."""
        state = ModelState(self.model)
        for module in self.objective.others.modules:
            state.include(module)
        return state

    def _by_edge(self, gradients: Sequence[Tensor | None]) -> Gradients:
        by_edge: dict[str, dict[str, Tensor | None]] = {name: {} for name in self.watched}
        for (name, entry), gradient in zip(self.weights, gradients, strict=True):
            by_edge[name][entry] = gradient
        return by_edge

    def _explain(self, left: Mapping[str, "_Rest"], trials: Trials) -> None:
        """Notes a penalty on weights, and refuses all else."""

        def is_beside_outputs(rolled: bool) -> bool:
            gradients = trials.gradients_beside([*self.weights.values()], rolled)
            if gradients is None:
                return False
            by_edge = self._by_edge(gradients)
            return not any(rest.differs(by_edge[name]) for name, rest in left.items())

        if is_beside_outputs(rolled=True):  # whose samples they are makes no difference to a penalty
            self.objective.findings.penalty = True
            return
        taken = trials.derivatives()
        if taken:
            cause = f"takes derivatives ({', '.join(taken)}), as by the inputs"
            way_out = "a loss of the model's outputs alone, such as one with differences of outputs for the derivatives"
        elif is_beside_outputs(rolled=False):
            cause = "uses these weights once more, beside the layers"
            way_out = "a loss of the model's outputs alone, or with that use in the model's own forward"
        else:
            cause = (
                "runs the layers with other weights than the model's own (torch.func.functional_call), detaches them, "
                "or changes their gradients"
            )
            way_out = "a loss of the outputs of the model as it is"
        part = max(rest.size / rest.gradient if rest.gradient else 1.0 for rest in left.values())
        raise BesideOutputsError(
            f"weights of {', '.join(left)} reach the loss by another way than the layer's output: {part:.2g} of "
            f"autograd's gradient does not come from there, and no closed form holds for it. The loss or step {cause}. "
            f"Measure {way_out}; or grow with AddNeurons(init='zero') or init='copy', which need no gradient."
        )

    def _left(self, calls: Mapping[str, Sequence[Capture]], gradients: Gradients, scale: float) -> dict[str, "_Rest"]:
        """Layers whose weights have gradients that do not come from their outputs."""
        rests = {
            name: _Rest.of(edge, calls[name], gradients[name], scale)
            for name, edge in self.edges.items()
            if gradients[name]
        }
        return {name: rest for name, rest in rests.items() if rest.differs({})}

    def _ray(self, gradients: Gradients) -> Ray:
        """Along the gradients of all layers."""
        weights, directions, slope, layers = dict[str, Tensor](), dict[str, Tensor](), 0.0, set[str]()
        for name, edge in self.edges.items():
            found = {entry: gradient for entry, gradient in gradients[name].items() if gradient is not None}
            size = _norm(found.values())
            if size:
                own = {entry: self.weights[name, entry] for entry in found}
                length = _norm(own.values()) or 1.0
                weights |= {edge.path(entry): weight for entry, weight in own.items()}
                directions |= {edge.path(entry): g * (length / size) for entry, g in found.items()}
                slope += size * length
                layers.add(name)
        return Ray(weights, directions, slope, frozenset(layers))


def _weights(edge: Edge, model: nn.Module) -> dict[Entry, Tensor]:
    """The parameters of a layer as they are in the model now, in a preview too; none that are computed."""
    entries = [entry for entry in ("weight", "bias") if getattr(edge.module, entry, None) is not None]
    tensors = {(edge.name, entry): tensor_at(model, edge.path(entry)) for entry in entries if entry in edge.rule.dims}
    return {key: tensor for key, tensor in tensors.items() if tensor.is_leaf and tensor.is_floating_point()}


@dataclass(frozen=True, eq=False)
class _Rest:
    """What autograd's gradient of a layer's weights has beside that which comes from the layer's output.

    Attributes:
        parts: by entry, in the rows and columns of its old channels.
        gradient: the norm of autograd's.
        rounding: the norm of each part that is rounding.
    """

    edge: Edge
    calls: Sequence[Capture]
    parts: Mapping[str, Tensor]
    gradient: float
    rounding: Mapping[str, float]

    @classmethod
    def of(cls, edge: Edge, calls: Sequence[Capture], gradients: Mapping[str, Tensor | None], scale: float) -> "_Rest":
        """Compares with the products of what the layer read with the goals at its output."""
        bias, parts, found, rounding = "bias" in gradients, {}, {}, dict.fromkeys(gradients, 0.0)
        reads, goal = InputFeatures(edge.name, bias), OutputGoal(edge.name)
        products = [product(reads, goal, Batch({edge.name: call}, len(call.inputs))) for call in calls]
        expected = sum(each[0] for each in products[1:]) + products[0][0]
        expected = expected.T / scale
        for entry, gradient in gradients.items():
            wanted = expected[:, -1:] if entry == "bias" else expected[:, : expected.shape[1] - bias]
            found[entry] = _old(edge, calls[0], entry, gradient, wanted)
            parts[entry] = found[entry] - wanted
        for call in calls:
            assert call.output_goal is not None
            smallest = torch.finfo(call.output_goal.dtype).tiny  # below it numbers have fewer digits
            unit = (_resolution(call) * _norm([call.output_goal]) + smallest) / abs(scale)
            for entry in rounding:
                n = call.positions
                length = n**0.5 if entry == "bias" else _norm([call.inputs]) * edge.rule.taps(edge.module) ** 0.5
                # autograd may sum goals one after the other: where all are alike, all of them round the same way
                rounding[entry] += unit * length * (max(ROUNDING, n / 2) if entry == "bias" else ROUNDING)
        return cls(edge, calls, parts, _norm(found.values()), rounding)

    @property
    def size(self) -> float:
        """The norm of all parts."""
        return _norm(self.parts.values())

    def differs(self, gradients: Mapping[str, Tensor | None]) -> bool:
        """Whether these gradients are not what there is beside; those that are missing are zero."""
        apart = {
            entry: part - _old(self.edge, self.calls[0], entry, gradients.get(entry), part)
            for entry, part in self.parts.items()
        }
        return any(_norm([part]) > self.rounding[entry] for entry, part in apart.items())


def _old(edge: Edge, capture: Capture, entry: str, gradient: Tensor | None, like: Tensor) -> Tensor:
    """A gradient as a matrix ``[o, i]``, of the old channels alone where a preview has new ones."""
    if gradient is None:
        return torch.zeros_like(like)
    matrix = gradient.detach()[:, None] if entry == "bias" else edge.matrix(gradient.detach())
    for dim, index_map in enumerate((capture.output_map, None if entry == "bias" else capture.input_map)):
        if index_map is not None:
            matrix = matrix.index_select(dim, index_map.old.to(matrix.device))
    return matrix.flatten(1).to(like)


def _norm(tensors: Iterable[Tensor]) -> float:
    return sum(float(tensor.detach().norm()) ** 2 for tensor in tensors) ** 0.5


def _resolution(capture: Capture) -> float:
    """What the products of a layer's gradient tell apart: the coarsest type that takes part, of what is computed in."""
    assert capture.output_goal is not None
    dtypes = (capture.inputs.dtype, capture.output_goal.dtype)
    eps = max(torch.finfo(dtype).eps for dtype in dtypes)
    reduced = torch.get_float32_matmul_precision() != "highest"
    if capture.inputs.is_cuda and capture.geometry is not None:
        reduced = reduced or torch.backends.cudnn.allow_tf32
    return max(eps, ROUNDED_PRODUCTS / 4 if reduced and torch.float32 in dtypes else 0.0)
