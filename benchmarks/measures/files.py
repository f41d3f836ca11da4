"""Reading and writing adapter files."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from torch import nn

from benchmarks.models import LIBRARIES, adapt, config, llama
from benchmarks.suite import LORICA, PEFT, Case, Contest, measure, quiet
from benchmarks.timing import Task

COUNTS = ("kernels", "bytes moved", "peak bytes")

#: Makes the task of one side from the library, the base model and the directory of a saved adapter.
Maker = Callable[[str, nn.Module, Path], Task]


def build(quick: bool, *, maker: Maker, counts: tuple[str, ...] = ()) -> Contest:
    """Return the contest; both sides read the file that peft wrote."""
    base = llama(4 if quick else 32, 128, heads=4)
    folder = tempfile.TemporaryDirectory(prefix="lorica-bench-")
    saved = Path(folder.name, "saved")
    with quiet():
        adapt(PEFT, copy.deepcopy(base), init_lora_weights=False).save_pretrained(saved)  # type: ignore[operator]
    tasks = {side: maker(side, copy.deepcopy(base), saved) for side in (PEFT, LORICA)}
    return Contest(tasks, rounds=6 if quick else 30, counts=counts, close=folder.cleanup)


def load_first(side: str, base: nn.Module, saved: Path, **arguments: Any) -> Task:
    """``PeftModel.from_pretrained`` on a fresh base model."""
    fresh: list[nn.Module] = []

    def reset() -> None:
        fresh[:] = [copy.deepcopy(base)]

    return Task(lambda: LIBRARIES[side].PeftModel.from_pretrained(fresh[0], saved, **arguments), reset)


def load_further(side: str, base: nn.Module, saved: Path, *, already: int) -> Task:
    """``load_adapter`` into a model that holds ``already`` adapters."""
    model: Any = adapt(side, base)
    for number in range(1, already):
        model.add_adapter(f"adapter{number}", config(side))

    def reset() -> None:
        if "extra" in model.peft_config:
            model.delete_adapter("extra")

    return Task(partial(model.load_adapter, str(saved), "extra"), reset)


def save(side: str, base: nn.Module, saved: Path, *, sync: bool = True) -> Task:
    """``save_pretrained``; without ``sync`` the operating system is never asked to flush."""
    model: Any = adapt(side, base)
    target = saved.parent / side

    def run() -> None:
        with mock.patch.object(os, "fsync", os.fsync if sync else lambda descriptor: None):
            model.save_pretrained(target)

    # A reset of nothing: saving is never looped, so that the disk is not flooded.
    return Task(run, reset=lambda: None)


@measure("files", "Loading and saving an adapter of 224 linears")
def files() -> list[Case]:
    """A Llama of 32 layers of width 128, rank 16: a file of about 5 MB, in the system's temporary directory, in the
    page cache. lorica checks every name, shape and value before it writes anything into the model. It writes each file
    under a temporary name, flushes it to the disk and renames it, so that a crash never leaves half a file; peft writes
    in place and does not flush. The last case leaves the flushing out, to show what it costs. Memory mapped from the
    file is not part of the peak."""
    loaders: dict[str, Maker] = {
        "from_pretrained": load_first,
        "from_pretrained, low_cpu_mem_usage": partial(load_first, low_cpu_mem_usage=True),
        "load_adapter, 1 there already": partial(load_further, already=1),
        "load_adapter, 8 there already": partial(load_further, already=8),
    }
    savers: dict[str, Maker] = {
        "save_pretrained": save,
        "save_pretrained, fsync left out": partial(save, sync=False),
    }
    return [
        *(Case(name, partial(build, maker=maker, counts=COUNTS)) for name, maker in loaders.items()),
        *(Case(name, partial(build, maker=maker)) for name, maker in savers.items()),
    ]
