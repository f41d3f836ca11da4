"""``python -m benchmarks.run``: take the measures, write the tables and the chart."""

from __future__ import annotations

import os

# The models are made here; nothing may be looked up on a hub while the clock runs.
os.environ["HF_HUB_OFFLINE"] = "1"

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import measures, targets
from benchmarks.suite import MEASURES
from lorica.bench import chart, machine, report
from lorica.bench.contest import take_all

HERE = Path(__file__).resolve().parent


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description="Measure lorica beside peft.")
    parser.add_argument("--quick", action="store_true", help="small models, few rounds: does it run?")
    parser.add_argument("--only", action="append", choices=sorted(MEASURES), help="take this measure (repeatable)")
    parser.add_argument("--out", type=Path, help="write here; default: benchmarks/, and nowhere for a quick run")
    return parser.parse_args(arguments)


def command_of(options: argparse.Namespace) -> str:
    """Return the command that was given, without where it wrote."""
    words = [f"{name}={os.environ[name]}" for name in ("OMP_NUM_THREADS",) if name in os.environ]
    words += ["python -m benchmarks.run", *(["--quick"] if options.quick else [])]
    return " ".join([*words, *(f"--only {name}" for name in options.only or ())])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    chosen = [measure for name, measure in MEASURES.items() if not options.only or name in options.only]
    machine.keep_freed_memory()
    facts = machine.describe(command_of(options))
    results = report.Results(facts, take_all(chosen, quick=options.quick), MEASURES)
    print("\n\n".join(report.tables(results)))
    # A page that holds toy sizes must not take the place of the whole one; a measure takes that of its own section.
    out = options.out or (None if options.quick else HERE)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        before = report.read_json(out / "results.json", MEASURES)
        if options.only and before is not None:
            results = before.joined(results)
        report.write_json(out / "results.json", results)
        report.write_markdown(out / "RESULTS.md", results, "results.png", targets.section(results.figures))
        title = "lorica beside peft\npeft {peft}, torch {torch}, {processor}".format_map(results.facts)
        chart.draw(out / "results.png", results.figures, MEASURES, title)
        print(f"\nwritten: RESULTS.md, results.json, results.png in {out}", file=sys.stderr)
    return 0


assert measures.__all__  # imported for what it enters into the registry

if __name__ == "__main__":
    raise SystemExit(main())
