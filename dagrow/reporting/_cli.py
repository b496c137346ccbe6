"""The command line: ``dagrow demo`` and ``dagrow inspect``."""

import argparse
import importlib
import os
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from functools import partial, reduce
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from dagrow.errors import DagrowError
from dagrow.graph import Dag, trace
from dagrow.pictures import check_figure, check_place, write
from dagrow.reporting._data import Dataset, digits, mnist
from dagrow.reporting._demo import DIGITS, MNIST, Config, Run, run
from dagrow.reporting._demo_report import ahead, comparison, cost, drawn, equal, found, setting, write_page

WRONG, INTERRUPTED = 2, 130
ITSELF = "(the model itself)"
DTYPES = {name: getattr(torch, name) for name in ("float", "double", "half", "bfloat16", "long", "int", "bool")}


class CommandError(DagrowError):
    """What the user gave does not work."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: its name and options; by default those that the process was started with.

    Returns:
        The exit code: 0, 2 for what was given wrong, 130 when interrupted, 1 when nobody reads on.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help(sys.stderr)
        return WRONG
    try:
        arguments.run(arguments)
        sys.stdout.flush()
    except DagrowError as error:
        print(f"dagrow {arguments.command}: {_line(error)}", file=sys.stderr)
        return WRONG
    except KeyboardInterrupt:
        print(f"dagrow {arguments.command}: interrupted.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader, head for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dagrow", description="Grows PyTorch networks where they are too small, in closed form, during training."
    )
    parser.add_argument("--version", action="version", version=f"dagrow {_version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    demo = commands.add_parser(
        "demo",
        help="make a trained network larger, and compare it with other ways to go on",
        description="Trains a small network until it stops improving. Then, for several budgets of further steps: it "
        "goes on as it is, a large one is trained from scratch, and it is made as large as that with random neurons, "
        "with copies (Net2Net) and with dagrow.enlarge. Prints a table, draws a figure and writes a page.",
    )
    data = "a folder with MNIST's four IDX files, gzipped or not (default: the digits bundled with scikit-learn)"
    demo.add_argument("--data", type=Path, metavar="DIR", help=data)
    seed = "the first, of the split, weights, batches and random neurons (default: 0); the same seed gives the same run"
    demo.add_argument("--seed", type=lambda text: _whole(text, 0, 2**31), default=0, metavar="N", help=seed)
    seeds = "how many, one after the other (default: 1)"
    demo.add_argument("--seeds", type=lambda text: _whole(text, 1, 1000), default=1, metavar="N", help=seeds)
    file = "where to save the figure; its ending is its format (default: ./dagrow-demo.png)"
    demo.add_argument("--figure", type=Path, default=Path("dagrow-demo.png"), metavar="FILE", help=file)
    page = "where to save the page (default: ./dagrow-demo.html)"
    demo.add_argument("--page", type=Path, default=Path("dagrow-demo.html"), metavar="FILE", help=page)
    demo.set_defaults(run=_demo)
    inspect = commands.add_parser(
        "inspect",
        help="show what can grow in a model, and what cannot and why",
        description="Traces a model and prints its edges (layers) and axes (hidden widths). Changes nothing.",
        epilog="example: dagrow inspect torchvision.models:resnet18 --input 1,3,224,224",
    )
    target = "a model, or a class or function that makes one without arguments; modules are also looked for in the "
    inspect.add_argument("target", metavar="MODULE:NAME", help=target + "current directory")
    shape = f"shape of an example input, batch first: 1,784, or 2,16:long for another type ({', '.join(DTYPES)}); "
    once = "once per input (default: guessed from the first layer)"
    inspect.add_argument("--input", action="append", type=_shape, metavar="SHAPE", dest="inputs", help=shape + once)
    inspect.set_defaults(run=_inspect)
    return parser


def _version() -> str:
    try:
        return version("dagrow")
    except PackageNotFoundError:
        return "(not installed)"


def _whole(text: str, low: int, high: int) -> int:
    if not text.isdecimal() or not low <= int(text) <= high:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} to {high}")
    return int(text)


def _shape(text: str) -> Tensor:
    """A random input of the shape and type that ``text`` names, every time the same."""
    sizes, _, name = text.partition(":")
    parts = [part.strip() for part in sizes.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a shape; give sizes above 0 such as 1,784 or 2,16:long")
    if (name or "float") not in DTYPES:
        raise argparse.ArgumentTypeError(f"{text!r} ends in no type of {', '.join(DTYPES)}")
    shape, dtype, generator = [int(part) for part in parts], DTYPES[name or "float"], torch.Generator().manual_seed(0)
    try:
        if dtype.is_floating_point:
            return torch.randn(shape, generator=generator).to(dtype)
        return torch.randint(0, 2, shape, generator=generator).to(dtype)
    except (RuntimeError, OverflowError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is too large an input") from error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _say(console: Console, text: str) -> None:
    """Prose, wrapped where it is easy to read."""
    for paragraph in text.split("\n"):
        print(textwrap.fill(paragraph, min(console.width, 100), break_long_words=False))


def _demo(arguments: argparse.Namespace) -> None:
    check_figure(arguments.figure)
    check_place(arguments.page)
    folder, seeds = arguments.data, range(arguments.seed, arguments.seed + arguments.seeds)
    config, load = (DIGITS, digits) if folder is None else (MNIST, partial(mnist, folder))
    data, console = load(seeds[0]), Console(highlight=False)
    _say(console, f"{setting(data, config)}\n")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # layers this small are no faster on more, and one repeats exactly
    try:
        runs = _runs(console, load, config, seeds)
    finally:
        torch.set_num_threads(threads)
    print()
    console.print(comparison(runs, config))
    _say(console, "\n".join((ahead(runs, config), cost(runs), equal(config))))
    drawing = drawn(runs, data, config)
    write(drawing, arguments.figure)
    write_page(runs, data, config, drawing, arguments.page)
    _say(console, f"\nFigure: {arguments.figure}\nPage: {arguments.page}")


def _runs(console: Console, load: Callable[[int], Dataset], config: Config, seeds: Sequence[int]) -> list[Run]:
    """One for each seed, with a bar on terminals and a line for each that is over."""
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
    runs: list[Run] = []
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=len(seeds))
        for seed in seeds:

            def heard(doing: str, done: float, seed: int = seed) -> None:
                bar.update(task, description=f"seed {seed}: {doing}", completed=len(runs) + done)

            runs.append(run(load(seed), config, seed, heard))
            console.print(found(runs[-1]))
    return runs


def _inspect(arguments: argparse.Namespace) -> None:
    model = _model(arguments.target)
    try:
        dag = trace(model, tuple(arguments.inputs or ()) or None)
    except DagrowError as error:
        raise CommandError(f"{_line(error)}{'' if arguments.inputs else ' Here: give --input.'}") from error
    except Exception as error:  # whatever a model does with inputs that do not suit it
        cause = f"{type(error).__name__}: {_line(error)}"
        raise CommandError(f"{arguments.target} cannot be traced with these inputs: {cause}") from error
    print(dag.describe(max(Console().width, 60)), "", *_summary(dag), sep="\n")


def _summary(dag: Dag) -> Iterable[str]:
    growing = sum(axis.growable for axis in dag.axes)
    yield f"{dag.parameter_count():,} parameters; {growing} of {len(dag.axes)} axes can grow."
    names: dict[str, list[str]] = {}
    for kind, parts in (("axis", dag.axes), ("edge", dag.edges)):
        for part in parts:
            if not part.growable:
                names.setdefault(part.reason or "unknown", []).append(f"{kind} {part.name or ITSELF}")
    if names:
        yield "Cannot grow:"
    yield from (f"  {', '.join(frozen)}: {reason}" for reason, frozen in names.items())


def _model(target: str) -> nn.Module:
    """What ``module:name`` names, called if it is not a model already."""
    module, _, attribute = target.partition(":")
    if not all(f"{module}.{attribute}".split(".")):
        raise CommandError(f"{target!r} does not name a model; give module:name, such as mypackage.models:make.")
    try:
        named: object = reduce(getattr, attribute.split("."), _imported(module))
    except AttributeError as error:
        raise CommandError(f"module {module!r} has no {attribute!r}.") from error
    if isinstance(named, nn.Module):
        return named
    if not callable(named):
        raise CommandError(f"{target} is a {type(named).__name__}, neither a model nor something that makes one.")
    try:
        model = named()
    except (Exception, SystemExit) as error:
        raise CommandError(f"{target}() raised {type(error).__name__}: {_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise CommandError(f"{target}() returned a {type(model).__name__}, not a torch.nn.Module.")
    return model


def _imported(name: str) -> ModuleType:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) and error.name else ""
        if missing and f"{name}.".startswith(f"{missing}."):
            raise CommandError(f"there is no module {missing!r} (looked in the current directory as well).") from error
        cause = _line(error) if isinstance(error, ModuleNotFoundError) else f"{type(error).__name__}: {_line(error)}"
        raise CommandError(f"module {name!r} cannot be imported: {cause}") from error
