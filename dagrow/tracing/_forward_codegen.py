"""A forward written from the graph, for models whose own forward has a size written into it that no longer fits.

It is put on the object through a subclass of the user's class made for this object alone, so that ``isinstance``,
the other methods, deepcopy, pickle and ``torch.compile`` go on working.
"""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from dagrow._pytree import mapped
from dagrow.errors import TraceError
from dagrow.tracing._autocast import device_of, follow_casts
from dagrow.tracing._inputs import Arguments, fits
from dagrow.tracing._leaf_modules import is_leaf
from dagrow.tracing._program import Program
from dagrow.tracing._traced_int import COMPARISONS, formula
from dagrow.tracing._written_class import PREFIX, OtherSizesError, PathRecord, Written, own_class, own_shapes, subclass

Edit = Callable[[fx.Graph, Mapping[fx.Node, fx.Node]], None]  #: of a copied graph, given nodes and their copies
T = TypeVar("T")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def unwritable(program: Program, other: Callable[[], Program | str]) -> str | None:
    """Why no forward can be written from a graph.

    Marks the nodes whose flag follows the model's mode.

    Args:
        program: the graph.
        other: gives the graph in the other mode, or why there is none.

    Returns:
        A clause about the model's own forward, or None if one can be written.
    """
    model = program.model
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return "which distributes the model; trace its .module, and wrap it again after the growth"
    if any(node.op == "call_module" and node.target == "" for node in program.graph.nodes):
        return "of a single layer; put it into an nn.Sequential"
    if "forward" in vars(model):
        return "which was put on the object and cannot be replaced"
    hooked = [name for name, m in model.named_modules() if name and not is_leaf(m) and any(vars(m)[h] for h in _HOOKS)]
    if hooked:
        return f"which, written anew, would skip the hooks of {hooked[0]}"
    if program.obstacle:
        return f"which {program.obstacle} and cannot be written anew"
    if program.baked_size:
        return f"where {program.baked_size}"
    if any(node.target is setattr for node in program.graph.nodes):
        return "which sets attributes and cannot be written anew"
    return _mode_obstacle(program, other())


def _mode_obstacle(program: Program, other: Program | str) -> str | None:
    """Compares the graphs of both modes: they may differ only in flags and rates, which then follow the mode."""
    if isinstance(other, str):
        return f"which fails in the other mode: {other}"
    here, there = list(program.graph.nodes), list(other.graph.nodes)
    partner = dict(zip(there, here, strict=False))
    differing = next((a for b, a in partner.items() if not _agree(a, b, partner, program.model.training)), None)
    if len(here) != len(there) or differing is not None:
        where = differing.meta.get("source", "") if differing is not None else ""
        return f"which does other things in training {where}".strip()
    return None


def _agree(a: fx.Node, b: fx.Node, partner: Mapping[fx.Node, fx.Node], training: bool) -> bool:
    """Whether two nodes do the same but for flags and rates, which are kept as (in training, else)."""
    ours, nest = tree_flatten((a.args, dict(a.kwargs)))
    theirs, other = tree_flatten((fx.map_arg(b.args, partner.get), dict(fx.map_arg(b.kwargs, partner.get))))
    if a.op != b.op or not (a.target is b.target or a.target == b.target) or nest != other:
        return False
    differing = {i: pair for i, pair in enumerate(zip(ours, theirs, strict=True)) if repr(pair[0]) != repr(pair[1])}
    if not all(isinstance(x, (bool, float)) and isinstance(y, (bool, float)) for x, y in differing.values()):
        return False
    a.meta["modes"] = {i: (x, y) if training else (y, x) for i, (x, y) in differing.items()}
    return True


