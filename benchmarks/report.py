"""The tables: ``RESULTS.md`` for readers, ``results.json`` for programs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks.suite import FROZEN, LORICA, MEASURES, PEFT, Figure

#: A ratio beyond this is said at the top of the page. A time must lie beyond it in three rounds out of four.
NOTABLE = 1.02

_INTRODUCTION = """\
# lorica beside peft

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


def write_json(path: Path, facts: Mapping[str, str], figures: Sequence[Figure]) -> None:
    """Write everything that was measured."""
    data = {"environment": dict(facts), "figures": [figure.to_json() for figure in figures]}
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def write_markdown(path: Path, facts: Mapping[str, str], figures: Sequence[Figure], picture: str) -> None:
    """Write the page."""
    parts = [
        _INTRODUCTION,
        "| made with | |\n|---|---|\n"
        + "\n".join(f"| {name} | {_code(name, value)} |" for name, value in facts.items()),
        f"![ratio of lorica to peft for every measure]({picture})",
        "## Where lorica needs more than peft\n\n" + _slower(figures),
        *tables(figures),
    ]
    path.write_text("\n\n".join(part.strip() for part in parts) + "\n", encoding="utf-8")


def tables(figures: Iterable[Figure]) -> list[str]:
    """Return one Markdown section per measure."""
    grouped: dict[str, list[Figure]] = {}
    for figure in figures:
        grouped.setdefault(figure.measure, []).append(figure)
    return [_table(name, rows) for name, rows in grouped.items()]


def _table(name: str, rows: Sequence[Figure]) -> str:
    measure = MEASURES[name]
    frozen = any(FROZEN in row.values for row in rows)
    head = ["case", "quantity", *(["frozen base"] if frozen else []), "peft", "lorica", "lorica / peft"]
    head += ["excess"] if frozen else []
    lines = [f"| {' | '.join(head)} |", f"|---|---|{'---:|' * (len(head) - 2)}"]
    previous = ""
    for row in rows:
        cells = ["" if row.case == previous else row.case, row.quantity]
        cells += [show(row.values[side], row.unit) for side in ((FROZEN,) if frozen else ()) + (PEFT, LORICA)]
        cells += [_ratio_cell(row), *([_number(row.excess)] if frozen else [])]
        lines.append(f"| {' | '.join(cells)} |")
        previous = row.case
    return f"## {measure.title}\n\n`{name}`: {measure.note}\n\n" + "\n".join(lines)


def needs_more(figure: Figure) -> bool:
    """Whether lorica notably needs more than peft; for a time, in three rounds out of four."""
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
