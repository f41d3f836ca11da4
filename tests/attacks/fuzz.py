"""Mutate good files and read them, for as long as one likes: ``python tests/attacks/fuzz.py --seconds 3600``.

Whatever is done to a file, reading it ends within a second and 200 MB in one of lorica's own errors, or in what the
file says. Nothing is imported, started or written elsewhere meanwhile, and no model is changed. What breaks this rule
is printed with the seed that does it again: ``--seed N --rounds 1``.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1])]

from costs import HangError, bounded
from mutations import mutate
from victims import Victim, quietly, victims

from lorica.errors import LoricaError

_FORBIDDEN = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "socket.connect",
    "pickle.find_class",
)
_watched: list[str] | None = None
_allowed = ""


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _watched is None:
        return
    name = arguments[0] if arguments else ""
    if event in _FORBIDDEN or (
        event == "import" and not str(name).startswith(("torch.", "transformers.", "encodings."))
    ):
        _watched.append(f"{event} {str(name)[:200]}")
    elif event == "open" and isinstance(name, str) and isinstance(arguments[2], int) and arguments[2] & 3:
        _watched.extend([f"writes {name}"] * (not name.startswith((_allowed, "/proc/self/", "/dev/null"))))


sys.addaudithook(_audit)


class Finding(NamedTuple):
    """What went wrong.

    Attributes:
        seed: does it again.
        victim: kind of files.
        mutation: what was done to them.
        problem: what came of it.
    """

    seed: int
    victim: str
    mutation: str
    problem: str


class Fuzzer:
    """Reads mutated files, in one process.

    Args:
        place: an empty directory.

    Attributes:
        outcomes: how often which error, or none, came of it.
    """

    def __init__(self, place: Path, names: list[str] | None = None) -> None:
        global _allowed
        _allowed = str(place)
        self.place, self.outcomes = place, Counter[str]()
        self.victims: dict[str, Victim] = {n: v for n, v in victims().items() if names is None or n in names}
        for name, victim in self.victims.items():
            good = place / "good" / name
            good.mkdir(parents=True)
            victim.make(good)
            for _ in range(2):  # everything is imported, and a good file is good
                with self._output() as output:
                    quietly(victim.read, good, output)

    @contextmanager
    def _output(self) -> Any:
        output = self.place / "output"
        output.mkdir()
        try:
            yield output
        finally:
            shutil.rmtree(output)

    def round(self, name: str, seed: int) -> Finding | None:
        """Mutate files of a kind and read them once."""
        rng = random.Random(f"{name} {seed}")
        bad = self.place / "bad"
        shutil.copytree(self.place / "good" / name, bad)
        mutation = mutate(bad, rng)
        try:
            (outcome, problem), excess = bounded(lambda: self._read(self.victims[name], bad))
        finally:
            if bad.is_dir():
                shutil.rmtree(bad)
        problem = problem or excess
        self.outcomes[outcome if not problem else "PROBLEM"] += 1
        return Finding(seed, name, mutation, problem) if problem else None

    def _read(self, victim: Victim, folder: Path) -> tuple[str, str]:
        """Return what came of reading, and what is wrong with that."""
        global _watched
        problem, outcome = "", "nothing"
        with self._output() as output:
            _watched = []
            try:
                quietly(victim.read, folder, output)
            except LoricaError as error:
                outcome = type(error).__name__
                if not str(error) or len(str(error)) > 20_000:
                    problem = f"an error of {len(str(error))} characters"
            except Exception as error:
                problem = "".join(traceback.format_exception(error)[-8:])
            except HangError:
                problem = f"a hang: {traceback.format_exc()[-3000:]}"
            finally:
                seen, _watched = _watched, None
        return outcome, problem or (f"it {seen[:5]}" if seen else "")


def main() -> None:
    """Mutate until the time is over, and print what broke."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=10**9)
    parser.add_argument("--only", nargs="*")
    asked = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="fuzz-"))
    fuzzer = Fuzzer(place, asked.only)
    begin, findings, rounds, told = time.monotonic(), 0, 0, Counter[str]()
    for seed in range(asked.seed, asked.seed + asked.rounds):
        if time.monotonic() - begin > asked.seconds:
            break
        for name in fuzzer.victims:
            rounds += 1
            finding = fuzzer.round(name, seed)
            if finding is not None:
                findings += 1
                mark = finding.problem.strip().splitlines()[-1][:60] + str(finding.problem.count("\n"))
                told[mark] += 1
                if told[mark] <= 3:
                    print(f"--- {finding.victim}, seed {seed}: {finding.mutation}\n{finding.problem}", flush=True)
    print(f"{rounds} rounds in {time.monotonic() - begin:.0f} s, {findings} findings: {dict(fuzzer.outcomes)}")
    shutil.rmtree(place)


if __name__ == "__main__":
    main()
