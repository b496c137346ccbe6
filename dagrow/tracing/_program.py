"""The `fx.Graph` of a model's forward, and running it."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from dagrow._pytree import leaf_values, leaves, mapped
from dagrow.errors import TraceError
from dagrow.tracing._attribute_int import AttributeInt, AttributePath
from dagrow.tracing._contexts import modes_kept
from dagrow.tracing._inputs import bind_to_forward, fits
from dagrow.tracing._traced_int import Comparison


@dataclass(frozen=True, eq=False)
class Program:
    """A model and the graph of its forward.

    Nodes: placeholders named after forward's parameters, `call_module` for leaf modules, `get_attr` for
    parameters and buffers used directly and for `constants` (targets `_constant0`, ...), functions and
    methods for all else, one output. Every node has `meta["val"]`, its value (tensors without entries), and
    `meta["source"]`, the user's line. Nodes of sizes that were compared have `meta["guards"]`, what came out.

    Attributes:
        model: the user's own, whose current parameters the graph runs with.
        graph: its forward.
        constants: tensors of the graph that are neither parameters nor buffers.
        specialisations: what of the example is fixed in the graph.
        computed_attributes: whole numbers among the attributes of modules that forward computed with.
        obstacle: what forward does that none written from the graph would do.
        baked_size: a size that its loops may count to, or that ``math`` may have read.
        attribute_comparisons: those of computed attributes with plain numbers.
        on_values: whether it was recorded on the example's own values.
        also: the same of further examples, which may run other parts of the model.
    """

    model: nn.Module
    graph: fx.Graph
    constants: dict[str, Tensor]
    specialisations: tuple[str, ...]
    computed_attributes: frozenset[AttributePath] = frozenset()
    obstacle: str | None = None
    baked_size: str | None = None
    attribute_comparisons: tuple[Comparison, ...] = ()
    on_values: bool = False
    also: tuple["Program", ...] = ()

    @property
    def every(self) -> tuple["Program", ...]:
        """This program, and those of further examples."""
        return self, *self.also

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """Of sizes, and of whole numbers among the attributes of modules, in forward."""
        of_sizes = [each for node in self.graph.nodes for each in node.meta.get("comparisons", ())]
        return [*of_sizes, *self.attribute_comparisons]

    @cached_property
    def attribute_uses(self) -> dict[AttributePath, list[fx.Node]]:
        """Attributes of modules, whole numbers, and the nodes of all examples that have them as arguments."""
        uses: dict[AttributePath, list[fx.Node]] = {}
        for node in (node for program in self.every for node in program.graph.nodes):
            for value in leaf_values((node.args, node.kwargs)):
                if isinstance(value, AttributeInt):
                    uses.setdefault(value.path, []).append(node)
        return uses

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Executes the graph with the model's current parameters.

        Args:
            *args: positional arguments of forward.
            **kwargs: keyword arguments of forward.

        Returns:
            What forward returns.
        """
        return self.run_with(Executor(self), args, kwargs)

    def run_with(self, executor: "Executor", args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs the graph with arguments of forward.

        Args:
            executor: sees every value.
            args: positional arguments of forward.
            kwargs: keyword arguments of forward.

        Returns:
            What forward returns.

        Raises:
            TraceError: for arguments that the graph does not have, or whose value it has baked in.
        """
        values = bind_to_forward(self.model, args, kwargs).arguments
        parameters = inspect.signature(self.model.forward).parameters
        traced = {n.target.lstrip("*"): n.meta["val"] for n in self.graph.nodes if n.op == "placeholder"}
        values = {name: values.get(name, parameters[name].default) for name in {**traced, **values}}
        wrong = [name for name in values if not fits(traced.get(name, parameters[name].default), values[name])]
        if wrong:
            raise TraceError(
                f"The graph of {type(self.model).__name__} was made for other values of {wrong}: not given "
                "then, or not given now, or not tensors and different. Trace again with these arguments."
            )
        return self.through(executor, [values[name] for name in traced])

    def through(self, executor: "Executor", values: Sequence[object]) -> Any:
        """Runs the graph.

        Args:
            executor: sees every value.
            values: of the placeholders, in their order.

        Returns:
            What forward returns.
        """
        with modes_kept():
            return executor.run(*values)


class Executor(fx.Interpreter):
    """Runs a program node by node; subclass it and override `run_node` to see every value."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.model, graph=program.graph)
        self.extra_traceback = False
        self._constants = program.constants
        self._grad = torch.is_grad_enabled()

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        return next(self.args_iter)  # also for *args and **kwargs: one value each

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self._constants[target] if target in self._constants else attrgetter(target)(self.module)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module = self.submodules.get(target)  # which lacks second names
        return (self.module.get_submodule(target) if module is None else module)(*args, **kwargs)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is torch._C._set_grad_enabled:
            args = (args[0] and self._grad,)
        return super().call_function(target, args, kwargs)

    def output(self, target: Any, args: Any, kwargs: Any) -> Any:
        values = [value for _, value in leaves(args[0])]
        return mapped(lambda i: values[i], self.graph.output_node().meta["structure"])


def tensor_at(model: nn.Module, name: str) -> Tensor:
    """A parameter or buffer.

    Args:
        model: the user's model.
        name: of the tensor in it; it starts with a dot where the model itself is the layer.

    Returns:
        The very tensor.
    """
    return attrgetter(name.removeprefix("."))(model)
