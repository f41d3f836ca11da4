"""This process among the ranks of a run: its mesh, its share of the rows, and what all ranks have to agree on."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lorica.engines.devices import backend_for
from lorica.errors import LostRankError, RankError, RecipeError
from lorica.train import models
from lorica.train.recipe import ParallelSection

_DATA = ("dp", "fsdp")


def started() -> bool:
    """Whether torchrun (or a launcher that speaks like it) started this process as a rank."""
    return {"RANK", "WORLD_SIZE"} <= os.environ.keys()


def restarted() -> bool:
    """Whether torchrun replaced ranks that were lost."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def launch() -> str | None:
    """The name of the launch that this process belongs to; ranks that are replaced belong to the same."""
    return os.environ.get("TORCHELASTIC_RUN_ID") if started() else None


@dataclass(frozen=True)
class Ranks:
    """One process among ``size``; alone it is rank 0 of 1, and agrees with itself for nothing.

    Attributes:
        axes: ranks on each axis of the mesh, from the outermost.
        at: this rank's coordinate on each axis.
        mesh: the axes of more than one rank; None on one process.
        control: a group of all ranks over which numbers on the CPU are agreed on.
    """

    rank: int = 0
    size: int = 1
    axes: Mapping[str, int] = field(default_factory=dict)
    at: Mapping[str, int] = field(default_factory=dict)
    mesh: DeviceMesh | None = None
    control: Any = None

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes files and speaks."""
        return self.rank == 0

    @property
    def share(self) -> tuple[int, int]:
        """Which share of a batch's rows this rank has, of how many."""
        index, count = 0, 1
        for axis in _DATA:
            size = self.axes.get(axis, 1)
            index, count = index * size + self.at.get(axis, 0), count * size
        return index, count

    @property
    def replica(self) -> tuple[int, int]:
        """Which of the model's replicas this rank belongs to, of how many; they do nothing together in a forward."""
        return self.at.get("dp", 0), self.axes.get("dp", 1)

    def merged(self, found: dict[int, Any]) -> dict[int, Any]:
        """What all ranks found."""
        if self.size == 1:
            return found
        everyone: list[dict[int, Any]] = [{}] * self.size
        dist.all_gather_object(everyone, found, group=self.control)
        return {key: value for other in everyone for key, value in other.items()}

    def most(self, number: int) -> int:
        """The largest of all ranks' numbers."""
        return self._agreed(torch.tensor(number), dist.ReduceOp.MAX)

    def any(self, flag: bool) -> bool:
        """Whether any rank says so."""
        return bool(self.most(int(flag)))

    def total(self, numbers: Tensor) -> Tensor:
        """The sums over all shares of a batch, of numbers that are equal on the ranks of one share; on the CPU."""
        if self.size == 1:
            return numbers.cpu()
        once = numbers.detach().to("cpu", copy=True) if self._speaks else torch.zeros_like(numbers, device="cpu")
        dist.all_reduce(once, group=self.control)
        return once

    def wait(self) -> None:
        """Let no rank go on before all are here."""
        self.most(0)

    def group(self) -> Any:
        """A new group of all ranks for tensors on the CPU, which nothing else uses; all ranks ask together."""
        return dist.new_group(backend="gloo") if self.size > 1 else None

    @contextmanager
    def first_goes_first(self) -> Iterator[None]:
        """Let the first rank through the block before the others."""
        if not self.first:
            self.wait()
        try:
            yield
        finally:
            if self.first:
                self.wait()

    @property
    def _speaks(self) -> bool:
        """Whether this rank is the first of those that have the same share (of a pipeline: of its last stage)."""
        last = self.axes.get("pp", 1) - 1
        return self.at.get("pp", 0) == last and self.at.get("tp", 0) == 0

    def _agreed(self, number: Tensor, how: Any) -> int:
        if self.size > 1:
            dist.all_reduce(number, how, group=self.control)
        return int(number)


def device(name: str) -> torch.device:
    """The device of this rank.

    Raises:
        RecipeError: there is none, or fewer than ranks on this machine.
    """
    chosen = models.device(name)
    if not started() or chosen.type == "cpu":
        return chosen
    index, count = int(os.environ.get("LOCAL_RANK", "0")), torch.accelerator.device_count()
    if index >= count:
        raise RecipeError(
            f"There are {count} {chosen.type} devices for {os.environ.get('LOCAL_WORLD_SIZE', 'more')} ranks on this "
            "machine; start fewer, or set training.device=cpu"
        )
    torch.accelerator.set_device_index(index)
    return torch.device(chosen.type, index)


def join(section: ParallelSection, device: torch.device) -> Ranks:
    """Meet the other ranks that torchrun started.

    Raises:
        RecipeError: they are not as many as the recipe asks for.
    """
    if not started():
        if section.ranks > 1:
            raise RecipeError(f"parallel asks for {section.ranks} processes; this is one. Start it with torchrun")
        return Ranks()
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    section = fill(section, size)
    if size == 1:
        return Ranks()
    backend = section.backend if section.backend != "auto" else backend_for(device.type) or "gloo"
    limit = timedelta(seconds=section.timeout)
    if not dist.is_initialized():
        # The CPU's own backend carries what ranks agree on, without waiting for an accelerator.
        both = "gloo" if backend == "gloo" else f"cpu:gloo,{device.type}:{backend}"
        dist.init_process_group(both, timeout=limit)
    axes = {name: count for name, count in section.axes.items() if count > 1}
    mesh = init_device_mesh(device.type, tuple(axes.values()), mesh_dim_names=tuple(axes))
    control = dist.new_group(backend="gloo", timeout=limit)
    at = {name: mesh.get_local_rank(name) for name in axes}
    return Ranks(rank, size, axes, at, mesh, control)


def fill(section: ParallelSection, size: int) -> ParallelSection:
    """The section with ``dp`` so that it is for ``size`` ranks.

    Raises:
        RecipeError: it cannot be.
    """
    if section.dp is None and size % section.ranks == 0:
        section = section.model_copy(update={"dp": size // section.ranks})
    if section.ranks != size:
        axes = " × ".join(f"{name} {count}" for name, count in section.axes.items() if count > 1) or "no axis"
        raise RecipeError(f"parallel asks for {section.ranks} processes ({axes}), torchrun started {size}")
    return section


def limit_waiting(limit: timedelta) -> None:
    """Let no collective of any group wait longer; groups of a mesh do not take the default group's limit."""
    if not dist.is_initialized():
        return
    from torch.distributed.distributed_c10d import _set_pg_timeout, _world

    for group in list(_world.pg_map):
        _set_pg_timeout(limit, group)


@contextmanager
def answered() -> Iterator[None]:
    """Turn what the backends raise when a rank is lost or silent into an error with this rank's number.

    Raises:
        LostRankError: a collective failed.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, RankError) or not is_lost(error):
            raise
        raise LostRankError(said_of_lost(error)) from error


def is_lost(error: BaseException) -> bool:
    """Whether an error means that another rank died or did not answer in time."""
    said = str(error)
    return isinstance(error, dist.DistError) or any(sign in said for sign in _SIGNS)


def said_of_lost(error: BaseException) -> str:
    """That another rank did not answer, and to whom."""
    return f"rank {os.environ.get('RANK', '0')} got no answer from another rank: {str(error).splitlines()[0]}"


_SIGNS = ("Connection closed by peer", "Connection reset", "Timed out waiting", "gloo/transport", "NCCL", "Broken pipe")
