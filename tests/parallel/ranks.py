"""Run a function on many ranks: real processes, gloo, one failure message with every rank's traceback.

A rank is forked from a server that has torch, transformers and lorica imported, so a start costs some 20 ms a rank and
every call gets fresh ones: no process group, mesh, cache or hanging rank outlives its case. Example::

    import ranks

    def mean_of_ranks(start: float) -> float:          # at module level, so that the ranks can import it
        x = torch.tensor(start + dist.get_rank())
        dist.all_reduce(x)
        return float(x / dist.get_world_size())

    def test_mean():
        assert ranks.run(2, mean_of_ranks, 1.0) == [1.5, 1.5]

In every rank the default process group is there, ``torch.manual_seed(0)`` was called, torch has one thread, the
environment and ``sys.path`` are the caller's, and so are its warning filters: in pytest, warnings are errors in the
ranks too, and a ``filterwarnings`` mark holds there. Arguments and results are pickled (tensors by value). What the
ranks print is shown when one fails.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

PRELOAD = [
    "pytest",
    "torch",
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.pipelining",
    "torch.distributed.tensor.debug",
    "torch.distributed.tensor.parallel",
    "torch.testing._internal.distributed.fake_pg",
    "transformers.distributed.tensor_parallel",
    "transformers.distributed.pipeline_parallel",
    "transformers.integrations.tensor_parallel",
    "transformers.models.llama.modeling_llama",
    "transformers.models.phi3.modeling_phi3",
    "transformers.models.qwen3_moe.modeling_qwen3_moe",
    "datasets",
    "peft",
    "lorica",
    "lorica.cli.app",
    "lorica.train.job",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
]
#: Seconds that a function has unless it is given others: only what hangs ever needs them, however busy the machine is.
PATIENCE = 600.0
#: Seconds that the other ranks have to finish or fail too, once one has failed.
GRACE = 2.0


class RankError(AssertionError):
    """A rank raised, died or hung; the message has what every rank had to say.

    Attributes:
        failed: for each rank that raised, the exception's type and message on one line.
    """

    def __init__(self, message: str, failed: dict[int, str]) -> None:
        super().__init__(message)
        self.failed = failed


def run(ranks: int, function: Callable[..., T], *args: Any, timeout: float = PATIENCE) -> list[T]:
    """Call ``function(*args)`` on every rank and return what each returned.

    Args:
        ranks: how many processes.
        function: defined at the level of a module.
        args: the same for all ranks.
        timeout: seconds after which all ranks are killed. A collective gives up after the same time.

    Raises:
        RankError: a rank raised, died, or was not done in time.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    # Plain pickle: multiprocessing's own would share a tensor's memory, which its rank does not outlive.
    call = pickle.dumps((function, args))
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        started: list[tuple[Any, Connection]] = []
        try:
            for rank in range(ranks):
                ours, theirs = context.Pipe()
                settings = (rank, ranks, folder, timeout, dict(os.environ), warnings.filters)
                process = context.Process(target=_rank, args=(theirs, call, *settings), daemon=True)
                process.start()
                theirs.close()
                started.append((process, ours))
            said = _collect([ours for _, ours in started], timeout)
            if len(said) < ranks or any(kind != "value" for kind, _ in said.values()):
                stacks = _stacks([process for process, _ in started], folder, said)
                raise _error(function, said, stacks, ranks, timeout, folder)
            return [said[rank][1] for rank in range(ranks)]
        except BaseException:
            for process, _ in started:
                _kill(process)
            raise
        finally:
            for process, ours in started:
                ours.close()  # a rank that is done waits for this
                _end(process)


