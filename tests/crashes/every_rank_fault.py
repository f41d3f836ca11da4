"""Every fault on every rank in every phase, and at every operation on the disk, which takes longer than a test may.

python tests/crashes/every_rank_fault.py --ranks 4 [--asynchronous] [--layout fsdp=2,tp=2] [--from 0] [--to 20]
python tests/crashes/every_rank_fault.py --ranks 4 --operations
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]


def main() -> None:
    """Go through the chains, each with other faults on other ranks; or through the operations of a checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--asynchronous", action="store_true")
    parser.add_argument("--layout", default="", help="axis=size of each axis, with commas; default: that of the tests")
    parser.add_argument("--operations", action="store_true")
    parser.add_argument("--from", type=int, default=0, dest="first")
    parser.add_argument("--to", type=int, default=None, dest="last")
    given = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which shells let their background jobs ignore
    sys.path[:0] = [str(TESTS), str(TESTS / "parallel")]
    import rank_phases
    import test_ranks_phases as tests

    import runs

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = runs.save_base(folder / "base")
        data = runs.write_jsonl(folder / "sums.jsonl", runs.sums(30))

        def settings(output: Path) -> dict[str, Any]:
            values = tests.settings(base, data, output, given.ranks, asynchronous=given.asynchronous)
            if given.layout:
                axes = dict(axis.split("=") for axis in given.layout.split(","))
                values["parallel"] = {axis: int(size) for axis, size in axes.items()} | {"timeout": tests.TIMEOUT}
            return values

        if given.operations:
            told = tests.assert_operations(settings(folder / "out"), given.ranks, None, folder)
            print(f"{given.ranks} ranks: {len(told) - 1} operations")
            return
        for start in range(given.first, given.last or len(rank_phases.FAULTS) * given.ranks):
            links = rank_phases.chain(given.ranks, start)
            both = [settings(folder / f"{start}" / name) for name in ("whole", "cut")]
            tests.assert_chain(links, given.ranks, both, folder / f"{start}")
            print(f"{given.ranks} ranks, chain {start}: {len(links)} faults", flush=True)


if __name__ == "__main__":
    main()
