"""Draw the rooms of the house from the code's own imports: ``python docs/draw_rooms.py`` writes ``docs/rooms.png``."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import matplotlib as mpl

mpl.use("agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

HERE = Path(__file__).parent
SOURCE = HERE.parent / "src" / "lorica"

#: Room → where it stands (column, row) and the question its files answer. Data flows downwards.
ROOMS = {
    "config": (-1, 0, "what does the\nuser ask for?"),
    "layout": (0.4, 0, "how does a weight\nlie over ranks?"),
    "files": (2.4, 0, "how are files written\nand read safely?"),
    "init": (-1.2, 1, "how do the\nfactors start?"),
    "engines": (0.3, 1, "who cut the model?\nwhere is this layer?"),
    "storage": (1.6, 1, "how is the base\nweight stored?"),
    "ops": (-0.2, 2, "what is the\nmathematics?"),
    "variants": (-1, 3, "what else may\nfactors do?"),
    "layers": (0.5, 3, "what stands in a\nbase layer's place?"),
    "targets": (-0.7, 4, "which modules\nare meant?"),
    "adapt": (0.6, 5, "how does an adapter\nget in and out?"),
    "checkpoint": (1.6, 6, "which tensor has\nwhich name in a file?"),
    "ranks": (-0.2, 7, "how do ranks\nstay equal?"),
    "model": (1, 8, "what does the\nuser hold?"),
    "parallel": (-0.6, 9, "what does the user\nof many ranks call?"),
    "merge": (1.8, 9, "how are files merged\nwithout a model?"),
    "train": (0.4, 10, "how is it\ntrained?"),
    "cli": (0.9, 11, "what does the\nterminal say?"),
}
WIDTH, HEIGHT, COLUMN, ROW = 2.5, 1.0, 3.1, 2.0


def imports_of(room: str) -> Counter[str]:
    """Count the imports of other rooms in the files of one."""
    found: Counter[str] = Counter()
    for path in (SOURCE / room).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lorica."):
                used = (node.module or "").split(".")[1]
                if used in ROOMS and used != room:
                    found[used] += 1
    return found


def lines_of(room: str) -> int:
    """Count the lines of a room's files."""
    return sum(len(path.read_text().splitlines()) for path in (SOURCE / room).rglob("*.py"))


def centre(room: str) -> tuple[float, float]:
    """Return where a room stands on the sheet."""
    column, row, _ = ROOMS[room]
    return column * COLUMN, -row * ROW


def main() -> None:
    """Draw rooms as boxes and imports as arrows, thicker where there are more."""
    figure, axes = plt.subplots(figsize=(12, 20))
    for room in ROOMS:
        for used, count in imports_of(room).items():
            axes.add_patch(
                FancyArrowPatch(
                    centre(room), centre(used), arrowstyle="-|>", mutation_scale=11, shrinkA=34, shrinkB=34,
                    linewidth=0.5 + 0.3 * count, color="#9aa5b1", connectionstyle="arc3,rad=0.12", zorder=1,
                )
            )  # fmt: skip
    for room, (_, _, question) in ROOMS.items():
        x, y = centre(room)
        axes.add_patch(
            FancyBboxPatch(
                (x - WIDTH / 2, y - HEIGHT / 2), WIDTH, HEIGHT, boxstyle="round,pad=0.04,rounding_size=0.12",
                facecolor="#f4efe6", edgecolor="#7a5c3e", linewidth=1.2, zorder=2,
            )
        )  # fmt: skip
        axes.text(x, y + 0.27, f"{room}/", ha="center", va="center", fontsize=12, weight="bold", zorder=3)
        axes.text(x, y - 0.08, question, ha="center", va="center", fontsize=8.5, style="italic", zorder=3)
        axes.text(x, y - 0.41, f"{lines_of(room)} lines", ha="center", va="center", fontsize=7, color="#666", zorder=3)
    axes.set_title("The rooms of lorica; an arrow says “imports”", fontsize=13)
    columns, rows = ([place[side] for place in ROOMS.values()] for side in (0, 1))
    axes.set_xlim((min(columns) - 0.6) * COLUMN, (max(columns) + 0.6) * COLUMN)
    axes.set_ylim(-(max(rows) + 0.7) * ROW, 0.7 * ROW)
    axes.set_aspect("equal")
    axes.axis("off")
    figure.savefig(HERE / "rooms.png", bbox_inches="tight", dpi=90)


if __name__ == "__main__":
    main()