def _rank(
    pipe: Connection, call: bytes, rank: int, size: int, folder: str, timeout: float, environment: Any, filters: Any
) -> None:
    os.setsid()  # so that what the rank starts itself is killed with it
    gc.freeze()  # what the server has imported: a full collection would walk, and so copy, all of it in every rank
    output = os.open(f"{folder}/output-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    with open(f"{folder}/stack-{rank}", "w") as stack:
        faulthandler.enable(file=stack)
        faulthandler.register(signal.SIGUSR1, file=stack)
        try:
            said = "value", _call(call, rank, size, folder, timeout, environment, filters)
            message = pickle.dumps(said)
        except BaseException as error:
            last = traceback.format_exception_only(type(error), error)[-1].strip()
            message = pickle.dumps(("error", (last, traceback.format_exc())))
        with contextlib.suppress(OSError, EOFError):
            pipe.send_bytes(message)
            pipe.recv_bytes()  # nobody leaves before all are done: a closed socket would break another's collective
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _call(call: bytes, rank: int, size: int, folder: str, timeout: float, environment: Any, filters: Any) -> Any:
    import torch
    import torch.distributed as dist
    from tqdm import tqdm

    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which multiprocessing would miss when the rank has left
    os.environ.clear()
    os.environ.update(environment)
    os.environ.update(OMP_NUM_THREADS="1", RANK=str(rank), LOCAL_RANK=str(rank))
    os.environ.update(WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
    warnings.filters[:] = filters  # type: ignore[index]
    warnings._filters_mutated()  # type: ignore[attr-defined]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    store = dist.FileStore(f"{folder}/store", size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout))
    function, args = pickle.loads(call)
    return function(*args)


def _collect(pipes: Sequence[Connection], timeout: float) -> dict[int, tuple[str, Any]]:
    """Return what the ranks said, until all have, time is up, or one has failed and the others had their grace."""
    said: dict[int, tuple[str, Any]] = {}
    deadline = time.monotonic() + timeout
    waiting = {pipe: rank for rank, pipe in enumerate(pipes)}
    while waiting and (left := deadline - time.monotonic()) > 0:
        for pipe in wait(list(waiting), left):
            assert isinstance(pipe, Connection)
            rank = waiting.pop(pipe)
            try:
                said[rank] = pickle.loads(pipe.recv_bytes())
            except (EOFError, OSError):
                said[rank] = "error", ("died", "the process died")  # of what, its exit code and its stack say
            if said[rank][0] == "error":
                deadline = min(deadline, time.monotonic() + GRACE)
    return said


def _stacks(processes: Sequence[Any], folder: str, said: dict[int, Any]) -> dict[int, str]:
    """Return where the ranks are that said nothing, or were when they died."""
    silent = [rank for rank in range(len(processes)) if rank not in said]
    files = {rank: Path(folder, f"stack-{rank}") for rank in silent}
    asked = [rank for rank in silent if files[rank].exists()]  # before that the signal would kill it
    for rank in asked:
        with contextlib.suppress(OSError):
            os.kill(processes[rank].pid, signal.SIGUSR1)
    _settle([files[rank] for rank in asked])
    found = {rank: _text(files[rank]) or "(did not start)" for rank in silent}
    for rank in (rank for rank, (kind, what) in said.items() if kind == "error" and what[0] == "died"):
        processes[rank].join(GRACE)
        found[rank] = f"exit code {processes[rank].exitcode}\n{_text(Path(folder, f'stack-{rank}'))}"
    return found


def _settle(files: Sequence[Path]) -> None:
    """Wait until all files have something in them that no longer grows."""
    deadline, before = time.monotonic() + 5 * GRACE, [0]
    while time.monotonic() < deadline:
        sizes = [file.stat().st_size for file in files]
        if all(sizes) and sizes in ([], before):
            return
        before = sizes
        time.sleep(0.2)


def _error(
    function: Callable[..., Any], said: dict[int, Any], stacks: dict[int, str], size: int, timeout: float, folder: str
) -> RankError:
    failed = {rank: what[0] for rank, (kind, what) in sorted(said.items()) if kind == "error"}
    lines = [f"{function.__name__} on {size} ranks: " + ("a rank failed" if failed else f"not done in {timeout} s")]
    for rank in range(size):
        kind, what = said.get(rank, ("silent", None))
        head = {"value": "returned", "error": "failed", "silent": "was killed while here, innermost first"}[kind]
        body = "\n".join(filter(None, (what[1] if kind == "error" else "", stacks.get(rank))))
        output = _text(Path(folder, f"output-{rank}"))[-4000:]
        lines += [f"\n---- rank {rank} {head}", body.rstrip(), *([f"---- it printed\n{output}"] if output else [])]
    return RankError("\n".join(lines), failed)


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def _end(process: Any) -> None:
    process.join(GRACE)
    _kill(process)  # a rank that has left may have left something behind
    process.close()


def _kill(process: Any) -> None:
    """Kill a rank with all it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()  # also where it has no group of its own yet
    process.join()
