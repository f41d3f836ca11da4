"""The picture: a bar for each case, lorica's time over peft's, and marks for the excess and for bytes moved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorica.bench.contest import AGAINST_PEFT, Figure, Measure
from lorica.errors import RecipeError
from lorica.files import atomic

#: Bars end here; the number beside the axis says how far they would go.
SHORTEST = 0.02
#: With more lines than this the chart has two columns.
TALLEST = 30

_LESS, _MORE, _EXCESS, _MOVED = "#2a6f97", "#c8553d", "#1b1b1b", "#8a9a5b"


@dataclass(frozen=True)
class Line:
    """One line of the chart: the heading of a measure, or a case of it.

    Attributes:
        label: what stands at its left.
        time: the case's time; None for a heading.
        moved: the ratio of bytes moved, where it was counted.
    """

    label: str
    time: Figure | None = None
    moved: float | None = None


def lines_of(figures: Sequence[Figure]) -> list[Line]:
    """Return the chart's lines: each measure that has times, and its cases."""
    moved = {(f.measure, f.case): f.ratio for f in figures if f.quantity == "bytes moved"}
    lines: list[Line] = []
    previous = None
    for figure in figures:
        if figure.quantity != "time" or figure.ratio is None:
            continue
        if figure.measure != previous:
            lines.append(Line(figure.measure))
            previous = figure.measure
        lines.append(Line(figure.case, figure, moved.get((figure.measure, figure.case))))
    return lines


def columns_of(lines: Sequence[Line], tallest: int = TALLEST) -> list[list[Line]]:
    """Return the lines in one column, or in two of about the same height; a measure stays in one piece."""
    if len(lines) <= tallest:
        return [list(lines)]
    starts = [index for index, line in enumerate(lines) if line.time is None and index]
    middle = min(starts, key=lambda index: abs(2 * index - len(lines)), default=len(lines))
    return [column for column in (list(lines[:middle]), list(lines[middle:])) if column]


def draw(
    path: Path, figures: Sequence[Figure], measures: Mapping[str, Measure], title: str, against: str = AGAINST_PEFT
) -> None:
    """Write the chart as PNG: the times of all measures that compare with ``against``.

    Raises:
        RecipeError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure as Picture
    except ImportError:
        raise RecipeError("a chart needs matplotlib. Install it with: pip install 'lorica[train]'") from None
    columns = columns_of(lines_of([figure for figure in figures if measures[figure.measure].against == against]))
    height = max(map(len, columns))
    picture = Picture(figsize=(8.5 * len(columns), 0.25 * height + 1.9), dpi=120, layout="constrained")
    FigureCanvasAgg(picture)
    every = picture.subplots(1, len(columns), squeeze=False)[0]
    for axes, lines in zip(every, columns, strict=True):
        _column(axes, lines, height)
    _legend(every[0])
    picture.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    picture.suptitle(f"{title}\n{against}, logarithmic; left of 1: lorica needs less", fontsize=11)
    atomic.write_file(path, lambda temporary: picture.savefig(temporary, format="png"))


def _column(axes: Any, lines: Sequence[Line], height: int) -> None:
    axes.set_xscale("log")
    largest = 1.0
    for row, line in enumerate(lines):
        if line.time is None:
            axes.annotate(line.label, (0.01, row), xycoords=("axes fraction", "data"), fontweight="bold", va="center")
            continue
        largest = max(largest, *(value or 0.0 for value in (line.time.ratio, line.time.excess, line.moved)))
        _bar(axes, row, line.time, line.moved)
    axes.set_yticks(range(len(lines)), ["" if line.time is None else line.label for line in lines], fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_ylim(height - 0.5, -0.7)
    axes.set_xlim(SHORTEST, 1.15 * largest)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(axis="x", which="both", linewidth=0.3)
    axes.set_axisbelow(True)


def _bar(axes: Any, row: int, time: Figure, moved: float | None) -> None:
    ratio = time.ratio or 0.0
    axes.barh(row, max(ratio, SHORTEST) - 1, left=1, color=_LESS if ratio <= 1 else _MORE, height=0.62)
    if moved:
        axes.plot(max(moved, SHORTEST), row, "D", color=_MOVED, markersize=5)
    if time.excess is not None and time.excess > 0:
        axes.plot(max(time.excess, SHORTEST), row, "|", color=_EXCESS, markersize=11, markeredgewidth=2)
    axes.annotate(f"{ratio:.2g}", (1.01, row), xycoords=("axes fraction", "data"), fontsize=8, va="center")


def _legend(axes: Any) -> None:
    axes.plot([], [], "s", color=_LESS, label="time, less")
    axes.plot([], [], "s", color=_MORE, label="time, more")
    axes.plot([], [], "|", color=_EXCESS, markersize=11, markeredgewidth=2, label="time over the frozen base")
    axes.plot([], [], "D", color=_MOVED, markersize=5, label="bytes moved")
