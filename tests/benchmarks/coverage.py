"""Coverage of a zoo of public architectures: is each traced, and does every axis that claims to grow grow exactly?

    python tests/benchmarks/coverage.py --zoo FOLDER --out tests/benchmarks/coverage.jsonl --table docs/coverage.md

A run goes on where an earlier one stopped: models that are in the results are left out, but for those that failed. To
measure all anew, give another file; ``--timed-only`` traces and times all anew, and keeps what was compared and grown.

FOLDER holds ``models.py`` with ``all_specs()``, a list of (suite, name, build, inputs), and ``torchvision_on_cpu.py``.
Each model runs in a process of its own, with a time limit, in eval mode, on one thread:

- trace and axes, timed against a plain call of the model, in single precision on the same batch, of 2 samples and of 8:
  the median of three, or one where that takes over 5 seconds;
- model and graph compared in float64 at a batch size that tracing did not see;
- every growable axis grown by 2 units with random fan-in at gamma = 0: the output stays within 1e-10 of its largest
  entry (or ten times what a change of every weight in its last bit changes, if that is more), gradients reach the new
  entries, another batch size runs, and undo restores every bit.
"""

import argparse
import copy
import importlib.util
import json
import re
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from common import append, in_own_process, read, source_version, table, write_block
from torch import Tensor, nn

import dagrow
from dagrow._pytree import tensors_in
from dagrow.graph import Dag
from dagrow.layers import ATTENTION, op_name
from dagrow.testing import rounding, try_axes

BATCH, LARGER, OTHER, UNITS = 2, 8, 3, 2  #: of tracing, timed twice; of graph and model; new units of an axis
SLOW = 5.0  #: seconds of a plain call and a trace that are not repeated
TOLERANCE, SINGLE_TOLERANCE = 1e-10, 1e-4
Spec = tuple[str, str, Callable[[], nn.Module], Callable[[int], Any]]


