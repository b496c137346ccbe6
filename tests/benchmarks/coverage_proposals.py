"""Coverage of proposals: is every axis of a zoo that says it grows measured as well, as its table says?

    python tests/benchmarks/coverage_proposals.py --zoo FOLDER --out tests/benchmarks/coverage.jsonl

Adds to the results of ``coverage.py``, cheap models first, and goes on where an earlier run stopped. Each model runs in
a process of its own, in eval mode and double precision, on a batch of two samples, with images of 32 pixels where the
model takes them. At each growable axis the default operator and a random one propose one neuron (or the table says
why not); every growth is put in place at a small amplitude and taken back bit for bit; of some the slope of the loss is
compared with the gain, and they are applied and undone.
"""

import argparse
import json
import logging
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from common import append, in_own_process, source_version
from coverage import BATCH, Spec, _alive, _to, _widest, known, specs
from torch import Tensor
from torch.nn import functional

import dagrow
from dagrow import AddNeurons
from dagrow._pytree import tensors_in
from dagrow.graph import Axis, Dag
from dagrow.surgery import Growth, grown
from dagrow.testing import check_slope
from dagrow.tracing import tensor_at

SIZE, SAMPLED = 32, 1  #: pixels; growths of an operator whose slopes are compared
OPERATORS = {"optimal": AddNeurons(k=1, folds=1), "random": AddNeurons(k=1, init="random", folds=1)}


def step(model: Any, batch: Any) -> Tensor:
    """Mean squares of all outputs to random targets."""
    outputs = [output for output in tensors_in(model(*batch)) if output.is_floating_point()]
    return torch.stack([(output - _target(output)).square().mean() for output in outputs]).sum()


def _target(output: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(output.shape[1:], generator=generator, dtype=torch.float64).to(output)


def study(spec: Spec, memory: int | None, single: bool) -> Iterator[dict[str, Any]]:
    """What was proposed, in steps that each hold if a later one does not end."""
    *_, build, inputs = spec
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, example = _alive(build().eval()), inputs(BATCH)
    kind = torch.float32 if single else _widest(model, example)
    model = model.to(kind)
    batches = [_to(inputs(BATCH), kind)]
    if _takes(model, _small(batches[0])):
        batches = [_small(batch) for batch in batches]
    dag = dagrow.trace(model, batches[0])
    growable, faults, counts = [axis for axis in dag.axes if axis.growable], dict[str, str](), _Counts()
    for init, operator in OPERATORS.items():
        fitting = [axis for axis in growable if init in axis.inits or "random" in axis.inits]
        growths = dagrow.propose(dag, batches, step=step, operators=[operator], max_memory=memory) if fitting else []
        faults |= {note.partition(": ")[0]: note for note in getattr(growths, "left_out", ())}
        faults |= {a.name: "nothing was proposed" for a in _without(fitting, growths) if a.name not in faults}
        counts.places += len(fitting)
        counts.proposed += len({growth.where for growth in growths})
        for growth in growths:
            _try(growth, batches[0], faults)
        for growth in growths[:SAMPLED] if kind is torch.float64 else ():
            _compare(growth, faults)
            counts.slopes += 1
        yield {"places": counts.places, "proposed": counts.proposed, "slopes": counts.slopes, "unproposed": faults}
    yield {"zero_only": sum("random" not in axis.inits for axis in growable), "precise": kind is torch.float64}


class _Counts:
    places = proposed = slopes = 0


def _small(batch: Any) -> Any:
    return tuple(functional.interpolate(t, (SIZE, SIZE)) if t.ndim == 4 and t.shape[-1] > SIZE else t for t in batch)


def _takes(model: Any, batch: Any) -> bool:
    try:
        with torch.no_grad():
            model(*batch)
    except Exception:  # images of one size only
        return False
    return True


def _without(axes: Sequence[Axis], growths: Sequence[Growth]) -> list[Axis]:
    where = {growth.where for growth in growths}
    return [axis for axis in axes if axis.name not in where]


def _try(growth: Growth, batch: Any, faults: dict[str, str]) -> None:
    """In place at a small amplitude, and back bit for bit."""
    dag: Dag = growth.dag
    before = {name: tensor_at(dag.model, name).detach().clone() for name in growth.change.index_maps}
    with grown(dag, growth.change, 1e-3), torch.no_grad():
        if not bool(torch.isfinite(step(dag.model, batch))):
            faults[growth.where] = "the loss of the grown model is not finite"
    if not all(torch.equal(tensor_at(dag.model, name), tensor) for name, tensor in before.items()):
        faults[growth.where] = "not taken back"


def _compare(growth: Growth, faults: dict[str, str]) -> None:
    """The slope of the loss with the gain; applied and undone."""
    try:
        check_slope(growth)
    except AssertionError as error:
        faults[growth.where] = f"slope: {str(error)[:200]}"
    state = {name: tensor.clone() for name, tensor in growth.dag.model.state_dict().items()}
    growth.apply(gamma=1e-3).undo()
    if not all(torch.equal(tensor, state[name]) for name, tensor in growth.dag.model.state_dict().items()):
        faults[growth.where] = "undo does not restore every bit"


def alone(zoo: Path, suite: str, name: str, memory: int | None, single: bool) -> None:
    """Runs one model in this process; each line of the output is a part of the result."""
    logging.getLogger("dagrow").setLevel(logging.ERROR)
    spec = next(spec for spec in specs(zoo) if spec[:2] == (suite, name))
    try:
        for part in study(spec, memory, single):
            print(json.dumps(part), flush=True)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        print(json.dumps({"not_proposed": f"{type(error).__name__}: {error} [{where.name}]"[:600]}), flush=True)


def watched(arguments: argparse.Namespace, suite: str, name: str) -> dict[str, Any]:
    """One model in a process of its own, with a time limit."""
    command = [__file__, "--zoo", str(arguments.zoo), "--alone", suite, name]
    command += [] if arguments.memory is None else ["--memory", str(arguments.memory)]
    command += ["--single"] if arguments.single else []
    result, seconds = in_own_process(command, arguments.limit, "not_proposed")
    known_by = {"suite": suite, "name": name, "version": source_version(), "not_proposed": None}
    return {**known_by, **result, "proposing": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", type=Path, required=True, help="folder with models.py")
    parser.add_argument("--out", type=Path, help="results, one JSON object a line")
    parser.add_argument("--limit", type=float, default=300, help="seconds for each model")
    parser.add_argument("--memory", type=int, help="bytes that sums and solves may take; what is free by default")
    parser.add_argument("--single", action="store_true", help="in single precision, without slopes: half the memory")
    parser.add_argument("--only", nargs="*", default=(), metavar="SUITE/NAME", help="these models, in this order")
    parser.add_argument("--alone", nargs=2, metavar=("SUITE", "NAME"), help="one model, in this process")
    arguments = parser.parse_args()
    if arguments.alone:
        return alone(arguments.zoo, *arguments.alone, arguments.memory, arguments.single)
    runs = {f"{run['suite']}/{run['name']}": run for run in known(arguments.out)}
    todo = arguments.only or [
        name
        for name, run in sorted(runs.items(), key=lambda item: item[1].get("took", 1e9))
        if "places" not in run or run.get("not_proposed")
    ]
    for name in todo:
        result = watched(arguments, *name.split("/"))
        append(arguments.out, result)
        shown = {key: value for key, value in result.items() if key not in ("suite", "name", "version")}
        print(name, json.dumps(shown), flush=True)
    return None


if __name__ == "__main__":
    main()
