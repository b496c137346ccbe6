"""The interactive page: its data, and what a browser makes of it."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from histories import grown_history

from dagrow import History

history = pytest.fixture(scope="module")(grown_history)


def page(history: History, path: Path) -> tuple[str, Any]:
    """The page, and the data in it."""
    history.html(path)
    text = path.read_text()
    return text, json.loads(re.findall(r"^const data = (.*);$", text, re.MULTILINE)[0].replace("<\\/", "</"))


def test_the_page_holds_everything_and_loads_nothing(history: History, tmp_path: Path) -> None:
    text, data = page(history, tmp_path / "page.html")
    assert set(re.findall(r"https?://[^\"' ]+", text)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<link|<script src|<img|@import|url\(|fetch\(", text)
    assert data["growths"] == history.growths()
    assert [step["train_loss"] for step in data["steps"]] == [record.train_loss for record in history]
    assert data["over"] == history.over
    assert len(data["bars"]) == len(history.snapshots[-1].activations)


def test_names_and_numbers_cannot_break_the_page(history: History, tmp_path: Path) -> None:
    strange = replace(history[0], widths={"</script><b>": 1}, train_loss=float("inf"))
    text, data = page(replace(history, steps=(strange,)), tmp_path / "page.html")
    assert text.count("</script>") == 1
    assert data["steps"][0]["widths"] == {"</script><b>": 1}
    assert data["steps"][0]["train_loss"] is None


def test_the_page_is_whole(history: History, tmp_path: Path) -> None:
    """Every place that the script fills is there once, and nothing else is asked for."""
    text, data = page(history, tmp_path / "page.html")
    script = text[text.index("<script>") : text.index("</script>")]
    ids = re.findall(r'id="(\w+)"', text)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'\$\("(\w+)"\)', script)) == set(ids)
    for opening, closing in ("()", "[]", "{}"):
        assert script.count(opening) == script.count(closing)
    for bar in data["bars"]:
        assert len(bar["heights"]) == len(bar["stages"])
        assert data["bottom"] <= bar["y"] <= data["top"]
        assert bar["x"] < data["columns"]
    for arrow in data["arrows"]:
        assert (arrow["peak"] is None) == (data["bars"][arrow["target"]]["x"] - data["bars"][arrow["source"]]["x"] == 1)


def test_a_browser_draws_it(history: History, tmp_path: Path) -> None:
    """Where one is installed; elsewhere the test above has to do."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium is installed; test_the_page_is_whole looks at what it would be given")
    _, data = page(history, tmp_path / "page.html")
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", str(tmp_path / "page.html")]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    dom = re.sub(r"<script>.*</script>", "", dom, flags=re.DOTALL)
    assert dom.count('<g class="bar">') == len(data["bars"])
    assert dom.count("<rect ") == sum(len(bar["stages"]) for bar in data["bars"])
    assert dom.count("<tr") == 1 + len(data["growths"])
    assert dom.count("<h2>") == 4
    assert f"Growing ended: {history.over}." in dom
    assert not re.search("NaN|undefined|Infinity", dom)
