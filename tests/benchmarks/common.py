"""What benchmarks share: counting FLOPs, studies that resume where they stopped, statistics of paired runs, tables."""

import argparse
import hashlib
import json
import math
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import dagrow

__all__ = ["FlopCount", "mean", "options", "paired", "plus_minus", "read", "source_version", "study", "table"]

START, END = "<!-- written by {} -->", "<!-- end of what {} wrote -->"


def _cholesky(a: Tensor) -> float:
    return a.shape[-1] ** 3 / 3


def _triangular(a: Tensor, b: Tensor) -> float:
    return a.shape[-1] * b.shape[-1] * b.shape[-2]


def _eigh(a: Tensor) -> float:
    return 9 * a.shape[-1] ** 3


def _svd(a: Tensor) -> float:
    m, n = max(a.shape[-2:]), min(a.shape[-2:])
    return 6 * m * n**2 + 20 * n**3


def _qr(a: Tensor) -> float:
    m, n = max(a.shape[-2:]), min(a.shape[-2:])
    return 4 * m * n**2 - 4 * n**3 / 3


def _convolution_backward(
    goal: Tensor, inputs: Tensor, weight: Tensor, transposed: bool, wanted: Sequence[bool]
) -> float:
    """Each gradient takes what the convolution itself does; torch counts that of the weight once for each group."""
    places = inputs if transposed else goal
    return 2 * weight.numel() * len(places) * places[0, 0].numel() * sum(wanted[:2])


COUNTS: dict[str, Callable[..., float]] = {
    "linalg_cholesky_ex": lambda args: _cholesky(args[0]),
    "linalg_solve_triangular": lambda args: _triangular(args[0], args[1]),
    "_linalg_eigh": lambda args: _eigh(args[0]),
    "_linalg_svd": lambda args: _svd(args[0]),
    "linalg_qr": lambda args: _qr(args[0]),
    "convolution_backward": lambda args: _convolution_backward(*args[:3], args[7], args[10]),
}  #: textbook operation counts (Golub and Van Loan), leading terms


class FlopCount(TorchDispatchMode):
    """While it is entered, counts the FLOPs of matrix products and factorisations in ``total``."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0.0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if args and isinstance(args[0], FakeTensor):
            return result
        if (count := COUNTS.get(packet.__name__)) is not None:
            self.total += count(args)
        elif packet in flop_registry:
            self.total += flop_registry[packet](*args, **(kwargs or {}), out_val=result)
        return result


def source_version() -> str:
    """A short hash of the package's sources."""
    root = Path(dagrow.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()[:10]


def read(path: Path) -> list[dict[str, Any]]:
    """The runs in a results file, one JSON object a line; none if there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()] if path.exists() else []


def append(path: Path, run: Mapping[str, Any]) -> None:
    """Adds a finished run to a results file."""
    with path.open("a") as file:
        file.write(json.dumps(run) + "\n")


def in_own_process(arguments: Sequence[str], limit: float, failure: str) -> tuple[dict[str, Any], float]:
    """What a script prints in a process of its own.

    Args:
        arguments: the script, and what it is called with.
        limit: seconds.
        failure: what to call the reason, if it does not end well.

    Returns:
        The JSON objects in its output as one, also where it did not end; the seconds that it took.
    """
    result: dict[str, Any] = {}
    start = time.perf_counter()
    try:
        done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=limit, check=False)
        text = done.stdout
        if done.returncode:
            result[failure] = f"ended with {done.returncode}: {done.stderr[-300:]}"
    except subprocess.TimeoutExpired as expired:
        result[failure] = f"did not end in {limit:.0f} s"
        text = expired.stdout.decode() if isinstance(expired.stdout, bytes) else expired.stdout or ""
    for line in text.splitlines():
        if line.startswith("{"):
            result |= json.loads(line)
    return result, time.perf_counter() - start


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return math.fsum(values) / len(values)


def sd(values: Iterable[float]) -> float:
    """The standard deviation of a sample; nan for a single value."""
    values = list(values)
    middle = mean(values)
    return math.sqrt(math.fsum((v - middle) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else math.nan


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> tuple[float, float, int]:
    """Mean difference over the seeds that both have, its standard error, and the number of seeds."""
    seeds = sorted(set(ours) & set(theirs))
    if not seeds:
        return math.nan, math.nan, 0
    differences = [ours[seed] - theirs[seed] for seed in seeds]
    return mean(differences), sd(differences) / math.sqrt(len(seeds)), len(seeds)


def plus_minus(values: Sequence[float], digits: int) -> str:
    """Mean and standard deviation."""
    return f"{mean(values):.{digits}f} ± {sd(values):.{digits}f}" if len(values) > 1 else f"{values[0]:.{digits}f}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, the first column to the left and the others to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_block(path: Path, script: str, text: str) -> None:
    """Puts text between the script's two marks in a document, which is made if there is none."""
    start, end = START.format(script), END.format(script)
    document = path.read_text() if path.exists() else f"{start}\n{end}\n"
    before, _, rest = document.partition(start)
    _, _, after = rest.partition(end)
    path.write_text(f"{before}{start}\n\n{text}\n\n{end}{after}")


def options(description: str | None, variants: Iterable[str], seeds: str) -> argparse.ArgumentParser:
    """What every study can be asked for."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="results, one JSON object a line")
    parser.add_argument("--seeds", type=_seeds, default=seeds, help=f"first-last, {seeds} if not given")
    parser.add_argument(
        "--variants", type=lambda text: text.split(","), default=list(variants), help=", ".join(variants)
    )
    parser.add_argument("--table", type=Path, help="document to write the tables into")
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    return parser


def _seeds(text: str) -> range:
    first, _, last = text.partition("-")
    return range(int(first), int(last or first) + 1)


def study(
    arguments: argparse.Namespace,
    run: Callable[[tuple], dict[str, Any]],
    tasks: Iterable[tuple],
    script: str,
    tables: Callable[[list[dict[str, Any]]], str],
) -> None:
    """Runs tasks in processes, keeps each result at once, and writes the tables if that was asked for."""
    with multiprocessing.get_context("spawn").Pool(arguments.jobs) as pool:
        for result in pool.imap_unordered(run, tasks):
            append(arguments.out, result)
            print(f"{result['variant']}, seed {result['seed']}: test loss {result['test_loss']:.4f}", flush=True)
    if arguments.table:
        write_block(arguments.table, script, tables(read(arguments.out)))
