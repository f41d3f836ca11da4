"""optimum.neuron.models.training.config: how a model is cut, and on which device, said once.

Nothing here knows of an accelerator. ``device_type="neuron"`` and ``backend="neuron"`` are Trainium's native PyTorch,
whose package registers both as it is imported (``import torch_neuronx``); ``"cuda"`` and ``"cpu"`` go the same way.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lorica.engines.devices import accelerator, backend_for
from lorica.engines.native import parallelize, split_stages
from lorica.errors import ConfigError


@dataclass
class TrainingNeuronConfig:
    """How a model is cut over ranks.

    Unlike Optimum Neuron's, making one starts nothing: :meth:`mesh` does.

    Args:
        tensor_parallel_size: ranks over which each layer is cut.
        parallelize_embeddings: whether the embedding and the head are cut too.
        sequence_parallel_enabled: whether each of these ranks has its tokens only between the layers.
        kv_size_multiplier: ranks that hold each key/value head; None: as few as needed.
        pipeline_parallel_size: stages of the model.
        virtual_pipeline_parallel_size: must be 1.
        pipeline_parallel_num_microbatches: into how many parts a batch is divided for the stages.
        pipeline_parallel_use_zero1_optimizer: accepted; lorica's factors are small, their optimiser's state is whole.
        gradient_checkpointing: whether activations are computed again in the backward pass.
        checkpoint_dir: accepted, for programs that read it.
        num_local_ranks_per_step: accepted; an adapter is saved as one file.
        use_xser: accepted; likewise.
        async_save: accepted; likewise.
        fuse_qkv: accepted; q, k and v keep factors of their own, fused or not.
        recompute_causal_mask: accepted.
        transpose_nki_inputs: accepted.
        device_type: torch's name of the kind of device (``"neuron"``, ``"cuda"``, ``"cpu"``); None: the accelerator
            that is there, else the CPU. lorica's own.
        backend: of the process groups (``"neuron"``, ``"nccl"``, ``"gloo"``, …); None: what torch has for the device.
            lorica's own.
        timeout: seconds after which ranks give up waiting for one another. lorica's own.

    Raises:
        ConfigError: a number is impossible.
    """

    tensor_parallel_size: int = 1
    parallelize_embeddings: bool = True
    sequence_parallel_enabled: bool = False
    kv_size_multiplier: int | None = None
    pipeline_parallel_size: int = 1
    virtual_pipeline_parallel_size: int = 1
    pipeline_parallel_num_microbatches: int = 1
    pipeline_parallel_use_zero1_optimizer: bool = False
    gradient_checkpointing: bool = False
    checkpoint_dir: str | Path | None = None
    num_local_ranks_per_step: int = 8
    use_xser: bool = True
    async_save: bool = False
    fuse_qkv: bool = False
    recompute_causal_mask: bool = True
    transpose_nki_inputs: bool = True
    device_type: str | None = field(default=None, kw_only=True)
    backend: str | None = field(default=None, kw_only=True)
    timeout: float = field(default=600.0, kw_only=True)

    def __post_init__(self) -> None:
        for name in ("tensor_parallel_size", "pipeline_parallel_size", "pipeline_parallel_num_microbatches"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.virtual_pipeline_parallel_size != 1:
            raise ConfigError("virtual_pipeline_parallel_size: a rank has one stage here; leave it at 1")
        if isinstance(self.checkpoint_dir, str):
            self.checkpoint_dir = Path(self.checkpoint_dir)

    def auto_kv_size_multiplier(self, num_key_value_heads: int) -> int:
        """Return how many ranks hold each key/value head.

        Args:
            num_key_value_heads: of the model.

        Raises:
            ConfigError: the configuration says another number.
        """
        found = max(1, self.tensor_parallel_size // num_key_value_heads)
        if self.kv_size_multiplier not in (None, found):
            raise ConfigError(
                f"A kv size multiplier was already specified and is different from the inferred one: "
                f"{self.kv_size_multiplier}, not {found}"
            )
        return found

    @property
    def should_parallelize(self) -> bool:
        """Whether the model is cut at all."""
        return self.tensor_parallel_size > 1 or self.pipeline_parallel_size > 1

    # ---- lorica's own ------------------------------------------------------------------------------------------------

    def device(self) -> torch.device:
        """Return this rank's device.

        Raises:
            ConfigError: torch has no such device.
        """
        kind = self._device_type()
        try:
            return torch.device(kind) if kind in ("cpu", "meta") else torch.device(kind, _local_rank())
        except RuntimeError as error:
            raise ConfigError(f"device_type={kind!r}: {error}; import the package that registers it") from error

    def mesh(self) -> DeviceMesh:
        """Return the mesh of all ranks, ``("pp", "dp", "tp")`` as far as they are more than one; starts them if needed.

        A process group that is there already is taken as it is.

        Raises:
            ConfigError: the ranks do not divide so, or the process was not started as one of several.
        """
        kind = self._device_type()
        if not dist.is_initialized():
            if not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
                raise ConfigError("torch.distributed is not initialised; start the program by torchrun")
            if kind != "cpu":
                torch.accelerator.set_device_index(_local_rank())
            dist.init_process_group(self._backend(kind), timeout=timedelta(seconds=self.timeout))
        replicas, rest = divmod(dist.get_world_size(), self.tensor_parallel_size * self.pipeline_parallel_size)
        if rest or not replicas:
            raise ConfigError(
                f"{dist.get_world_size()} ranks are not a multiple of {self.pipeline_parallel_size} stages of "
                f"{self.tensor_parallel_size} ranks"
            )
        sizes = {"pp": self.pipeline_parallel_size, "dp": replicas, "tp": self.tensor_parallel_size}
        sizes = {name: size for name, size in sizes.items() if size > 1} or {"tp": 1}
        return init_device_mesh(kind, tuple(sizes.values()), mesh_dim_names=tuple(sizes))

    def parallelize(self, model: nn.Module, mesh: DeviceMesh | None = None) -> nn.Module:
        """Cut a Llama-like transformers model in place, as this says, and return it; see :func:`lorica.parallel`.

        Args:
            model: whole, the same on every rank, without adapters.
            mesh: what :meth:`mesh` returned; None: call it.

        Raises:
            LayoutError: something cannot be cut. Nothing was changed.
        """
        mesh = self.mesh() if mesh is None else mesh
        made: Any = parallelize(
            model,
            mesh,
            sequence_parallel=self.sequence_parallel_enabled,
            kv_size_multiplier=self.kv_size_multiplier,
            whole=() if self.parallelize_embeddings else _ends(model),
        )
        if "pp" in (mesh.mesh_dim_names or ()):
            made = split_stages(made, mesh)
        if self.gradient_checkpointing:
            made.gradient_checkpointing_enable()
        return made  # type: ignore[no-any-return]

    def _device_type(self) -> str:
        if self.device_type is not None:
            return self.device_type
        return accelerator() or "cpu"

    def _backend(self, kind: str) -> str:
        if self.backend is not None:
            return self.backend
        if (found := backend_for(kind)) is None:
            raise ConfigError(f"torch has no backend for {kind!r}: say which, or import the package that registers it")
        return found


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def _ends(model: Any) -> tuple[str, ...]:
    """Return the last names of the embedding and the head."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    return tuple(name.rpartition(".")[2] for name, module in model.named_modules() if any(module is e for e in ends))


__all__ = ["TrainingNeuronConfig"]