def specs(zoo: Path) -> list[Spec]:
    """The zoo's models."""
    sys.path.insert(0, str(zoo))
    for name in ("torchvision_on_cpu", "models"):
        spec = importlib.util.spec_from_file_location(name, zoo / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    sys.modules["models"].cheap_init()
    return list(sys.modules["models"].all_specs())


# ---------------------------------------------------------------- one model


def study(spec: Spec, *, timed_only: bool) -> Iterator[dict[str, Any]]:
    """What happened, in steps that each hold if a later one does not end."""
    *_, build, inputs = spec
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, example = _alive(build().eval()), inputs(BATCH)
    dag = dagrow.trace(model, example)
    yield {"traced": True} | _shape(dag)
    del dag
    yield _timed(model, example, BATCH)
    yield _timed(model, inputs(LARGER), LARGER)
    if timed_only:
        return
    kind = _widest(model, example)
    model = model.to(kind)
    dag = dagrow.trace(model, _to(example, kind))
    others = [_to(inputs(size), kind) for size in (1, OTHER)]
    tolerance = TOLERANCE if kind is torch.float64 else SINGLE_TOLERANCE
    yield {"precision": str(kind)[6:], "equal": all(_equal(dag, batch, tolerance) for batch in others)}
    yield _grown(dag, [_to(inputs(size), kind) for size in (1, BATCH)], tolerance)


def _timed(model: nn.Module, example: Any, batch: int) -> dict[str, float]:
    """Seconds of a plain call and of trace and axes, one after the other."""
    pairs: list[tuple[float, float]] = []
    while len(pairs) < 3 and (not pairs or sum(pairs[0]) < SLOW):
        pairs.append((_seconds(lambda: model(*example)), _seconds(lambda: dagrow.trace(model, example))))
    forward, traced = (statistics.median(times) for times in zip(*pairs, strict=True))
    return {f"forward{batch}": forward, f"seconds{batch}": traced, f"passes{batch}": traced / forward}


def _alive(model: nn.Module) -> nn.Module:
    """The model without parameters that are all zero, as some families start: no gradient would pass them."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not bool(parameter.any()):
                parameter.normal_(std=0.1)
    return model


def _widest(model: nn.Module, example: Any) -> torch.dtype:
    """Double precision, unless the model calls something that has none."""
    try:
        _run(copy.deepcopy(model).double(), _to(example, torch.float64))
    except RuntimeError:
        return torch.float32
    return torch.float64


def _shape(dag: Dag) -> dict[str, Any]:
    """Axes found, and the share of the parameters in edges with a growable side."""
    coverage = dag.coverage()
    return {
        "axes": len(dag.axes),
        "growable": sum(axis.growable for axis in dag.axes),
        "attention": _attends(dag),
        "edges": len(dag.edges),
        "share": coverage.share,
        "reasons": _weighed(coverage),
    }


def _weighed(coverage: Any) -> dict[str, int]:
    """Why edges are frozen, and how many parameters for it: the first reason, which most are frozen for."""
    return {why: sum(coverage.frozen[edge] for edge in edges) for why, edges in [*coverage.reasons.items()][:1]}


def _attends(dag: Dag) -> bool:
    """Whether the model has attention: a softmax over what two activations made together, and a product with it."""
    named = {op_name(node) for node in dag.program.graph.nodes if node.op != "call_module"}
    modules = {type(dag.model.get_submodule(str(n.target))) for n in dag.program.graph.nodes if n.op == "call_module"}
    soft = "softmax" in named or nn.Softmax in modules
    return ATTENTION in named or (soft and bool(named & {"matmul", "bmm", "einsum", "baddbmm"}))


def _equal(dag: Dag, inputs: Any, tolerance: float) -> bool:
    torch.manual_seed(1)
    with torch.no_grad():
        expected = tensors_in(dag.model(*inputs))
        torch.manual_seed(1)
        outputs = tensors_in(dag.program.run(*inputs))
    return len(expected) == len(outputs) and all(
        _close(a, b, tolerance) for a, b in zip(expected, outputs, strict=True)
    )


def _grown(dag: Dag, inputs: Sequence[Any], tolerance: float) -> dict[str, Any]:
    """Every growable axis."""
    faults = try_axes(dag, inputs, k=UNITS, tolerance=tolerance)
    failed = {axis: wrong for axis, wrong in faults.items() if wrong}
    noise = rounding(dag, inputs)
    return {
        "tried": len(faults),
        "exact": len(faults) - len(failed),
        "failed": failed,
        "rounding": noise,
        "loosened": 10 * noise > tolerance,
    }


def _run(model: nn.Module, inputs: Any) -> list[Tensor]:
    torch.manual_seed(1)
    with torch.no_grad():
        return tensors_in(model(*inputs))


def _to(inputs: Any, kind: torch.dtype) -> Any:
    return tuple(t.to(kind) if t.is_floating_point() else t for t in inputs)


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    if a.shape != b.shape:
        return False
    finite = a[torch.isfinite(a)].abs()
    scale = max(1.0, float(finite.max())) if finite.numel() and a.is_floating_point() else 0.0
    return bool(torch.isclose(a, b, rtol=0.0, atol=tolerance * scale, equal_nan=True).all())


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def alone(zoo: Path, suite: str, name: str, *, timed_only: bool) -> None:
    """Runs one model in this process; each line of the output is a part of the result."""
    spec = next(spec for spec in specs(zoo) if spec[:2] == (suite, name))
    try:
        for part in study(spec, timed_only=timed_only):
            print(json.dumps(part), flush=True)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        print(json.dumps({"error": f"{type(error).__name__}: {error} [{where.name}]"[:600]}), flush=True)


# ---------------------------------------------------------------- the zoo


def watched(arguments: argparse.Namespace, suite: str, name: str) -> dict[str, Any]:
    """One model in a process of its own, with a time limit."""
    command = [__file__, "--zoo", str(arguments.zoo), "--alone", suite, name]
    command += ["--timed-only"] if arguments.timed_only else []
    result, seconds = in_own_process(command, arguments.limit, "error")
    return {"suite": suite, "name": name, "version": source_version(), **result, "took": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", type=Path, required=True, help="folder with models.py")
    parser.add_argument("--out", type=Path, help="results, one JSON object a line")
    parser.add_argument("--table", type=Path, help="document to write the table into")
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--limit", type=float, default=900, help="seconds for each model")
    parser.add_argument("--only", default="", help="models whose suite/name contains this text")
    parser.add_argument("--timed-only", action="store_true", help="trace and time, but compare and grow nothing")
    parser.add_argument("--every", type=int, default=1, help="only one model in so many")
    parser.add_argument("--alone", nargs=2, metavar=("SUITE", "NAME"), help="one model, in this process")
    arguments = parser.parse_args()
    if arguments.alone:
        return alone(arguments.zoo, *arguments.alone, timed_only=arguments.timed_only)
    done = {
        (run["suite"], run["name"]) for run in known(arguments.out) if "error" not in run and not arguments.timed_only
    }
    todo = [
        (suite, name)
        for suite, name, *_ in specs(arguments.zoo)[:: arguments.every]
        if arguments.only in f"{suite}/{name}" and (suite, name) not in done
    ]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for result in pool.map(lambda spec: watched(arguments, *spec), todo):
            append(arguments.out, result)
            print(_line(result), flush=True)
    print("\n".join(summary(known(arguments.out))))
    if arguments.table:
        write_block(arguments.table, Path(__file__).name, document(known(arguments.out)))
    return None


def known(path: Path) -> list[dict[str, Any]]:
    """The results, of each model what was found last."""
    runs_by_model: dict[tuple[str, str], dict[str, Any]] = {}
    for run in read(path):
        before = runs_by_model.get((run["suite"], run["name"]), {})
        versions = {*before.get("versions", ()), run["version"]} if "tried" not in run else {run["version"]}
        before.pop("error", None)
        runs_by_model[run["suite"], run["name"]] = {**before, **run, "versions": versions}
    return list(runs_by_model.values())


def _line(run: Mapping[str, Any]) -> str:
    keys = [key for key in ("equal", "axes", "growable", "exact", "share", "passes2", "passes8", "took") if key in run]
    shown = " ".join(f"{key}={run[key]:.3g}" if isinstance(run[key], float) else f"{key}={run[key]}" for key in keys)
    return f"{run['suite']}/{run['name']}: {shown} {run.get('error', '')} {run.get('failed') or ''}"


def summary(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """What was found, over all models."""
    known = [run for run in runs if "share" in run]
    with_axes = sum(run["growable"] > 0 for run in known)
    tried, exact = (sum(run.get(key, 0) for run in runs) for key in ("tried", "exact"))
    loosened = [f"{run['name']} {10 * run['rounding']:.0e}" for run in runs if run.get("loosened")]
    lines = [
        f"{len(runs)} models, {sum(bool(run.get('traced')) for run in runs)} traced, "
        f"{sum(bool(run.get('equal')) for run in runs)} graphs equal to their model at other batch sizes",
        f"{sum(run['axes'] for run in known)} axes found, {sum(run['growable'] for run in known)} growable, "
        f"{tried} tried, {exact} grown exactly",
        f"{len(loosened)} models whose outputs change by over a tenth of the tolerance when every weight changes in "
        f"its last bit, so that the tolerance is ten times that change{_listed(loosened)}",
        f"{with_axes} models with a growable axis ({with_axes / max(1, len(runs)):.1%})",
    ]
    asked = [run for run in runs if "places" in run]
    places, proposed, slopes, others = (
        sum(run.get(key, 0) for run in asked) for key in ("places", "proposed", "slopes", "zero_only")
    )
    lines.append(
        f"{len(asked)} models asked for proposals: {proposed} of {places} axes and operators measured, put in place "
        f"and taken back, {slopes} slopes equal to the gain; {others} axes take only new units that start at zero, or "
        "copies"
    )
    for kind, attention in (("convolutional and other", False), ("attention", True)):
        shares = [run["share"] for run in known if run["attention"] is attention]
        if shares:
            median = statistics.median(shares)
            lines.append(f"median share of parameters in growable layers, {kind} models ({len(shares)}): {median:.1%}")
    for batch in (BATCH, LARGER):
        passes = [run[f"passes{batch}"] for run in runs if f"passes{batch}" in run]
        if passes:
            lines.append(
                f"tracing and axes, in forward passes on the same batch of {batch} ({len(passes)} models): "
                f"median {statistics.median(passes):.2f}, from {min(passes):.2f} to {max(passes):.0f}"
            )
    return lines


def _listed(names: Sequence[str]) -> str:
    return f": {', '.join(names)}" if names else ""


def document(runs: Sequence[Mapping[str, Any]]) -> str:
    """The table, with the reason that most frozen parameters have."""
    head = [
        "model",
        "traced",
        "equal",
        "axes",
        "growable",
        "exact",
        "measured",
        "share",
        f"passes ({BATCH})",
        f"passes ({LARGER})",
        "why not the rest, or what failed",
    ]
    rows = [
        [
            f"{run['suite']}/{run['name']}",
            _mark(run, "traced"),
            _mark(run, "equal"),
            str(run.get("axes", "")),
            str(run.get("growable", "")),
            f"{run['exact']}/{run['tried']}" if "tried" in run else "",
            f"{run['proposed']}/{run['places']}" if "places" in run else "",
            f"{run['share']:.2f}" if "share" in run else "",
            _number(run, f"passes{BATCH}"),
            _number(run, f"passes{LARGER}"),
            run.get("error") or "; ".join(_failed(run)) or _why(run),
        ]
        for run in sorted(runs, key=lambda run: (run["suite"], run["name"]))
    ]
    versions = ", ".join(sorted({version for run in runs for version in run["versions"]}))
    items = "\n".join(f"- {line}" for line in summary(runs))
    return f"{items}\n\n{table(head, rows)}\n\nSources of the package: {versions}."


def _failed(run: Mapping[str, Any]) -> list[str]:
    """What did not grow exactly, and what was not measured."""
    faults = {**run.get("failed", {}), **run.get("unproposed", {})}
    not_proposed = [f"proposing {run['not_proposed']}"] if run.get("not_proposed") else []
    return [f"{axis}: {why}" for axis, why in faults.items()] + not_proposed


def _number(run: Mapping[str, Any], key: str) -> str:
    return f"{run[key]:.1f}" if key in run else ""


def _mark(run: Mapping[str, Any], key: str) -> str:
    return {True: "yes", False: "no"}.get(run.get(key), "")  # type: ignore[arg-type]


def _why(run: Mapping[str, Any]) -> str:
    """The first reason, without names that only this model has."""
    reasons = run.get("reasons") or {}
    if not reasons:
        return ""
    causes = next(iter(reasons)).split("; ")
    return re.sub(r"\s*\[[^\]]*\]|\([^)]*\) ?", "", causes[0])[:110].replace("|", "/")


if __name__ == "__main__":
    main()
