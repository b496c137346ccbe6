"""Grown networks in files: new layers, widths and weights, no pickled code."""

import os
import pickle
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dagrow._model_state import all_or_nothing
from dagrow.errors import GrowthError, StoreError, first_line
from dagrow.graph import Dag, Rule, trace
from dagrow.surgery._apply import apply, transaction
from dagrow.surgery._draft import Draft
from dagrow.surgery._new_layers import NewPath, layer_specs, rebuilt
from dagrow.surgery._removal import removal
from dagrow.tracing import added_paths

FORMAT, VERSION = "dagrow", 2


def save(dag: Dag, path: str | os.PathLike[str]) -> None:
    """Writes a model's new layers, widths and weights.

    A file that is there is replaced only when the new one is complete. The file is what ``torch.save`` makes of a dict
    of numbers and tensors; ``torch.load(path, weights_only=True)`` reads it.

    Args:
        dag: of the model. Raises GrowthError if the model is no longer the one that was traced.
        path: of the file.

    Raises:
        StoreError: the path cannot be written, or the model's state_dict holds more than dense tensors.
    """
    if not isinstance(dag, Dag):
        raise StoreError(f"save was given a {type(dag).__name__}; give the dag, dagrow.save(dag, path).")
    dag.check()
    widths, state = {axis.name: axis.width for axis in dag.axes}, dict(dag.model.state_dict())
    odd = [name for name, value in state.items() if not isinstance(value, Tensor) or value.layout is not torch.strided]
    if odd:
        raise StoreError(f"{', '.join(odd)} in the model's state_dict cannot be saved: only dense tensors can.")
    paths = [[*record, layer_specs(dag.model.get_submodule(record[0]))] for record in added_paths(dag.model)]
    content = {"format": FORMAT, "version": VERSION, "branches": paths, "widths": widths, "state": state}
    target = _path(path)
    try:
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:  # all of the file, or none
            torch.save(content, Path(folder, target.name))
            os.replace(Path(folder, target.name), target)
    except (OSError, RuntimeError) as error:
        raise StoreError(f"{target} cannot be written ({error}); give a path in a folder that exists.") from error


def _path(path: object) -> Path:
    if not isinstance(path, (str, os.PathLike)) or not str(path):
        raise StoreError(f"path={path!r}: give the path of a file.")
    return Path(path)


def load(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any = None,
    *,
    also: Sequence[Any] = (),
    rules: Sequence[Rule] = (),
) -> Dag:
    """Gives a freshly built model the layers and widths in a file, in place, and the weights in the file.

    Args:
        model: as it was built before it grew, or anywhere on the way.
        path: what :func:`save` wrote.
        example_inputs: as for :func:`dagrow.trace`, which raises TraceError where the model cannot be traced.
        also: as for :func:`dagrow.trace`.
        rules: as for :func:`dagrow.trace`.

    Returns:
        The dag of the model.

    Raises:
        StoreError: the file is none of ours, or of another architecture. The model is as it was.
    """
    paths, widths, state = _read(_path(path))
    dag = trace(model, example_inputs, also=also, rules=rules)
    before = {name: tensor.detach().clone() for name, tensor in _tensors(model).items()}

    def work() -> None:
        _add_paths(dag, paths)
        _check_axes(dag, widths)
        for name, width in widths.items():
            _resize(dag, name, width)
        _check_state(_tensors(model), state)
        model.load_state_dict(state)

    with all_or_nothing(lambda: _refill(model, before)):
        transaction(dag, work)
    return dag


def _read(path: Path) -> tuple[list[Any], dict[str, int], dict[str, Tensor]]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise StoreError(f"{path} cannot be read ({first_line(error)}); give a file that dagrow.save wrote.") from error
    if not isinstance(content, Mapping) or content.get("format") != FORMAT:
        raise StoreError(f"{path} was not written by dagrow.save; for a plain state_dict, use model.load_state_dict.")
    if content.get("version") != VERSION:
        raise StoreError(
            f"{path} has version {content.get('version')!r} of the format; this dagrow reads version {VERSION}. "
            "Install the one that wrote it."
        )
    parts: list[Any] = [content.get(part) for part in ("branches", "widths", "state")]
    paths, widths, state = parts
    complete = isinstance(widths, Mapping) and isinstance(state, Mapping) and isinstance(paths, list)
    whole_numbers = complete and all(type(width) is int for width in widths.values())
    if not whole_numbers or not all(isinstance(value, Tensor) for value in state.values()):
        raise StoreError(f"{path} is damaged: its widths or weights are missing. Save it again.")
    return paths, dict(widths), dict(state)


