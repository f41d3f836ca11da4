"""What the results were made on: versions, processor, threads. No names of hosts, users or paths."""

from __future__ import annotations

import ctypes
import datetime
import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("torch", "transformers", "peft", "lorica", "safetensors")

_LOAD = "0: quiet; near the number of cores or above: distrust the times"


def describe(command: str) -> dict[str, str]:
    """Return the facts that stand above the tables."""
    threads = f"{torch.get_num_threads()} of {os.cpu_count()} cores"
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "command": command,
        "processor": f"{_processor()}, {threads}",
        "CPU capability": torch.backends.cpu.get_cpu_capability(),
        "load at the start": f"{os.getloadavg()[0]:.1f} ({_LOAD})",
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        **{name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory instead of giving it back, and return whether it could be told.

    By default every temporary above a few hundred kilobytes is mapped afresh and the kernel clears its pages, which
    costs more than most operators on it. That is noise between runs, and it would punish the side with more temporaries
    (peft); training frameworks run under caching allocators.
    """
    mmap_max, trim_threshold = -4, -1
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(mmap_max, 0)) and bool(mallopt(trim_threshold, -1))
