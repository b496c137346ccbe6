"""The command line as its user sees it: exit codes, messages, files."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import entry_points

import pytest
import torch
from demo_runs import TINY
from idx_files import write_mnist

from dagrow.reporting import main
from dagrow.reporting._cli import DTYPES, _shape
from dagrow.reporting._data import NAMES

MODELS = """
import torch
from torch import nn

built = nn.Linear(4, 3)
number = 7
made = []

class Net(nn.Module):
    def __init__(self, width=5):
        super().__init__()
        made.append(self)
        self.enter, self.leave = nn.Linear(8, width), nn.Linear(width, 2)

    def forward(self, x):
        return self.leave(torch.relu(self.enter(x)))

class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.one, self.two = nn.Embedding(9, 4), nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, tokens, scale):
        return self.two(torch.relu(self.one(self.table(tokens)))) * scale

class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Linear(3, 3)

    def forward(self, x):
        if x.sum() > 0:
            return self.one(x)
        return x

def raises():
    raise ValueError("first line\\nsecond line")

def leaves():
    raise SystemExit(3)

def needs(width):
    return Net(width)

def text():
    return "a network"

def interrupts():
    raise KeyboardInterrupt
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder of its own with a module of models, as the current directory."""
    (tmp_path / "their_models.py").write_text(MODELS)
    (tmp_path / "broken_models.py").write_text("import not_a_module_at_all\n")
    (tmp_path / "wrong_models.py").write_text("def f(:\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("COLUMNS", "100")
    yield tmp_path
    for name in ("their_models", "broken_models", "wrong_models"):
        sys.modules.pop(name, None)


def refused(capsys, *argv: str) -> str:
    """The one line that a refused command leaves on stderr."""
    try:
        code = main(argv)
    except SystemExit as left:
        code = left.code
    captured = capsys.readouterr()
    assert code == 2
    assert "Traceback" not in captured.out + captured.err
    return captured.err.strip().splitlines()[-1]


def test_inspect_prints_the_dag_and_counts(here, capsys):
    assert main(["inspect", "their_models:Net", "--input", "1,8"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "Dag(Net, 2 edges, 2 axes, 1 growable)" in captured.out
    assert (
        "57 parameters; 1 of 2 axes can grow.\nCannot grow:\n  axis leave: is an output of the model\n" in captured.out
    )
    assert "8 -> 5" in captured.out
    assert max(map(len, captured.out.splitlines())) <= 100


def test_inspect_takes_a_model_as_it_is(here, capsys):
    assert main(["inspect", "their_models:built", "--input", "1,4"]) == 0
    out = capsys.readouterr().out
    assert "15 parameters; 0 of 1 axes can grow.\nCannot grow:\n  axis (the model itself): is an output" in out


def test_inspect_guesses_the_input_or_asks_for_it(here, capsys):
    assert main(["inspect", "their_models:Net"]) == 0
    assert "1 of 2 axes can grow" in capsys.readouterr().out
    assert refused(capsys, "inspect", "their_models:Words").endswith("give --input.")


def test_inspect_says_why_something_cannot_grow(here, capsys):
    assert main(["inspect", "their_models:Words", "--input", "2,7:long", "--input", "2,7,2"]) == 0
    out = capsys.readouterr().out
    assert "80 parameters; 1 of 2 axes can grow.\nCannot grow:\n  axis two: is an input of the model" in out


def test_inspect_changes_nothing_and_makes_one_model(here, capsys):
    main(["inspect", "their_models:Net", "--input", "1,8"])
    assert len(sys.modules["their_models"].made) == 1
    assert sys.modules["their_models"].Net(6).enter.out_features == 6


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("their_models", "does not name a model; give module:name"),
        (":Net", "does not name a model"),
        ("their_models:", "does not name a model"),
        ("their..models:Net", "does not name a model"),
        ("no_such_module_here:Net", "there is no module 'no_such_module_here'"),
        ("their_models.deeper:Net", "there is no module 'their_models.deeper'"),
        ("broken_models:Net", "cannot be imported: No module named 'not_a_module_at_all'"),
        ("wrong_models:Net", "cannot be imported: SyntaxError"),
        ("their_models:Nets", "module 'their_models' has no 'Nets'"),
        ("their_models:number", "is a int, neither a model nor something that makes one"),
        ("their_models:raises", "their_models:raises() raised ValueError: first line second line"),
        ("their_models:leaves", "raised SystemExit: 3"),
        ("their_models:needs", "raised TypeError"),
        ("their_models:text", "returned a str, not a torch.nn.Module"),
    ],
)
def test_what_is_no_model_is_one_line(here, capsys, target, says):
    line = refused(capsys, "inspect", target, "--input", "1,8")
    assert line.startswith("dagrow inspect: ")
    assert says in line


def test_a_model_that_does_not_take_the_input_is_one_line(here, capsys):
    assert refused(capsys, "inspect", "their_models:Net", "--input", "1,9").startswith("dagrow inspect: ")
    assert refused(capsys, "inspect", "their_models:Words", "--input", "2,7:long").startswith("dagrow inspect: ")
    assert refused(capsys, "inspect", "their_models:Words", "--input", "2,7", "--input", "2,7,2")


def test_a_model_that_reads_values_is_shown_with_what_was_fixed(here, capsys):
    assert main(["inspect", "their_models:Branching", "--input", "2,3"]) == 0
    assert "Fixed while tracing: bool reads a value" in capsys.readouterr().out


@pytest.mark.parametrize(
    "shape", ["", "1,", "a,2", "1x8", "0,8", "-1,8", "1,8:complex", "1.5", "99999999999,99999999999"]
)
def test_bad_shapes_are_refused(here, capsys, shape):
    line = refused(capsys, "inspect", "their_models:Net", f"--input={shape}")
    assert "--input" in line
    assert repr(shape) in line


@pytest.mark.parametrize("name", DTYPES)
def test_inputs_have_the_type_that_was_asked_for(name):
    tensor = _shape(f"2, 3:{name}")
    assert tensor.shape == (2, 3)
    assert tensor.dtype == DTYPES[name]
    assert _shape("4").dtype == torch.float32


def test_ctrl_c_is_one_line_and_130(here, capsys):
    assert main(["inspect", "their_models:interrupts"]) == 130
    captured = capsys.readouterr()
    assert captured.err == "dagrow inspect: interrupted.\n"


def test_ctrl_c_in_the_demo_is_one_line_and_130(here, capsys, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    threads = torch.get_num_threads()
    monkeypatch.setattr("dagrow.reporting._cli.run", interrupted)
    assert main(["demo"]) == 130
    assert capsys.readouterr().err == "dagrow demo: interrupted.\n"
    assert torch.get_num_threads() == threads
    assert not (here / "dagrow-demo.png").exists()


def test_no_command_shows_the_help(capsys):
    assert main([]) == 2
    assert "demo" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--help"], ["demo", "--help"], ["inspect", "--help"], ["--version"]])
def test_help_is_asked_for_and_given(capsys, argv):
    with pytest.raises(SystemExit) as left:
        main(argv)
    assert left.value.code == 0
    assert "dagrow" in capsys.readouterr().out


@pytest.mark.parametrize("seed", ["-1", "x", "1.5", str(2**32)])
def test_bad_seeds_are_refused(capsys, seed):
    assert "--seed" in refused(capsys, "demo", f"--seed={seed}")


@pytest.mark.parametrize("seeds", ["0", "-2", "many"])
def test_bad_numbers_of_seeds_are_refused(capsys, seeds):
    assert "--seeds" in refused(capsys, "demo", f"--seeds={seeds}")


def test_the_demo_runs_on_digits_draws_and_writes_a_page(here, capsys, monkeypatch):
    monkeypatch.setattr("dagrow.reporting._cli.DIGITS", TINY)
    assert main(["demo", "--seed", "3", "--seeds", "2", "--figure", "mine.png", "--page", "mine.html"]) == 0
    out = capsys.readouterr().out
    assert (here / "mine.png").read_bytes().startswith(b"\x89PNG")
    assert "dagrow.enlarge" in (here / "mine.html").read_text()
    for part in (
        "10,359 images",
        "random neurons",
        "from scratch",
        "Equal in all arms",
        "Figure: mine.png",
        "mine.html",
    ):
        assert part in " ".join(out.split())
    assert re.findall(r"^seed (\d): stopped improving after", out, re.MULTILINE) == ["3", "4"]


def test_the_demo_runs_on_idx_files_and_repeats(here, capsys, monkeypatch):
    monkeypatch.setattr("dagrow.reporting._cli.MNIST", replace(TINY, most=100))
    write_mnist(here, zipped=True)
    texts = []
    for _ in range(2):
        assert main(["demo", "--data", str(here), "--seed", "5", "--seeds", "1"]) == 0
        texts.append(re.sub(r"Steps do not count.*?\.\nEqual", "", capsys.readouterr().out, flags=re.DOTALL))
    assert texts[0] == texts[1]
    assert "A network 16-4-5-3" in " ".join(texts[0].split())
    assert (here / "dagrow-demo.png").stat().st_size > 5000
    assert (here / "dagrow-demo.html").stat().st_size > 5000


def test_bad_data_is_one_line(here, capsys):
    assert "is not a folder" in refused(capsys, "demo", "--data", "nowhere")
    assert f"lacks {NAMES[0]}" in refused(capsys, "demo", "--data", ".")
    write_mnist(here)
    path = here / NAMES[0]
    path.write_bytes(path.read_bytes()[:-5])
    assert "is truncated" in refused(capsys, "demo", "--data", ".")
    write_mnist(here, train=4, test=4)
    assert "too few" in refused(capsys, "demo", "--data", ".")


def test_a_bad_figure_is_refused_before_anything_runs(here, capsys, monkeypatch):
    monkeypatch.setattr("dagrow.reporting._cli.run", None)
    assert "must end in" in refused(capsys, "demo", "--figure", "figure.doc")
    assert "there is no folder" in refused(capsys, "demo", "--figure", "no/figure.png")
    assert "there is no folder" in refused(capsys, "demo", "--page", "no/page.html")


@pytest.mark.parametrize("missing", ["sklearn", "matplotlib"])
def test_missing_extras_are_named(here, capsys, monkeypatch, missing):
    for name in [name for name in sys.modules if name.split(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    assert 'pip install "dagrow[demo]"' in refused(capsys, "demo")


def test_a_process_needs_no_extras_to_inspect_and_survives_ascii(here):
    code = (
        "import sys; sys.modules['sklearn'] = sys.modules['matplotlib'] = None; "
        "from dagrow.reporting import main; sys.exit(main(['inspect', 'their_models:Net', '--input', '1,8']))"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "57 parameters" in done.stdout


def test_python_m_dagrow_is_the_same_command(here):
    done = subprocess.run([sys.executable, "-m", "dagrow", "inspect", "nowhere:Net"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.strip().splitlines() == [
        "dagrow inspect: there is no module 'nowhere' (looked in the current directory as well)."
    ]


def test_the_script_is_installed():
    scripts = [script for script in entry_points(group="console_scripts") if script.name == "dagrow"]
    assert not scripts or scripts[0].value == "dagrow.reporting:main"
