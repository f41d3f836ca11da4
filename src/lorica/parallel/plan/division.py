"""Dividing a model over ranks that are not there: torch's ``fake`` backend stands for all others."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lorica.engines.native import parallelize, split_stages
from lorica.engines.site import Axis
from lorica.errors import LayoutError


@dataclass(frozen=True)
class Division:
    """How many ranks each axis has.

    Attributes:
        pp: pipeline stages.
        dp: replicas with rows of their own.
        fsdp: ranks with rows of their own that store the weights in shares.
        tp: ranks over which every layer is cut.
        ep: ranks over which the experts are divided. They are the ranks of ``fsdp`` and ``tp``, seen another way.
        sp: whether tensor-parallel ranks have their own tokens between the cut layers.
        engine: who cuts the model.
    """

    pp: int = 1
    dp: int = 1
    fsdp: int = 1
    tp: int = 1
    ep: int = 1
    sp: bool = False
    engine: Literal["native", "transformers"] = "native"

    @property
    def ranks(self) -> int:
        """How many processes."""
        return self.pp * self.dp * self.fsdp * self.tp

    @property
    def data(self) -> int:
        """Over how many ranks the rows of a batch are divided."""
        return self.dp * self.fsdp

    def stage_first(self, stage: int) -> int:
        """Return the first rank of a pipeline stage."""
        return stage * (self.ranks // self.pp)

    def at(self, rank: int) -> dict[str, int]:
        """Return a rank's coordinate on every axis."""
        dense = {"pp": self.pp, "dp": self.dp, "fsdp": self.fsdp, "tp": self.tp}
        expert = {"efsdp": self.fsdp * self.tp // self.ep, "ep": self.ep}
        found: dict[str, int] = {}
        for sizes in (dense, expert):
            left = rank
            for name, size in reversed(sizes.items()):
                left, found[name] = divmod(left, size)
        return found | {"dp_replicate": found["dp"]}

    def __str__(self) -> str:
        sizes = {"pp": self.pp, "dp": self.dp, "fsdp": self.fsdp, "ep": self.ep, "tp": self.tp}
        named = [f"{name}{size}" for name, size in sizes.items() if size > 1]
        return " ".join([*named, *(["sp"] if self.sp else [])]) or "one rank"


@contextmanager
def fake_ranks(rank: int, size: int) -> Iterator[None]:
    """Be one of ``size`` ranks; what is sent goes nowhere.

    Raises:
        LayoutError: this process is one of several real ranks.
    """
    from torch.distributed.tensor import debug
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise LayoutError("this process is one of several ranks; a plan is made on a process of its own")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()
        # It holds meshes whose groups are gone, and would take them for equal ones.
        getattr(debug, "_clear_sharding_prop_cache", lambda: None)()


def divide(model: Any, division: Division, *, stored_whole: bool = False) -> list[Axis]:
    """Cut a model as a run would, on this (fake) rank, and return the axes of its meshes.

    Args:
        model: the whole model, on the meta device.
        division: over which ranks.
        stored_whole: leave the sharding of storage out, which a forward does not see.

    Raises:
        LayoutError: it cannot be cut so; says why.
    """
    if division.ranks == 1:
        return []
    try:
        cut = _by_transformers if division.engine == "transformers" else _by_lorica
        return cut(model, division, stored_whole)
    except (ValueError, AttributeError) as error:  # of transformers, and of torch's meshes
        if isinstance(error, LayoutError):
            raise
        raise LayoutError(str(error)) from error


def _by_lorica(model: Any, division: Division, stored_whole: bool) -> list[Axis]:
    if division.ep > 1:
        raise LayoutError("expert parallelism is transformers': lorica's own layers leave experts whole")
    data = {"dp": division.data} if stored_whole else {"dp": division.dp, "fsdp": division.fsdp}
    sizes = {name: size for name, size in {"pp": division.pp, **data, "tp": division.tp}.items() if size > 1}
    mesh = init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    if set(sizes) == {"dp"}:  # nothing is cut, so any model will do
        model.lorica_mesh = {"dp": Axis.of(mesh, 0)}
    else:
        parallelize(model, mesh, sequence_parallel=division.sp)
    if division.pp > 1:
        split_stages(model, mesh)
    return _axes(mesh)


def _by_transformers(model: Any, division: Division, stored_whole: bool) -> list[Axis]:
    from transformers.distributed import DistributedConfig
    from transformers.distributed.utils import TransformersDeviceMesh

    if division.sp or division.pp > 1:
        raise LayoutError("with transformers' engine there is neither sequence parallelism nor a pipeline to train in")
    config = DistributedConfig(
        tp_size=division.tp, fsdp_size=division.fsdp, dp_replicate_size=division.dp, ep_size=division.ep
    )
    dense = _mesh(pp=1, dp_replicate=division.dp, fsdp=division.fsdp, tp=division.tp)
    expert = _mesh(pp=1, dp_replicate=division.dp, efsdp=config.efsdp_size, ep=division.ep)
    if stored_whole:
        config = copy.copy(config)
        config.fsdp_size = config.dp_replicate_size = 1
    model.maybe_distribute_model(model, config, TransformersDeviceMesh(dense, expert))
    return [*_axes(dense), *_axes(expert)]


def _mesh(**sizes: int) -> DeviceMesh:
    return init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def _axes(mesh: DeviceMesh) -> list[Axis]:
    return [Axis.of(mesh, dim) for dim in range(mesh.ndim)]


def divisions(world: int, *, experts: int, engine: Literal["native", "transformers"], **fixed: Any) -> list[Division]:
    """Return every way of dividing ``world`` ranks that the given axes leave open.

    Args:
        world: how many ranks.
        experts: how many experts a layer has, 0 for none; only with them ``ep`` is varied.
        engine: who cuts.
        fixed: sizes of axes, and ``sp``, that are given.
    """
    return [
        Division(pp, world // (tp * pp * fsdp), fsdp, tp, ep, sp, "transformers" if ep > 1 else engine)
        for tp in _choices(world, fixed.get("tp"))
        for pp in _choices(world // tp, fixed.get("pp"))
        for fsdp in _choices(world // tp // pp, fixed.get("fsdp"))
        if fixed.get("dp") in (None, world // (tp * pp * fsdp)) and (min(pp, fsdp) == 1 or "pp" in fixed)
        for ep in _of_experts(experts, fsdp, tp, fixed.get("ep"))
        for sp in ([False, True][: 1 + (tp > 1)] if fixed.get("sp") is None else [fixed["sp"]])
    ]


def _of_experts(experts: int, fsdp: int, tp: int, given: int | None) -> list[int]:
    if given is not None or not experts:
        return [given or 1]
    return [ep for ep in _choices(math.gcd(experts, fsdp * tp), None) if ep == 1 or ep % tp == 0]


def _choices(number: int, given: int | None) -> list[int]:
    """Return the divisors of a number, or those of them that were asked for."""
    found = [size for size in range(1, number + 1) if number % size == 0]
    return found if given is None else [size for size in found if size == given]


__all__ = ["Division", "divide", "divisions", "fake_ranks"]
