"""The house: data flows one way through the rooms, and a file can be read in one sitting."""

from __future__ import annotations

import ast
from pathlib import Path

import lorica

SOURCE = Path(lorica.__file__).parent

#: Each room may use those before it and none behind it.
ROOMS = [
    "_version",
    "errors",
    "lowrank",
    "kernels",
    "files",
    "layout",
    "engines",
    "init",
    "config",
    "storage",
    "routing",
    "ops",
    "variants",
    "layers",
    "targets",
    "adapt",
    "checkpoint",
    "combine",
    "ranks",
    "optim",
    "model",
    "calibration",
    "parallel",
    "merge",
    "export",
    "convert",
    "helpers",
    "__init__",
    "compat",
    "train",
    "bench",
    "cli",
    "__main__",
]


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports(tree: ast.Module) -> set[str]:
    """Modules of lorica that a file imports when it runs, at its top or later."""
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "lorica":
            whole = node.module == "lorica"
            found |= {f"lorica.{alias.name}" for alias in node.names} if whole else {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.partition(".")[0] == "lorica"}
    return found


def test_every_room_is_on_the_plan():
    names = {path.stem for path in SOURCE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert names == set(ROOMS)


def test_no_room_uses_one_behind_it():
    back = []
    for path in SOURCE.rglob("*.py"):
        room = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        for module in imports(ast.parse(path.read_text())):
            used = room_of(module)
            used = used if used in ROOMS else "__init__"  # a public name: from lorica import LoraConfig
            if ROOMS.index(used) > ROOMS.index(room):
                back.append(f"{path.relative_to(SOURCE)} imports {module}")
    assert back == []


def test_no_file_is_longer_than_a_sitting():
    long = {str(path.relative_to(SOURCE)): len(path.read_text().splitlines()) for path in SOURCE.rglob("*.py")}
    assert {name: lines for name, lines in long.items() if lines > 500} == {}


def test_the_core_does_not_import_peft():
    """The drop-in may, to be what peft's users check for; so may what runs it to compare with; nothing else."""
    for path in SOURCE.rglob("*.py"):
        if path.relative_to(SOURCE).parts[0] in ("compat", "bench"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert "peft" not in {name.partition(".")[0] for name in names}, path


def test_names_of_test_files_are_unique():
    """Test files and their helpers are imported by their last names: of two with one name the second is the first."""
    folder = Path(__file__).parent
    files: dict[str, list[str]] = {}
    for path in folder.rglob("*.py"):
        if path.name not in ("__init__.py", "conftest.py"):
            files.setdefault(path.name, []).append(str(path.relative_to(folder)))
    assert {name: places for name, places in files.items() if len(places) > 1} == {}
