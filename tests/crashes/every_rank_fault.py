"""Every fault on every rank in every phase, which takes longer than a test may.

python tests/crashes/every_rank_fault.py --ranks 4 [--asynchronous] [--from 0] [--to 20]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).parents[1]


def main() -> None:
    """Go through the chains, each with other faults on other ranks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--asynchronous", action="store_true")
    parser.add_argument("--from", type=int, default=0, dest="first")
    parser.add_argument("--to", type=int, default=None, dest="last")
    given = parser.parse_args()
    sys.path[:0] = [str(TESTS), str(TESTS / "parallel")]
    import rank_phases
    import test_ranks_phases

    import runs

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = runs.save_base(folder / "base")
        data = runs.write_jsonl(folder / "sums.jsonl", runs.sums(30))
        for start in range(given.first, given.last or len(rank_phases.FAULTS) * given.ranks):
            links = rank_phases.chain(given.ranks, start)
            checkpoint = {"asynchronous": given.asynchronous}
            test_ranks_phases.assert_chain(links, given.ranks, checkpoint, base, data, folder / f"{start}")
            print(f"{given.ranks} ranks, chain {start}: {len(links)} faults", flush=True)


if __name__ == "__main__":
    main()
