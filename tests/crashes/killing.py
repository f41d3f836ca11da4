"""Run by test_kill.py: write a checkpoint again and again, each time with a fault one change of the file system later.

It needs a process of its own, of which it sets limits and handlers. That is killed, or interrupted, or the disk fails
(once, or from then on), just before the k-th time that something is opened for writing, flushed, renamed, made or
removed; a file-size limit ends the process or fails in the middle of a write, also of one that is not Python's. After
each fault the newest complete checkpoint must be the one before or the new one, whole, and the next attempt must
succeed.
"""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import faults
import torch
import torch.distributed as dist

import runs
from lorica.train import job, recipe, signals, state

ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EACCES)


class Rehearsal:
    """One process in which the second checkpoint of a run is written again and again."""

    def __init__(self, base: Path, data: Path, output: Path) -> None:
        chosen = recipe.parse(runs.settings(base, data, output, checkpoint={"every": 3, "keep": 1}))
        first, self._second = job._prepare(chosen), job._prepare(chosen)
        self._live, self._run, self._recipe = first.trainer.live, first, chosen
        self.output, self._clean = output, output.with_name("clean")
        self._expected = {}
        self._live.model.train()
        for step in (1, 2):
            first.trainer.step()
            self._live.progress.step = step
            self._expected[step] = self._tensors(self._live)
            if step == 1:
                self.write()
        shutil.copytree(output, self._clean)

    def write(self) -> None:
        state.Saver(self._live, self._recipe, self._run.data).save()

    def sizes(self) -> list[int]:
        """Limits below and within the files of a checkpoint."""
        sizes = sorted({path.stat().st_size for path in self._clean.rglob("*") if path.is_file()})
        return sorted({max(0, size - 1) for size in sizes} | {size // 2 for size in sizes} - {sizes[-1]})

    def check(self, *, tidy: bool) -> int:
        """Return the step of the newest checkpoint, after comparing all with what they were taken from.

        Args:
            tidy: whether nothing but complete checkpoints may be there.
        """
        step = 0
        checkpoints = state.complete(self.output)
        for whole in checkpoints:  # whatever calls itself complete must be
            state.check(whole)
            live = self._second.trainer.live
            state.restore(whole, live)
            step = live.progress.step
            for ours, theirs in zip(self._expected[step], self._tensors(live), strict=True):
                assert torch.equal(ours, theirs)
        assert step, "no complete checkpoint is left"
        there = sorted((self.output / "checkpoints").iterdir())
        assert not tidy or there == checkpoints, there
        # The next run tidies up and saves again where this one could not.
        torch.set_rng_state(self._expected[2][-1])
        state.clean(self.output)
        self.write()
        assert [path.name for path in sorted((self.output / "checkpoints").iterdir())] == ["step-000002"]
        shutil.rmtree(self.output)
        shutil.copytree(self._clean, self.output)
        return step

    @staticmethod
    def _tensors(live: state.Live) -> list[torch.Tensor]:
        found = [p.detach().clone() for p in live.model.parameters() if p.requires_grad]
        for entry in live.optimizer.state.values():
            found += [value.clone() for _, value in sorted(entry.items())]
        return [*found, torch.get_rng_state()]


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    """Let no file become larger; what tries fails, or dies where the signal is not ignored."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def refused(work: Callable[[], object]) -> bool:
    """Whether the work ends with the error that tells of an unwritten checkpoint, and how to go on."""
    said = ""
    try:
        work()
    except state.UnsavedError as error:
        said = str(error)
    assert not said or "step-000002 could not be written: /" in said, said
    assert not said or "go on from it with --resume" in said, said
    return bool(said)


def kills(play: Rehearsal) -> Iterator[int]:
    for number in count():
        if not faults.killed_at(play.output, number, play.write):
            return
        yield play.check(tidy=False)


def kills_within_a_write(play: Rehearsal) -> Iterator[int]:
    def doomed(size: int) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with file_limit(size):
            play.write()

    for size in play.sizes():
        ended = faults.in_child(lambda size=size: doomed(size))
        step = play.check(tidy=False)
        assert step == (1 if ended == signal.SIGXFSZ else 2)
        yield step


def errors(play: Rehearsal) -> Iterator[int]:
    for number in count():
        act, lasting = faults.error(ERRORS[number % len(ERRORS)]), number % 3 == 2
        with faults.at(play.output, number, act, lasting=lasting) as hit:
            failed = refused(play.write)
        if not hit:
            return
        step = play.check(tidy=not lasting and "remove" not in hit[0] and "rmdir" not in hit[0])
        assert failed or step == 2, hit
        yield step


def errors_within_a_write(play: Rehearsal) -> Iterator[int]:
    for size in play.sizes():
        with file_limit(size):
            failed = refused(play.write)
        step = play.check(tidy=True)
        assert step == (1 if failed else 2)
        yield step


def one_signal(play: Rehearsal) -> Iterator[int]:
    """The first signal is noted: the checkpoint is finished, and the loop is told to stop."""
    for number in count():
        signum = (signal.SIGINT, signal.SIGTERM)[number % 2]
        with signals.StopRequest() as stop, faults.at(play.output, number, faults.interrupt(signum)) as hit:
            play.write()
        if not hit:
            return
        assert stop()
        assert stop.signum == signum
        yield play.check(tidy=True)


def two_signals(play: Rehearsal) -> Iterator[int]:
    """The second one acts as it always does."""

    def twice(change: str) -> None:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)

    for number in count():
        interrupted = False
        with signals.StopRequest(), faults.at(play.output, number, twice) as hit:
            try:
                play.write()
            except KeyboardInterrupt:
                interrupted = True
        if not hit:
            return
        step = play.check(tidy=False)
        assert interrupted or step == 2, hit
        yield step


def rehearse(base: Path, data: Path, output: Path) -> dict[str, tuple[int, int]]:
    """How often each fault left the checkpoint before, and the new one."""
    if dist.is_initialized():
        dist.destroy_process_group()
    for name in ("RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
    play, told = Rehearsal(base, data, output), {}
    for fault in (kills, kills_within_a_write, errors, errors_within_a_write, one_signal, two_signals):
        found = Counter(fault(play))
        assert play.check(tidy=False) in (1, 2)
        told[fault.__name__] = found[1], found[2]
    return told