def _add_paths(dag: Dag, paths: Sequence[Any]) -> None:
    for path in paths:
        try:
            _add_path(dag, *path)
        except (TypeError, ValueError, KeyError, IndexError, AttributeError, RuntimeError) as error:
            raise StoreError(
                f"the new layers {path!r} in the file cannot be built ({first_line(error)}): it is damaged. Save it "
                "again."
            ) from error


def _add_path(dag: Dag, name: str, reads: str, writes: str, layers: Mapping[str, Mapping[str, Any]]) -> None:
    """Adds new layers as they were added to the model in the file."""
    if (name, reads, writes) in added_paths(dag.model):
        return
    nodes = {layer.name: node for node, layer in dag.layers.items()}
    missing = [layer for layer in (reads, writes) if layer and layer not in nodes]
    if missing or hasattr(dag.model, name) or dag.unwritable:
        why = f"it has no layer {missing[0]}" if missing else f"it has one {dag.unwritable}"
        raise StoreError(
            f"the model does not take the new layers {name} in the file: "
            + (f"it has another {name}" if hasattr(dag.model, name) else why)
            + ". Build the model as it was built before it was grown and saved."
        )
    reader, writer = dag.edge(reads), dag.edge(writes or reads)
    source = reader.layer.inputs
    inputs = source.meta["val"].shape[reader.rule.channel_dim(source.meta["val"].ndim)]
    module = rebuilt(layers, inputs, writer.rule.widths(writer.module)[1] if writes else inputs)
    module.to(writer.parameters()["weight"])
    reading, writing = (nodes[reads], nodes[writes]) if writes else (source.next, source)
    draft = Draft(dag)
    draft.add_path(NewPath(name, module, reading, writing, source, reads, writes, writer.path("weight")), nn.Identity())
    apply(dag, draft.change(), 0.0)


def _check_axes(dag: Dag, widths: Mapping[str, int]) -> None:
    axes = {axis.name: axis for axis in dag.axes}
    if axes.keys() != widths.keys():
        missing, extra = sorted(widths.keys() - axes.keys()), sorted(axes.keys() - widths.keys())
        raise StoreError(
            f"the file is of another architecture: the model lacks the axes {missing} and has {extra} instead. Build "
            "the model as it was built before it was grown and saved."
        )
    for name, axis in axes.items():
        if widths[name] < 1:
            raise StoreError(f"the file is damaged: it has an axis {name} of width {widths[name]}. Save it again.")
        if widths[name] != axis.width and not axis.growable:
            raise StoreError(
                f"axis {name} is {widths[name]} wide in the file but {axis.width} in the model, where it cannot grow "
                f"({axis.reason}); build the model with the right width."
            )


def _resize(dag: Dag, name: str, width: int) -> None:
    """Gives an axis its width in the file. Which units are new, or go, is all one: all weights come from the file."""
    axis = dag.axis(name)
    if width == axis.width:
        return
    try:
        if width < axis.width:
            apply(dag, removal(dag, axis, torch.arange(width, axis.width), {}), 1.0)
        else:
            apply(dag, Draft(dag, [(axis, dag.widening(axis, width - axis.width))]).change(), 0.0)
    except GrowthError as error:
        raise StoreError(f"the model does not take the widths in the file: {error}") from error


def _check_state(present: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    missing, extra = sorted(present.keys() - state.keys()), sorted(state.keys() - present.keys())
    if missing or extra:
        raise StoreError(
            f"the file is of another architecture: it lacks {missing} and has {extra} instead. Build the model as it "
            "was built before it was grown and saved."
        )
    for name, tensor in present.items():
        stored = state[name]
        if (tensor.shape, tensor.dtype) != (stored.shape, stored.dtype):
            raise StoreError(
                f"{name} is {tuple(stored.shape)} {stored.dtype} in the file but {tuple(tensor.shape)} {tensor.dtype} "
                "in the model; build the model with the sizes and the type that it was saved with."
            )


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}


def _refill(model: nn.Module, before: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in _tensors(model).items():
            if not torch.equal(tensor, before[name]):
                tensor.copy_(before[name])
