"""The tables: ``RESULTS.md`` for readers, ``results.json`` for programs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lorica.bench.contest import FROZEN, Figure, Measure
from lorica.files import atomic

#: A ratio beyond this is said at the top of the page. A time must lie beyond it in three rounds out of four.
NOTABLE = 1.02

#: How the tables are read.
READING = """\
Every ratio is lorica / peft: below 1, lorica needs less. Times are medians of 6 to 200 interleaved rounds in one
process (A B, B A, …; garbage is collected between rounds, glibc keeps freed memory), with the quartiles of the ratio
within a round in brackets. Counts do not jitter. *Excess* is what a library adds to the frozen base model: lorica's
over peft's; a dash where peft added nothing that stands out from the noise. Before a model is run, both libraries get
the same factors, and without dropout they must give the same output.

- **kernels**: operators that read or write tensor memory; views and bare allocations are none.
- **bytes moved**: sizes of the distinct tensors that an operator reads plus those it writes.
- **saved bytes**: distinct storages kept for backward, without parameters.
- **peak bytes**: the most alive at once of what operators allocated during the call.
- **FLOPs**: of matrix products and attention.
"""


@dataclass
class Results:
    """Everything that was measured.

    Attributes:
        facts: what the run was made on.
        figures: the rows.
        measures: what was taken, by name, in the order of the tables.
        apart: the same facts for measures that were taken in a run of their own since.
    """

    facts: dict[str, str]
    figures: list[Figure]
    measures: Mapping[str, Measure]
    apart: dict[str, dict[str, str]] = field(default_factory=dict)

    def joined(self, new: Results) -> Results:
        """Return these results with the measures of ``new`` in the place of their own."""
        names = {figure.measure for figure in new.figures}
        figures = [figure for figure in self.figures if figure.measure not in names] + new.figures
        order = {name: index for index, name in enumerate(self.measures)}
        figures.sort(key=lambda figure: order.get(figure.measure, len(order)))
        apart = {**self.apart, **dict.fromkeys(sorted(names), new.facts)}
        return Results(self.facts, figures, self.measures, apart)


def read_json(path: Path, measures: Mapping[str, Measure]) -> Results | None:
    """Return what :func:`write_json` wrote, without measures that are gone; None where there is no file."""
    if not path.exists():
        return None
    data = json.loads(path.read_text(encoding="utf-8"))
    figures = [Figure.from_json(values) for values in data["figures"] if values["measure"] in measures]
    return Results(data["environment"], figures, measures, data.get("apart", {}))


def write_json(path: Path, results: Results) -> None:
    """Write everything that was measured."""
    figures = [figure.to_json() for figure in results.figures]
    data = {"environment": results.facts, "apart": results.apart, "figures": figures}
    atomic.write_bytes(path, (json.dumps(data, indent=1) + "\n").encode())


def write_markdown(
    path: Path, results: Results, picture: str, *sections: str, title: str = "lorica beside peft"
) -> None:
    """Write the page; ``sections`` stand before the tables."""
    parts = [
        f"# {title}",
        READING,
        "| made with | |\n|---|---|\n"
        + "\n".join(f"| {name} | {_code(name, value)} |" for name, value in results.facts.items()),
        f"![ratio of lorica to peft for every measure]({picture})",
        *sections,
        "## Where lorica needs more\n\n" + _slower(results.figures),
        *tables(results),
    ]
    atomic.write_bytes(path, ("\n\n".join(part.strip() for part in parts) + "\n").encode())


def tables(results: Results) -> list[str]:
    """Return one Markdown section per measure."""
    return [
        _table(results.measures[name], rows) + _facts(results.apart.get(name))
        for name, rows in grouped(results.figures).items()
    ]


def grouped(figures: Iterable[Figure]) -> dict[str, list[Figure]]:
    """Return the figures of each measure."""
    found: dict[str, list[Figure]] = {}
    for figure in figures:
        found.setdefault(figure.measure, []).append(figure)
    return found


def _facts(facts: Mapping[str, str] | None) -> str:
    if facts is None:
        return ""
    said = "; ".join(f"{name}: {_code(name, value)}" for name, value in facts.items())
    return f"\n\nTaken in a run of its own: {said}."


def _table(measure: Measure, rows: Sequence[Figure]) -> str:
    remarks = "".join(f"\n\n{row.case}: {row.remark}" for row in rows if row.remark)
    head, *lines = cells(measure, rows)
    ruled = [head, ["---", "---", *["---:"] * (len(head) - 2)], *lines]
    text = "\n".join(f"| {' | '.join(line)} |" for line in ruled)
    return f"## {measure.title}\n\n`{measure.name}`: {measure.note}\n\n{text}{remarks}"


def cells(measure: Measure, rows: Sequence[Figure]) -> list[list[str]]:
    """Return a measure's table as text: the head, then a line for each row that has values."""
    rows = [row for row in rows if row.values]
    sides = [side for side in measure.sides if any(side in row.values for row in rows)]
    compared = any(row.ratio is not None for row in rows)
    excess = any(row.excess is not None for row in rows)
    lines = [
        [
            "case",
            "quantity",
            *("frozen base" if side == FROZEN else side for side in sides),
            *([measure.against] if compared else []),
            *(["excess"] if excess else []),
        ]
    ]
    previous = ""
    for row in rows:
        values = [show(row.values[side], row.unit) if side in row.values else "" for side in sides]
        ratios = [*([_ratio_cell(row)] if compared else []), *([_number(row.excess)] if excess else [])]
        lines.append(["" if row.case == previous else row.case, row.quantity, *values, *ratios])
        previous = row.case
    return lines


def needs_more(figure: Figure) -> bool:
    """Whether lorica notably needs more than what it is compared with; for a time, in three rounds out of four."""
    low = figure.ratio if figure.spread is None else min(figure.spread[0], figure.ratio or 0.0)
    return (low or 0.0) > NOTABLE


def _slower(figures: Sequence[Figure]) -> str:
    worse = [f for f in figures if needs_more(f)]
    if not worse:
        return "Nowhere: in no row by more than 2 %."
    return "\n".join(f"- {f.measure}, {f.case}: {f.quantity} {_ratio_cell(f)}" for f in worse)


def _ratio_cell(figure: Figure) -> str:
    if figure.spread is None:
        return _number(figure.ratio)
    return f"{_number(figure.ratio)} ({_number(figure.spread[0])}–{_number(figure.spread[1])})"


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.2f}" if abs(value) >= 0.1 or value == 0 else f"{value:.2g}"


def show(value: float, unit: str) -> str:
    """Return a value with its unit, to three figures: ``1.23 ms``, ``4.57 MB``."""
    if unit == "s":
        for factor, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
            if value >= factor:
                return f"{value / factor:.3g} {name}"
        return f"{value / 1e-9:.3g} ns"
    for factor, name in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= factor:
            scale = 1e3 if name == "k" else factor
            return (
                f"{value / scale:,.3g} {name}{unit}" if value / scale < 1000 else f"{value / scale:,.0f} {name}{unit}"
            )
    return f"{value:,.0f}{f' {unit}' if unit else ''}"


def _code(name: str, value: str) -> str:
    return f"`{value}`" if name == "command" else value
