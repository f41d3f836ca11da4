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

import torch
from torch import nn

from benchmarks.models import LIBRARIES, adapt, config, llama
from benchmarks.suite import LORICA, PEFT, Case, Contest, measure, quiet
from lorica.bench.timing import Task

COUNTS = ("kernels", "bytes moved", "peak bytes")
#: From this width on the base is in 16 bits; the adapter and its file are in 32 all the same.
WIDE = 1024

#: Makes the task of one side from the library, the base model and the directory of a saved adapter.
Maker = Callable[[str, nn.Module, Path], Task]


def build(
    quick: bool, *, maker: Maker, counts: tuple[str, ...] = (), width: int = 128, heads: int = 4, rank: int = 16
) -> Contest:
    """Return the contest; both sides read the file that peft wrote."""
    dtype = torch.float32 if width < WIDE else torch.bfloat16
    base = llama(4, min(width, 256), dtype, heads=heads) if quick else llama(32, width, dtype, heads=heads)
    folder = tempfile.TemporaryDirectory(prefix="lorica-bench-")
    saved = Path(folder.name, "saved")
    with quiet():
        written = adapt(PEFT, copy.deepcopy(base), init_lora_weights=False, r=rank)
        written.save_pretrained(saved)  # type: ignore[operator]
    del written
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


def save(side: str, base: nn.Module, saved: Path, *, sync: bool = True, rank: int = 16) -> Task:
    """``save_pretrained``; without ``sync`` the operating system is never asked to flush."""
    model: Any = adapt(side, base, r=rank)
    target = saved.parent / side

    def run() -> None:
        with mock.patch.object(os, "fsync", os.fsync if sync else lambda descriptor: None):
            model.save_pretrained(target)

    # A reset of nothing: saving is never looped, so that the disk is not flooded.
    return Task(run, reset=lambda: None)


@measure("files", "Loading and saving an adapter of 224 linears")
def files() -> list[Case]:
    """A Llama of 32 layers of width 128, rank 16: a file of about 5 MB, in the system's temporary directory, in the
    page cache; and, where it says so, one of width 1024, rank 64: about 150 MB. lorica checks every name, shape and
    value before it writes anything into the model. It reads the file into one block of memory, which the factors then
    are: what the system copies there is no operator's, and so not among the bytes moved. peft maps the file, which
    counts as no memory, and copies out of it; with `low_cpu_mem_usage` it does not even copy, so that its factors are
    the mapped file: it costs peft no memory of its own until it is used, and whoever truncates that file ends the
    process. lorica writes each file under a temporary name, flushes it to the disk and renames it, so that a crash
    never leaves half a file; peft writes in place and does not flush. The case without flushing shows what it costs."""
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
    large: dict[str, Any] = {"width": 1024, "heads": 16, "rank": 64}
    return [
        *(Case(name, partial(build, maker=maker, counts=COUNTS)) for name, maker in loaders.items()),
        Case("load_adapter, 150 MB", partial(build, maker=partial(load_further, already=1), counts=COUNTS, **large)),
        *(Case(name, partial(build, maker=maker)) for name, maker in savers.items()),
        Case("save_pretrained, 150 MB", partial(build, maker=partial(save, rank=64), **large)),
    ]
