"""Whatever README, docs and examples show runs as it is printed."""

import dataclasses
import doctest
import importlib
import inspect
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)#]+?)(?:#[^)]*)?\)")


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """Code blocks of a page with the number of their first line."""
    text = page.read_text()
    found = re.finditer(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [(text[: match.start(1)].count("\n") + 1, match[1]) for match in found]


def run(page: Path, line: int, code: str, names: dict[str, Any]) -> None:
    """Runs a block; a failure points into the page."""
    exec(compile("\n" * (line - 1) + code, str(page), "exec"), names)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_examples_hold_what_they_assert(example: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = example.read_text()
    assert source.count("\n") < 80
    assert "\nassert " in source or "\n    assert " in source
    runpy.run_path(str(example), run_name="__main__")
    assert capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_python_blocks_run_one_after_the_other(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": page.stem}
    torch.manual_seed(0)
    found = blocks(page, "python")
    for line, code in found:
        run(page, line, code, names)
    assert len(found) == page.read_text().count("```python")


def test_the_loop_of_the_readme_trains_and_grows() -> None:
    torch.manual_seed(0)
    x = torch.randn(600, 5)
    y = torch.sin(x @ torch.randn(5, 4))
    batches = list(zip(x.split(100), y.split(100), strict=True))
    model = nn.Sequential(nn.Linear(5, 1), nn.Tanh(), nn.Linear(1, 4))
    names: dict[str, Any] = {
        "torch": torch,
        "model": model,
        "loader": batches[:5],
        "held_out": batches[5:],
        "example": x[:2],
        "loss": nn.functional.mse_loss,
        "epochs": 15,
        "learning_rate": 1e-2,
    }
    found = blocks(ROOT / "README.md", "diff")
    assert len(found) == 2
    for line, code in found:
        width = len(model[0].weight)
        assert not re.search(r"^-", code, re.MULTILINE), "growing takes nothing out of a loop"
        run(ROOT / "README.md", line, re.sub(r"^[+ ] ", "", code, flags=re.MULTILINE), names)
        assert len(model[0].weight) > width


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_links_lead_to_files(page: Path) -> None:
    links = [link for link in LINK.findall(page.read_text()) if "://" not in link]
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing


DOORS = sorted(str(path.parent.relative_to(ROOT)).replace("/", ".") for path in (ROOT / "dagrow").rglob("__init__.py"))


@pytest.mark.parametrize("door", DOORS)
def test_the_example_of_a_door_runs(door: str) -> None:
    torch.manual_seed(0)
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    result = doctest.testmod(importlib.import_module(door), optionflags=options)
    assert result.attempted > 1
    assert not result.failed


@pytest.mark.parametrize("door", ["dagrow", "dagrow.operators", "dagrow.layers", "dagrow.testing"])
def test_what_users_name_says_what_it_takes(door: str) -> None:
    module = importlib.import_module(door)
    for name in module.__all__:
        item = getattr(module, name)
        if inspect.isfunction(item):
            takes = len(inspect.signature(item).parameters) > 1
        elif inspect.isclass(item):
            takes = dataclasses.is_dataclass(item) and len(dataclasses.fields(item)) > 0
        else:
            continue
        text = inspect.getdoc(item) or ""
        assert text, f"{door}.{name} has no docstring"
        assert not takes or re.search("^(Args|Attributes):", text, re.MULTILINE), f"{door}.{name} does not say"
