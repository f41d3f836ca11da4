"""Draw the rooms of the house from the code's own imports: ``python docs/draw_rooms.py`` writes ``docs/rooms.png``."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import matplotlib as mpl

mpl.use("agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle

HERE = Path(__file__).parent
SOURCE = HERE.parent / "src" / "lorica"

#: Room → the question that its files answer, in the order in which data flows.
ROOMS = {
    "lowrank": "what do small matrices say of large ones?",
    "kernels": "what costs time, and how is it made cheap?",
    "files": "how are files written and read safely?",
    "layout": "how does a weight lie over ranks?",
    "engines": "who cut the model, where is this layer?",
    "init": "how do the factors start?",
    "config": "what does the user ask for?",
    "storage": "how is the base weight stored?",
    "routing": "whose is which row of a batch?",
    "ops": "what is the mathematics?",
    "variants": "what else may factors do?",
    "layers": "what stands in a base layer's place?",
    "targets": "which modules are meant?",
    "adapt": "how does an adapter get in and out?",
    "checkpoint": "which tensor has which name in a file?",
    "combine": "how do adapters become another one?",
    "ranks": "how do ranks stay equal?",
    "optim": "which steps suit factors?",
    "model": "what does the user hold?",
    "calibration": "what does data say of the start?",
    "parallel": "what does the user of many ranks call?",
    "merge": "how are files merged without a model?",
    "export": "how do other loaders want it?",
    "convert": "how does it move between systems?",
    "compat": "how do programs for others find it?",
    "train": "how is it trained?",
    "bench": "how fast is it, beside others?",
    "cli": "what does the terminal say?",
}


def imports_of(room: str) -> Counter[str]:
    """Count the imports of other rooms in the files of one."""
    found: Counter[str] = Counter()
    for path in (SOURCE / room).rglob("*.py"):
        tree = ast.parse(path.read_text())
        for_types = {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            for inner in ast.walk(node)
        }
        for node in ast.walk(tree):
            if id(node) in for_types:
                continue
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lorica."):
                used = (node.module or "").split(".")[1]
                if used in ROOMS and used != room:
                    found[used] += 1
    return found


def lines_of(room: str) -> int:
    """Count the lines of a room's files."""
    return sum(len(path.read_text().splitlines()) for path in (SOURCE / room).rglob("*.py"))


def main() -> None:
    """Draw a row for each room, with a square under every room that it imports, darker where there are more."""
    missing = {path.name for path in SOURCE.iterdir() if (path / "__init__.py").exists()} - ROOMS.keys()
    assert not missing, f"rooms without a question: {missing}"
    figure, axes = plt.subplots(figsize=(14, 8.5))
    names = list(ROOMS)
    for row, room in enumerate(names):
        axes.add_patch(Rectangle((row - 0.5, row - 0.5), 1, 1, facecolor="#7a4a1f"))
        for used, count in imports_of(room).items():
            shade = min(1.0, 0.25 + count / 12)
            square = (names.index(used) - 0.45, row - 0.45)
            axes.add_patch(Rectangle(square, 0.9, 0.9, facecolor="#3f6f9f", alpha=shade))
            axes.text(names.index(used), row, str(count), ha="center", va="center", fontsize=7, color="white")
        axes.text(-0.8, row, f"{room}/", ha="right", va="center", fontsize=10, weight="bold")
        axes.text(len(names) - 0.2, row, ROOMS[room], ha="left", va="center", fontsize=9, style="italic")
        axes.text(len(names) + 15, row, f"{lines_of(room):,} lines", ha="right", va="center", fontsize=8, color="0.4")
        axes.text(row, -0.8, room, ha="left", va="bottom", fontsize=8, rotation=50)
        axes.plot([-0.5, len(names) - 0.5], [row + 0.5] * 2, color="0.9", linewidth=0.5, zorder=0)
    axes.set_xlim(-5, len(names) + 15.2)
    axes.set_ylim(len(names) - 0.3, -4.5)
    axes.axis("off")
    axes.set_title(
        "The rooms of lorica. A square: the room on the left imports from the one above, so often", fontsize=12
    )
    figure.savefig(HERE / "rooms.png", dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    main()
