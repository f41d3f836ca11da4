"""Runs on many ranks in which one rank meets a fault at a named place.

:func:`rehearse` is called in a process of its own. It loads model, tokenizer and data once; each attempt forks its
ranks from there, so that a rank costs what its steps cost and leaves nothing behind: no process group, no thread, no
model that trained. A rank leaves as a process does whose error nobody catches: its sockets close, and what it had to
say is in a file.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import faults
import torch
import torch.distributed as dist

from lorica.train import job, lost, models, recipe, signals, sources, state

#: Seconds after which a rank that waits for a collective gives up: ``parallel.timeout`` of the runs. So far apart from
#: what follows that a slow machine with other work beside the ranks does not make one of the other.
TIMEOUT = 180.0
#: Seconds in which the other ranks have to be done once the fault has struck.
SOON = 60.0


SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT, "stop": signal.SIGSTOP}
DISKS = {"full": errno.ENOSPC, "io": errno.EIO, "readonly": errno.EROFS}
#: Faults of a disk that stay.
LASTING = ("readonly",)


class Struck(RuntimeError):
    """The fault of the kind ``error``."""


def strike(fault: str, change: str = "open a-disk") -> None:
    """Let this rank have the fault, now, at this change of the file system if it is one of the disk."""
    struck = Path(os.environ["STRUCK"])
    if not struck.exists():
        struck.touch()
    if fault == "error":
        raise Struck("struck")
    if fault in DISKS:
        faults.error(DISKS[fault])(change)
    os.kill(os.getpid(), SIGNALS[fault])


@dataclass(frozen=True)
class Call:
    """Just before the ``count``-th call of a function.

    Attributes:
        owner: its module or class.
        name: its own.
    """

    owner: str
    name: str
    count: int = 1

    def arm(self, fault: str) -> None:
        module, _, kind = self.owner.partition(":")
        owner = getattr(import_module(module), kind) if kind else import_module(module)
        original, calls = getattr(owner, self.name), 0

        def counted(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == self.count:
                strike(fault)
            return original(*args, **options)

        setattr(owner, self.name, counted)


@dataclass(frozen=True)
class Operation:
    """Just before the ``count``-th operation on the file system below ``checkpoints`` from the ``save``-th one on.

    Attributes:
        count: from 0; None: there is no fault, but the rank writes down in the folder of the attempt what it does.
    """

    count: int | None
    save: int = 1

    def arm(self, fault: str) -> None:
        original, saves = state.Saver.save, 0
        watch = self._note() if self.count is None else self._strike(fault)

        def save(saver: state.Saver) -> Path:
            nonlocal saves
            saves += 1
            if saves == self.save:
                faults.begin(state.directory_of(saver._recipe.output), watch, reads=True)
            return original(saver)

        state.Saver.save = save  # type: ignore[method-assign]

    def _strike(self, fault: str) -> Callable[[str], None]:
        seen = count(0)

        def watch(change: str) -> None:
            number = next(seen)
            if number == self.count or (fault in LASTING and number > self.count):
                strike(fault, change)

        return watch

    @staticmethod
    def _note() -> Callable[[str], None]:
        noted = operations_file(Path(os.environ["STRUCK"]).parent, int(os.environ["RANK"])).open("a", buffering=1)
        return lambda change: print(change, file=noted)


def operations_file(folder: Path, rank: int) -> Path:
    """Where the operations are that a rank noted in an attempt."""
    return folder / f"operations-{rank}"


class Outcome(NamedTuple):
    """What became of a rank.

    Attributes:
        code: the exit code, or minus the signal.
        kind: the class of its error; empty: none.
        said: its message.
        late: seconds from the fault to its end; 0 where none struck.
    """

    code: int
    kind: str
    said: str
    late: float


def prepare(values: dict[str, Any]) -> None:
    """Load what every attempt needs, once, and let runs find it loaded."""
    if dist.is_initialized():
        dist.destroy_process_group()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)
    lost.BEAT, lost.PATIENCE = 0.1, 1.0
    chosen = recipe.parse(values)
    tokenizer = models.load_tokenizer(chosen.model.path, None)
    length = models.max_length(chosen.model.path, None, chosen.data.max_length)
    loaded = sources.load(chosen.data, tokenizer, length, chosen.training.seed)
    base = models.load_base(chosen.model.path, where=torch.device("cpu"), dtype=chosen.model.dtype)
    models.load_tokenizer = lambda *args, **options: tokenizer
    sources.check = lambda *args: None
    sources.load = lambda *args: loaded
    models.load_base = lambda *args, **options: base


def attempt(
    values: dict[str, Any] | Sequence[dict[str, Any]],
    ranks: int,
    folder: Path,
    *,
    victim: int = -1,
    fault: str = "",
    at: Call | Operation | None = None,
    before: Callable[[int], None] = lambda rank: None,
    **options: Any,
) -> list[Outcome]:
    """Train on ``ranks`` ranks, forked from this process.

    Args:
        values: of the recipe; or of each rank's.
        ranks: how many.
        folder: an empty one.
        victim: the rank that has the fault.
        fault: ``error``, ``full`` (a disk), or a signal: ``kill``, ``term``, ``int``, ``stop`` (it hangs).
        at: where.
        before: called in every rank with its number.
        options: of :func:`lorica.train.run`.
    """

    def train(rank: int) -> None:
        before(rank)
        own = values if isinstance(values, dict) else values[rank]
        job.run(recipe.parse(own), progress=False, notify=lambda _: None, **options)

    return attempt_to(train, ranks, folder, victim=victim, fault=fault, at=at)


def attempt_to(
    act: Callable[[int], object],
    ranks: int,
    folder: Path,
    *,
    victim: int = -1,
    fault: str = "",
    at: Call | Operation | None = None,
) -> list[Outcome]:
    """Do something else on ``ranks`` ranks; see :func:`attempt`."""
    folder.mkdir(parents=True)
    os.environ["STRUCK"] = str(folder / "struck")

    def begin(rank: int) -> None:
        if rank == victim and at is not None:
            at.arm(fault)
        act(rank)

    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            _leave(rank, ranks, folder, partial(begin, rank))
        children.append(child)
    return _collect(children, folder)


def _leave(rank: int, size: int, folder: Path, act: Callable[[], None]) -> None:
    code, kind, said = 0, "", ""
    try:
        output = os.open(folder / f"output-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
        store = dist.FileStore(str(folder / "store"), size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=TIMEOUT))
        act()
    except BaseException as error:
        code, kind, said = 3, type(error).__name__, str(error)
        if not isinstance(error, signals.Interrupted):
            sys.excepthook(*sys.exc_info())
    finally:
        (folder / f"said-{rank}").write_text(json.dumps([kind, said]))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _collect(children: list[int], folder: Path) -> list[Outcome]:
    """Wait until all ranks are gone; those that are not in time are killed, and late."""
    struck, found, started = folder / "struck", dict[int, Outcome](), time.monotonic()
    waiting = dict(enumerate(children))
    while waiting:
        for rank, child in list(waiting.items()):
            hangs = len(waiting) == 1 and _is_stopped(child)
            over = hangs or time.monotonic() - started > TIMEOUT + SOON
            if over:
                os.kill(child, signal.SIGKILL)
            done, status = os.waitpid(child, 0 if over else os.WNOHANG)
            if done:
                del waiting[rank]
                late = time.time() - struck.stat().st_mtime if struck.exists() else 0.0
                said = folder / f"said-{rank}"
                kind, text = json.loads(said.read_text()) if said.exists() else ("", "")
                found[rank] = Outcome(os.waitstatus_to_exitcode(status), kind, text, late)
        time.sleep(0.005)
    return [found[rank] for rank in range(len(children))]


def _is_stopped(process: int) -> bool:
    return Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2].startswith("T")


def printed(folder: Path) -> str:
    """What the ranks of an attempt printed."""
    return "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in sorted(folder.glob("output-*")))
