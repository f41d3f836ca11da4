"""The command line, ``lorica``. What it needs beyond the library comes with ``pip install 'lorica[train]'``."""

from __future__ import annotations

import sys
from importlib.util import find_spec

_NEEDED = ("typer", "rich", "pydantic", "yaml", "transformers", "datasets", "matplotlib")


def main() -> None:
    """The console script. Exit codes: 0 done, 1 failed, 2 asked wrongly, 130 and 143 stopped by a signal."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        print(
            f"lorica: the command line needs {', '.join(missing)}. Install it with: pip install 'lorica[train]'",
            file=sys.stderr,
        )
        raise SystemExit(2)
    from lorica.cli import rank
    from lorica.cli.app import app

    rank.begin()
    app(prog_name="lorica")
