"""The rooms of the package: who may import whom, and by which door."""

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "dagrow"
SUPPORT = {"errors", "_pytree", "_model_state", "_comparison", "_text", "_log", "_progress", "_version"}
MAY: dict[str, set[str]] = {room: set(SUPPORT) for room in (*SUPPORT, "solvers", "tracing", "layers", "pictures")}
MAY["axes"] = SUPPORT | {"tracing", "layers"}
MAY["graph"] = MAY["axes"] | {"axes"}
MAY["statistics"] = MAY["graph"] | {"graph", "solvers"}
MAY["surgery"] = MAY["statistics"] | {"statistics"}
MAY["operators"] = SUPPORT | {"surgery", "statistics", "graph", "axes", "layers", "solvers"}
MAY["growing"] = SUPPORT | {"operators", "surgery", "statistics", "graph", "solvers", "pictures"}
MAY["reporting"] = SUPPORT | {"graph", "growing", "operators", "pictures", "surgery"}
MAY["testing"] = MAY["surgery"] | {"surgery", "operators", "growing"}


def imports(path: Path) -> Iterator[str]:
    """The modules of the package that a file imports, as dotted names below it."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        yield from (name.removeprefix("dagrow.") for name in names if name.split(".")[0] == "dagrow")


def test_rooms_import_downwards_and_through_their_doors() -> None:
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for name in imports(path) if not room.startswith("__") else ():
            other, *inside = name.split(".")
            assert other == room or other in MAY[room], f"{path} imports {name}, which is not below it"
            leaf = inside and inside[-1].startswith("_")
            assert other == room or not leaf, f"{path} imports {name} past the door of its room"
