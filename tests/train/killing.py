"""Run by test_kill.py: write a checkpoint again and again, each time in a child that is killed one operation later.

Usage: killing.py BASE DATA OUTPUT. An audit hook sees every open, mkdir, rename, remove and rmdir that Python makes,
and kills the process just before the k-th; a file-size limit kills it in the middle of a write, also of one that is
not Python's. After each kill the newest complete checkpoint must be the one before or the new one, whole.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import runs
from lorica.train import job, recipe, state

_WATCHED = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "os.truncate"}


def kill_at(count: int) -> Callable[[], None]:
    """Die just before the ``count``-th operation on the file system."""

    def arm() -> None:
        seen = 0

        def hook(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal seen
            if event in _WATCHED:
                seen += 1
                if seen == count:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)

    return arm


def kill_beyond(size: int) -> Callable[[], None]:
    """Die in the write that makes a file larger than ``size`` bytes."""

    def arm() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return arm


def die(arm: Callable[[], None], write: Callable[[], object]) -> bool:
    """Whether a child that is armed dies while it writes."""
    child = os.fork()
    if child == 0:
        arm()
        write()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, status
    return os.WIFSIGNALED(status)


def tensors(live: state.Live) -> list[torch.Tensor]:
    found = [p.detach().clone() for p in live.model.parameters() if p.requires_grad]
    for entry in live.optimizer.state.values():
        found += [value.clone() for _, value in sorted(entry.items())]
    return [*found, torch.get_rng_state()]


def main(base: Path, data: Path, output: Path) -> None:
    torch.set_num_threads(1)
    chosen = recipe.parse(runs.settings(base, data, output, checkpoint={"every": 3, "keep": 1}))
    first, second = job._prepare(chosen), job._prepare(chosen)
    live = first.trainer.live
    live.model.train()
    expected = {}
    for step in (1, 2):
        first.trainer.step()
        live.progress.step = step
        expected[step] = tensors(live)
        if step == 1:
            state.Saver(live, chosen, first.data).save()
    clean = output.with_name("clean")
    shutil.copytree(output, clean)

    def write() -> None:
        state.Saver(live, chosen, first.data).save()

    def check() -> int:
        step = 0
        for whole in state.complete(output):  # whatever calls itself complete must be
            state.restore(whole, second.trainer.live)
            step = second.trainer.live.progress.step
            for ours, theirs in zip(expected[step], tensors(second.trainer.live), strict=True):
                assert torch.equal(ours, theirs)
        assert step, "no complete checkpoint is left"
        # The next run tidies up and saves again where the killed one could not.
        torch.set_rng_state(expected[2][-1])
        state.clean(output)
        write()
        assert [path.name for path in sorted((output / "checkpoints").iterdir())] == ["step-000002"]
        shutil.rmtree(output)
        shutil.copytree(clean, output)
        return step

    steps = []
    while die(kill_at(len(steps) + 1), write):
        steps.append(check())
    assert check() == 2
    sizes = sorted({p.stat().st_size for p in clean.rglob("*") if p.is_file()})
    for size in {max(0, size - 1) for size in sizes} | {size // 2 for size in sizes} - {sizes[-1]}:
        if die(kill_beyond(size), write):
            assert check() == 1
        else:
            assert check() == 2
    print(f"{len(steps)} operations, the new checkpoint is there from {steps.index(2) + 1}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
