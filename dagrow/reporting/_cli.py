"""The command line: ``dagrow demo`` and ``dagrow inspect``."""

import argparse
import importlib
import os
import sys
import textwrap
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from dagrow.errors import DagrowError
from dagrow.graph import Dag, trace
from dagrow.pictures import check_figure
from dagrow.reporting._data import Dataset, digits, mnist
from dagrow.reporting._demo import Config, Run, Step, compare
from dagrow.reporting._demo_report import comparison, ending, equal, figure, legend, refusals, step_head, step_line

WRONG, INTERRUPTED = 2, 130
ITSELF = "(the model itself)"
DIGITS, MNIST = Config(epochs=30, growing=20, batch=32), Config(epochs=12, growing=8, batch=128)
DTYPES = {
    "float": torch.float32,
    "double": torch.float64,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
    "long": torch.int64,
    "int": torch.int32,
    "bool": torch.bool,
}


class CommandError(Exception):
    """What the user gave does not work."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code: 0, 2 for what was given wrong, 130 when interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    parser = _parser()
    given = parser.parse_args(argv)
    if given.run is None:
        parser.print_help(sys.stderr)
        return WRONG
    try:
        code: int = given.run(given)
        sys.stdout.flush()
        return code
    except (CommandError, DagrowError) as error:
        print(f"dagrow {given.command}: {_line(error)}", file=sys.stderr)
        return WRONG
    except KeyboardInterrupt:
        print(f"dagrow {given.command}: interrupted.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader, head for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dagrow", description="Grows PyTorch networks where they are too small, in closed form, during training."
    )
    parser.add_argument("--version", action="version", version=f"dagrow {_version()}")
    parser.set_defaults(run=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    _add_demo(commands)
    _add_inspect(commands)
    return parser


def _add_demo(commands: Any) -> None:
    demo = commands.add_parser(
        "demo",
        help="watch a network grow that nobody sized, and compare it",
        description="Grows a network with two hidden layers of one neuron each until no neuron is worth adding, then "
        "trains as long its twin with as many random neurons, and its last architecture from scratch.",
    )
    demo.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="a folder with MNIST's four IDX files, gzipped or not (default: the digits bundled with scikit-learn)",
    )
    demo.add_argument(
        "--seed",
        type=_seed,
        default=0,
        metavar="N",
        help="of the split, weights, batches and random neurons (default: 0); the same seed gives the same run",
    )
    demo.add_argument(
        "--figure",
        type=Path,
        default=Path("dagrow-demo.png"),
        metavar="FILE",
        help="where to save the figure; its ending is its format (default: ./dagrow-demo.png)",
    )
    demo.add_argument("--epochs", type=_positive, metavar="N", help="of training; growth is over after two thirds")
    demo.set_defaults(run=_demo)


def _add_inspect(commands: Any) -> None:
    inspect = commands.add_parser(
        "inspect",
        help="show what can grow in a model, and what cannot and why",
        description="Traces a model and prints its edges (layers) and axes (hidden widths). Changes nothing.",
        epilog="example: dagrow inspect torchvision.models:resnet18 --input 1,3,224,224",
    )
    inspect.add_argument(
        "target",
        metavar="MODULE:NAME",
        help="a model, or a class or function that makes one without arguments; modules are also looked for in the "
        "current directory",
    )
    inspect.add_argument(
        "--input",
        action="append",
        type=_shape,
        default=[],
        metavar="SHAPE",
        dest="inputs",
        help=f"shape of an example input, batch first: 1,784, or 2,16:long for another type ({', '.join(DTYPES)}); "
        "once per input (default: guessed from the first layer)",
    )
    inspect.set_defaults(run=_inspect)


def _version() -> str:
    try:
        return version("dagrow")
    except PackageNotFoundError:
        return "(not installed)"


def _seed(text: str) -> int:
    return _whole(text, 0, 2**32 - 1)


def _positive(text: str) -> int:
    return _whole(text, 1, 10**6)


def _whole(text: str, low: int, high: int) -> int:
    if not text.isdecimal() or not low <= int(text) <= high:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} to {high}")
    return int(text)


def _shape(text: str) -> Tensor:
    """A random input of the shape and type that ``text`` names."""
    sizes, _, name = text.partition(":")
    parts = [part.strip() for part in sizes.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a shape; give sizes above 0 such as 1,784 or 2,16:long")
    if (name or "float") not in DTYPES:
        raise argparse.ArgumentTypeError(f"{text!r} ends in no type of {', '.join(DTYPES)}")
    shape, kind = [int(part) for part in parts], DTYPES[name or "float"]
    try:
        return torch.randn(shape).to(kind) if kind.is_floating_point else torch.randint(0, 2, shape).to(kind)
    except (RuntimeError, OverflowError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is too large an input") from error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _demo(given: argparse.Namespace) -> int:
    check_figure(given.figure)
    data = digits(given.seed) if given.data is None else mnist(given.data, given.seed)
    config = _config(given)
    console = Console(highlight=False)
    _say(
        console,
        f"{data.name}: {len(data.train)} images to train on, {len(data.validation)} to validate, {len(data.test)} to "
        f"test; {data.features} pixels, {data.classes} classes. Hidden layers start with one neuron each; after each "
        f"of the first {config.growing} of {config.epochs} epochs, each is offered the neurons that are worth adding.",
    )
    with _threads(1):  # layers this small are no faster on more, and one repeats exactly
        runs = _compared(console, data, config)
    _conclude(console, data, config, runs)
    figure(runs, data, given.figure)
    _say(console, f"\nFigure: {given.figure}")
    return 0


def _config(given: argparse.Namespace) -> Config:
    preset = DIGITS if given.data is None else MNIST
    if given.epochs is not None:
        preset = replace(preset, epochs=given.epochs, growing=max(1, given.epochs * 2 // 3))
    return replace(preset, seed=given.seed)


@contextmanager
def _threads(number: int) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _compared(console: Console, data: Dataset, config: Config) -> list[Run]:
    bar = Progress(
        TextColumn("{task.description:<14}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("epochs"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task("", total=3 * config.epochs)

        def stepped(step: Step) -> None:
            _print(console, step_line(step, console.width))

        _print(console, "\n" + step_head(console.width))
        return compare(
            data,
            config,
            started=lambda name: bar.update(task, description=name),
            stepped=stepped,
            trained=lambda: bar.advance(task),
        )


def _conclude(console: Console, data: Dataset, config: Config, runs: Sequence[Run]) -> None:
    _say(console, f"{legend(console.width)}\n\n{ending(runs[0], config)}\n")
    console.print(comparison(runs, data))
    for run in runs:
        line = refusals(run)
        if line is not None:
            _say(console, line)
    _say(console, equal(data, config))


def _say(console: Console, text: str) -> None:
    """Prose, wrapped where it is easy to read."""
    for paragraph in text.split("\n"):
        _print(console, textwrap.fill(paragraph, min(console.width, 100), break_long_words=False))


def _print(console: Console, text: str) -> None:
    console.print(text, markup=False, soft_wrap=True)


def _inspect(given: argparse.Namespace) -> int:
    model = _model(given.target)
    dag = _traced(model, given)
    console = Console(highlight=False)
    _print(console, dag.describe(max(console.width, 60)))
    _print(console, "\n" + _summary(dag))
    return 0


def _traced(model: nn.Module, given: argparse.Namespace) -> Dag:
    try:
        return trace(model, tuple(given.inputs) or None)
    except DagrowError as error:
        _refuse(f"{_line(error)}{'' if given.inputs else ' Here: give --input.'}", error)
    except Exception as error:  # whatever a model does with inputs that do not suit it
        _refuse(f"{given.target} cannot be traced with these inputs: {type(error).__name__}: {_line(error)}", error)


def _summary(dag: Dag) -> str:
    growing = sum(axis.growable for axis in dag.axes)
    lines = [f"{dag.parameter_count():,} parameters; {growing} of {len(dag.axes)} axes can grow."]
    frozen = [(f"axis {axis.name or ITSELF}", axis.reason) for axis in dag.axes if not axis.growable]
    frozen += [(f"edge {edge.name or ITSELF}", edge.reason) for edge in dag.edges if not edge.growable]
    reasons: dict[str, list[str]] = {}
    for name, reason in frozen:
        reasons.setdefault(reason or "unknown", []).append(name)
    if reasons:
        lines.append("Cannot grow:")
        lines += [f"  {', '.join(names)}: {reason}" for reason, names in reasons.items()]
    return "\n".join(lines)


def _model(target: str) -> nn.Module:
    """What ``module:name`` names, called if it is not a model already."""
    name, _, attribute = target.partition(":")
    if not name or not attribute or any(not part for part in f"{name}.{attribute}".split(".")):
        raise CommandError(f"{target!r} does not name a model; give module:name, such as mypackage.models:make.")
    found: Any = _imported(name)
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise CommandError(f"module {name!r} has no {attribute!r}.")
        found = getattr(found, part)
    if isinstance(found, nn.Module):
        return found
    if not callable(found):
        raise CommandError(f"{target} is a {type(found).__name__}, neither a model nor something that makes one.")
    return _made(found, target)


def _imported(name: str) -> Any:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        if name == missing or name.startswith(f"{missing}."):
            _refuse(f"there is no module {missing!r} (looked in the current directory as well).", error)
        _refuse(f"module {name!r} cannot be imported: {_line(error)}", error)
    except (Exception, SystemExit) as error:
        _refuse(f"module {name!r} cannot be imported: {type(error).__name__}: {_line(error)}", error)


def _made(factory: Any, target: str) -> nn.Module:
    try:
        model = factory()
    except (Exception, SystemExit) as error:
        _refuse(f"{target}() raised {type(error).__name__}: {_line(error)}", error)
    if not isinstance(model, nn.Module):
        raise CommandError(f"{target}() returned a {type(model).__name__}, not a torch.nn.Module.")
    return model


def _refuse(message: str, cause: BaseException) -> NoReturn:
    raise CommandError(message) from cause