def write_forward(
    program: Program, literals: Mapping[fx.Node, Arguments], edit: Edit | None = None, paths: Sequence[PathRecord] = ()
) -> type[nn.Module]:
    """A class like the model's own whose forward runs the program's graphs with other literal sizes.

    Args:
        program: the model and its graph, and those of further examples, which stay as they are.
        literals: nodes and their arguments, where these change.
        edit: what else changes in a copy of each graph, given each node's copy.
        paths: records of the new paths that this puts there.

    Returns:
        A subclass of the user's class, for this object alone.
    """
    model, forwards = program.model, [_written(each, literals, edit) for each in program.every]
    return subclass(own_class(model), forwards, (*added_paths(model), *paths), own_shapes(model))


def _written(program: Program, literals: Mapping[fx.Node, Arguments], edit: Edit | None) -> Written:
    """The forward for the calls of one example: its source, and what the names in it are."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(program.graph, copies))  # type: ignore[arg-type]
    for node, (args, kwargs) in literals.items():
        if node not in copies:  # of another example
            continue
        copies[node].args = fx.map_arg(args, lambda n: copies[n])
        copies[node].kwargs = fx.map_arg(kwargs, lambda n: copies[n])
    if edit is not None:
        edit(graph, copies)
    for node, copied in copies.items():
        if node.meta.get("modes"):
            _follow_mode(graph, copied, node.meta["modes"])
        if node.meta.get("casts"):
            follow_casts(graph, copied, node.meta["casts"], device_of(program.model))
    _hold_sizes(graph, copies, literals)
    switches = _follow_grad(graph)
    code = graph.python_code("self")
    source = re.sub(r"\bself\.(_constant\d+)\b", rf"{PREFIX}\1", code.src)
    signature, names = _signature(program)
    names[f"{PREFIX}uncast"] = _uncast
    is_cast = program.graph.output_node().meta.get("autocast")
    if is_cast is not None:
        signature += f"\n    {PREFIX}uncast({device_of(program.model)!r}, {is_cast})"
    source = re.sub(r"^def forward\(.*?\).*?:\s*$", signature, source, count=1, flags=re.MULTILINE)
    names |= {**code.globals, f"{PREFIX}structure": program.graph.output_node().meta["structure"]}
    names |= {
        f"{PREFIX}fixed": _fixed,
        f"{PREFIX}alike": fits,
        f"{PREFIX}switches": switches,
    }
    names |= {PREFIX + name: constant for name, constant in program.constants.items()}
    return source, names


def added_paths(model: nn.Module) -> tuple[PathRecord, ...]:
    """The new paths that a model has got.

    Args:
        model: the user's model.

    Returns:
        Their records, oldest first.
    """
    return getattr(type(model), f"{PREFIX}branches", ())


def _signature(program: Program) -> tuple[str, dict[str, Any]]:
    """The user's own parameters of forward, those that the graph does not have fixed at what they were.

    Args:
        program: the graph.

    Returns:
        The head of a function that tells whether a call is of the form that the graph was made for, and that of the
        forward; what the names in them are.
    """
    placeholders = {str(n.target).lstrip("*"): n for n in program.graph.nodes if n.op == "placeholder"}
    parameters = list(inspect.signature(program.model.forward).parameters.values())
    names: dict[str, Any] = {f"{PREFIX}default_{p.name}": p.default for p in parameters if p.default is not p.empty}
    listed: list[str] = []
    checks: list[str] = []
    alike: list[str] = []
    starred = False
    for p in parameters:
        star = "*" if p.kind is p.VAR_POSITIONAL else "**" if p.kind is p.VAR_KEYWORD else ""
        if p.kind is p.KEYWORD_ONLY and not starred:
            listed.append("*")
        starred |= p.kind in (p.VAR_POSITIONAL, p.KEYWORD_ONLY)
        listed.append(star + p.name + (f"={PREFIX}default_{p.name}" if p.default is not p.empty else ""))
        names[f"{PREFIX}baked_{p.name}"] = _baked(p, placeholders.get(p.name))
        checks.append(f"    {PREFIX}fixed({p.name!r}, {PREFIX}baked_{p.name}, {p.name})")
        alike.append(f"{PREFIX}alike({PREFIX}baked_{p.name}, {p.name})")
    arguments = ", ".join(["self", *listed])
    fitting = f"def {PREFIX}fits({arguments}):\n    return {' and '.join(alike) or True}"
    return "\n".join([fitting, "", f"def forward({arguments}):", *checks]), names


def _baked(parameter: inspect.Parameter, node: fx.Node | None) -> object:
    """What an argument must be because the graph was made with it; any tensor stands for all."""
    empty: dict[object, object] = {parameter.VAR_POSITIONAL: (), parameter.VAR_KEYWORD: {}}
    value = node.meta["val"] if node is not None else empty.get(parameter.kind, parameter.default)
    return mapped(lambda leaf: torch.empty(0) if isinstance(leaf, Tensor) else leaf, value)


def _fixed(name: str, traced: object, value: object) -> None:
    if not fits(traced, value):
        raise TraceError(
            f"forward was traced with {name} = {_shown(traced)}, and the forward that dagrow wrote after growth holds "
            f"for this value only; {_shown(value)} was given. Trace the model with the calls that you need before it "
            "grows: trace(model, example, also=[other, ...])."
        )


def _uncast(device: str, is_cast: bool) -> None:
    if torch.is_autocast_enabled(device) is not is_cast:
        raise TraceError(
            f"forward was traced {'under' if is_cast else 'without'} autocast, could not be otherwise, and was written "
            f"anew by a growth. Trace the model {'without' if is_cast else 'under'} autocast before it grows."
        )


def _shown(value: object) -> str:
    return "a tensor" if isinstance(value, Tensor) else repr(value)


def _hold_sizes(graph: fx.Graph, copies: Mapping[fx.Node, fx.Node], literals: Mapping[fx.Node, Arguments]) -> None:
    """The new forward refuses inputs of sizes for which the user's own does something else."""
    for node, copied in copies.items():
        for (sign, right), result in node.meta.get("guards", {}).items():
            if node not in literals and right not in literals:
                text = f"{formula(node)} {sign} {formula(right)}"
                other = copies[right] if isinstance(right, fx.Node) else right
                later = max(copied, other) if isinstance(other, fx.Node) else copied
                with graph.inserting_after(later):  # before anything fails that the comparison keeps from running
                    graph.call_function(_hold, (copied, sign, other, result, text))


