"""This process among the ranks of a run: its mesh, its share of the rows, and what all ranks have to agree on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lorica.engines.devices import backend_for
from lorica.errors import RankError, RecipeError
from lorica.ranks.agreement import compare
from lorica.train import lost, models
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
        limit: how long ranks wait for each other in it and in others; None: as long as torch does.
    """

    rank: int = 0
    size: int = 1
    axes: Mapping[str, int] = field(default_factory=dict)
    at: Mapping[str, int] = field(default_factory=dict)
    mesh: DeviceMesh | None = None
    control: Any = None
    limit: timedelta | None = None

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

    def compare(self, fields: Mapping[str, Any]) -> None:
        """See that all ranks have the same values, by name.

        Raises:
            RankError: on every rank: which one differs in what.
        """
        if self.size > 1:
            everyone: list[Mapping[str, Any]] = [{}] * self.size
            dist.all_gather_object(everyone, dict(fields), group=self.control)
            compare(everyone)

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
        return dist.new_group(backend="gloo", timeout=self.limit) if self.size > 1 else None

    def first_does(self, act: Callable[[], object]) -> None:
        """Let the first rank do something while the others wait; where it fails, all fail.

        Raises:
            RankError: it failed on the first rank, and this is another; with its message. The first has its own error.
        """
        error: Exception | None = None
        if self.first:
            try:
                act()
            except Exception as caught:
                error = caught
        said = self.merged({0: str(error)} if error is not None else {})
        if error is not None:
            raise error
        if said:
            raise RankError(f"rank 0: {said[0]}")

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


@contextmanager
def together(section: ParallelSection, device: torch.device, agreed: Mapping[str, Any]) -> Iterator[Ranks]:
    """Meet the other ranks for the length of a block, in which the error of a rank is told by the others too.

    Args:
        agreed: see :func:`join`.

    Raises:
        RecipeError: they are not as many as the recipe asks for.
        RankError: they differ in what has to be equal.
        LostRankError: another rank died or did not answer; says which and why, as far as that can be known.
    """
    with lost.answered() as company:
        yield join(section, device, agreed, met=company.met)


def join(
    section: ParallelSection,
    device: torch.device,
    agreed: Mapping[str, Any] | None = None,
    *,
    met: Callable[[], None] = lambda: None,
) -> Ranks:
    """Meet the other ranks that torchrun started.

    Args:
        agreed: values that have to be equal on all ranks, by name. They are compared before the ranks are laid out,
            which ranks that disagree on ``section`` would do in different ways.
        met: called once the ranks know of each other.

    Raises:
        RecipeError: they are not as many as the recipe asks for.
        RankError: they differ in a value.
    """
    if not started():
        if section.ranks > 1:
            raise RecipeError(f"parallel asks for {section.ranks} processes; this is one. Start it with torchrun")
        return Ranks()
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if size == 1:
        fill(section, size)
        return Ranks()
    backend = section.backend if section.backend != "auto" else backend_for(device.type) or "gloo"
    limit = timedelta(seconds=section.timeout)
    if not dist.is_initialized():
        # The CPU's own backend carries what ranks agree on, without waiting for an accelerator.
        both = "gloo" if backend == "gloo" else f"cpu:gloo,{device.type}:{backend}"
        dist.init_process_group(both, timeout=limit)
    met()
    ranks = Ranks(rank, size, control=dist.new_group(backend="gloo", timeout=limit), limit=limit)
    ranks.compare(agreed or {})
    axes = {name: count for name, count in fill(section, size).axes.items() if count > 1}
    mesh = init_device_mesh(device.type, tuple(axes.values()), mesh_dim_names=tuple(axes))
    return replace(ranks, axes=axes, at={name: mesh.get_local_rank(name) for name in axes}, mesh=mesh)


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
