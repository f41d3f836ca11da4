"""The picture: one bar per case, lorica's time over peft's, and a mark for the excess over the frozen base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lorica.bench.contest import AGAINST_PEFT, Figure, Measure
from lorica.errors import RecipeError
from lorica.files import atomic

#: Bars end here; the number beside the axis says how far they would go.
SHORTEST = 0.02

_LESS, _MORE, _EXCESS, _MOVED = "#2a6f97", "#c8553d", "#1b1b1b", "#8a9a5b"


def draw(
    path: Path, figures: Sequence[Figure], measures: Mapping[str, Measure], title: str, against: str = AGAINST_PEFT
) -> None:
    """Write the chart as PNG: the times of all measures that compare with ``against``.

    Raises:
        RecipeError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise RecipeError("a chart needs matplotlib. Install it with: pip install 'lorica[train]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figures = [figure for figure in figures if measures[figure.measure].against == against]
    times = [figure for figure in figures if figure.quantity == "time" and figure.ratio is not None]
    moved = {(f.measure, f.case): f for f in figures if f.quantity == "bytes moved" and f.ratio}
    rows = range(len(times))
    picture, axes = plt.subplots(figsize=(10, 0.34 * len(times) + 1.8), layout="constrained")
    ratios = [max(figure.ratio or 0.0, SHORTEST) for figure in times]
    axes.barh(rows, [r - 1 for r in ratios], left=1, color=[_LESS if r <= 1 else _MORE for r in ratios], height=0.62)
    axes.set_xscale("log")
    for row, figure in enumerate(times):
        other = moved.get((figure.measure, figure.case))
        if other is not None and other.ratio:
            axes.plot(max(other.ratio, SHORTEST), row, "D", color=_MOVED, markersize=5)
        if figure.excess is not None and figure.excess > 0:
            axes.plot(max(figure.excess, SHORTEST), row, "|", color=_EXCESS, markersize=11, markeredgewidth=2)
        axes.annotate(f"{figure.ratio:.2g}", (1.01, row), xycoords=("axes fraction", "data"), fontsize=8, va="center")
    axes.set_yticks(rows, [f"{figure.measure}: {figure.case}" for figure in times], fontsize=8)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_ylim(max(len(times), 1) - 0.5, -0.5)
    axes.set_xlim(left=SHORTEST)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel(f"{against}, logarithmic; left of 1: lorica needs less")
    axes.plot([], [], "s", color=_LESS, label="time, less than peft")
    axes.plot([], [], "s", color=_MORE, label="time, more than peft")
    axes.plot([], [], "|", color=_EXCESS, markersize=11, markeredgewidth=2, label="time over the frozen base")
    axes.plot([], [], "D", color=_MOVED, markersize=5, label="bytes moved")
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.4, -0.06), ncols=4, frameon=False)
    axes.set_title(title, fontsize=10)
    axes.grid(axis="x", which="both", linewidth=0.3)
    axes.set_axisbelow(True)
    atomic.write_file(path, lambda temporary: picture.savefig(temporary, dpi=120))
    plt.close(picture)