def _hold(left: Any, sign: str, right: Any, result: bool, text: str) -> None:
    if COMPARISONS[sign](left, right) is not result:
        raise OtherSizesError(
            f"the forward that dagrow wrote after growth holds only where {text} is {result}, as it was when the model "
            "was traced. Trace the model with the sizes that you need before it grows: trace(model, example, "
            "also=[other, ...])."
        )


def _follow_mode(graph: fx.Graph, node: fx.Node, modes: Mapping[int, tuple[Any, Any]]) -> None:
    """Flags and rates that were fixed while recording follow the model's mode again: (in training, else)."""
    values, nest = tree_flatten((node.args, dict(node.kwargs)))
    with graph.inserting_before(node):
        mode = graph.get_attr("training")
        for index, (here, there) in modes.items():
            values[index] = graph.call_function(_either, (mode, here, there))
    node.args, node.kwargs = tree_unflatten(values, nest)


def _either(training: bool, here: T, there: T) -> T:
    """What holds in training, or else."""
    return here if training else there


def _follow_grad(graph: fx.Graph) -> bool:
    """Where the graph switches gradients on again, they come back only if they were on. Whether it switches at all."""
    switches = [node for node in graph.nodes if node.target is torch._C._set_grad_enabled]
    if switches:
        with graph.inserting_before(next(node for node in graph.nodes if node.op != "placeholder")):
            enabled = graph.call_function(torch.is_grad_enabled)
        for node in switches:
            node.args = tuple(enabled if arg is True else arg for arg in node.args)
    return bool(switches)
