"""Write ``docs/features.md``: run the check of every feature on every layer (``tests/features``)."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1] / "tests"


def main() -> None:
    """Run all checks, then write the page."""
    sys.path[:0] = [str(folder) for folder in (TESTS, *(TESTS / name for name in ("parallel", "laws", "features")))]
    import table

    logging.disable(logging.WARNING)
    table.DOCUMENT.write_text(table.render(table.run()), encoding="utf-8")


if __name__ == "__main__":
    main()
