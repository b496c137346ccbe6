"""What a law is checked on: a model with batches and a loss, and a small built-in set of them."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dagrow._model_state import preserve_state
from dagrow.graph import Dag, trace
from dagrow.growing import propose
from dagrow.operators import Operator
from dagrow.statistics import Loss, Step
from dagrow.surgery import Growth, preview
from dagrow.tracing import bind


def squared_error(output: Tensor, target: Tensor) -> Tensor:
    """Mean over samples of half the squared distance."""
    return (output - target).square().flatten(1).sum(1).mean() / 2


@dataclass(frozen=True)
class Case:
    """What a law is checked on.

    Attributes:
        model: a model in float64; laws change copies only.
        batches: ``(inputs, target)``, more than one of them, together at least four samples.
        loss: a mean or a sum over samples.
        mode: the mode in which is measured.
        name: for messages; that of the model's class by default.
        step: what growths are measured with instead of the loss, if it is given: slopes are its own. Laws that compute
            goals themselves do so with the loss, and see no step.
    """

    model: nn.Module = field(repr=False)
    batches: Sequence[tuple[Any, Tensor]] = field(repr=False)
    loss: Loss = squared_error
    mode: str = "eval"
    name: str = ""
    step: Step | None = field(default=None, repr=False)

    def copy(self) -> Dag:
        """Traces a copy of the model.

        Returns:
            Its dag.
        """
        return trace(copy.deepcopy(self.model), self.batches[0][0])

    def propose(self, operator: Operator, dag: Dag) -> list[Growth]:
        """Measures on the batches what an operator could add.

        Args:
            operator: is asked.
            dag: of a copy of the model.

        Returns:
            Growths, the largest gain first.
        """
        loss = self.loss if self.step is None else None
        return propose(dag, self.batches, loss, [operator], step=self.step, mode=self.mode)

    def supervised(self) -> "Case":
        """The same with the loss alone."""
        return replace(self, step=None)

    def outputs(self, model: nn.Module, mode: str = "eval", tensors: Mapping[str, Tensor] | None = None) -> Tensor:
        """Computes the outputs of all batches.

        Args:
            model: a copy of the model, grown or not.
            mode: that of every layer but dropout, whose masks depend on widths.
            tensors: parameters and buffers in place of the model's.

        Returns:
            One after the other ``[n, ...]``.
        """
        with preserve_state(model), torch.no_grad():
            model.train(mode == "train")
            for module in model.modules():
                if isinstance(module, nn.modules.dropout._DropoutNd):
                    module.eval()
            arguments = [bind(inputs) for inputs, _ in self.batches]
            return torch.cat([functional_call(model, dict(tensors or {}), *call) for call in arguments])

    def grown(self, growth: Growth, gamma: float, mode: str = "eval") -> Tensor:
        """Computes what :meth:`outputs` would give after a growth.

        Args:
            growth: of a dag of :meth:`copy`.
            gamma: its amplitude.
            mode: as for :meth:`outputs`.

        Returns:
            The outputs ``[n, ...]``.
        """
        with preview(growth.dag, growth.change):
            return self.outputs(growth.dag.model, mode, growth.change.tensors(growth.dag.model, gamma))


def rescaled(case: Case) -> Case | None:
    """The first input channel times 1000 and its weights divided by it; None if more than layers read the input."""
    dag = case.copy()
    readers = [user for node in dag.program.graph.nodes if node.op == "placeholder" for user in node.users]
    names = {edge.name for edge in dag.edges}
    if not all(user.op == "call_module" and user.target in names for user in readers):
        return None
    batches = [(x.clone(), y) for x, y in case.batches]
    edges = [dag.edge(str(user.target)) for user in readers]
    with torch.no_grad():
        for edge in edges:
            edge.matrix(edge.parameters()["weight"])[:, 0] /= 1000
        for x, _ in batches:
            x.select(edges[0].rule.channel_dim(x.ndim), 0).mul_(1000)
    return replace(case, model=dag.model, batches=batches)


def case_of(model: nn.Module) -> Case:
    """A model on random numbers that fit its first layer."""
    model = copy.deepcopy(model).double()
    dag, generator = trace(model), torch.Generator().manual_seed(0)
    value = next(node.meta["val"] for node in dag.program.graph.nodes if node.op == "placeholder")
    x = torch.randn(60, *value.shape[1:], generator=generator, dtype=torch.float64)
    with preserve_state(model), torch.no_grad():
        y = model.eval()(x)
    waves, mix = (torch.randn(*size, generator=generator).double() for size in ((x[0].numel(), 3), (3, y[0].numel())))
    y = ((x.flatten(1) @ waves / 2).sin() @ mix).view_as(y)
    return Case(model, [(x[:17], y[:17]), (x[17:], y[17:])])


def built_in() -> list[nn.Module]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return [
            nn.Sequential(nn.Linear(5, 3), nn.Identity(), nn.Linear(3, 4)),
            nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)),
            nn.Sequential(nn.Linear(4, 6, bias=False), nn.GELU(), nn.Linear(6, 2, bias=False)),
        ]
