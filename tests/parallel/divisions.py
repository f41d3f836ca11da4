"""How models lie over ranks: every engine's way of cutting, one registry for the contract.

A new engine or layout is one function that returns this rank's model, and one line in :data:`DIVISIONS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from subjects import Subject, logits_of, loss_of
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

#: From a subject and a folder with the whole model, saved, to this rank's frozen model.
Cut = Callable[[Subject, str], nn.Module]


class Plain:
    """Runs a model that every rank calls whole.

    Args:
        model: this rank's, adapted or not, or what an engine made of it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:
        """The output on every rank."""
        return logits_of(self.model(input_ids=ids))

    def train(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The output and the loss on every rank, after a forward and a backward."""
        logits = logits_of(self.model(input_ids=ids))
        loss = loss_of(logits, ids)
        loss.backward()
        return logits.detach(), loss.detach()


class Pipelined(Plain):
    """Runs a stage by torch's schedules."""

    def __init__(self, model: nn.Module) -> None:
        from lorica.parallel import stage

        super().__init__(model)
        self.axis = next(module.lorica_mesh for module in model.modules() if hasattr(module, "lorica_mesh"))["pp"]
        self.stage, self.schedule = stage(model, self.axis, microbatches=2, loss=loss_of)

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:
        """One stage after the other, each telling all."""
        x = ids
        for rank in range(self.axis.size):
            x = self._told(self.stage.submod(x) if rank == self.axis.rank else None, rank)
        return x

    def train(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Two microbatches; the loss is their mean."""
        last, losses = self.axis.size - 1, []
        given = {"target": ids, "losses": losses} if self.axis.rank == last else {}
        output = self.schedule.step(*([ids] if self.axis.rank == 0 else []), **given)
        found = (output.detach(), torch.stack(losses).mean().detach()) if losses else None
        return self._told(found, last)

    def _told(self, value: Any, rank: int) -> Any:
        box = [value]
        dist.broadcast_object_list(box, group=self.axis.group, group_src=rank)
        return box[0]


@dataclass(frozen=True)
class Division:
    """One way of laying a model over ranks.

    Attributes:
        ranks: how many.
        cut: makes this rank's model.
        subjects: names of the subjects that it can cut.
        data: how many groups of neighbouring ranks see batches of their own.
        late: what is done to the adapted model, where the engine comes after the adapter.
        exact: whether an engine that comes after the adapter leaves the order of every sum as it was.
        brief: whether only variants are tried, where another division says the rest of it.
        runner: how this rank's model is run.
        counted: whether the collectives of LoRA are counted against the base model's. Not where the engine itself
            reduces the factors' gradients in backward.
    """

    ranks: int
    cut: Cut
    subjects: tuple[str, ...] = ("llama",)
    data: int = 1
    late: Callable[[nn.Module], nn.Module] | None = None
    runner: type[Plain] = Plain
    counted: bool = True
    exact: bool = True
    brief: bool = False


def _mesh(**sizes: int) -> DeviceMesh:
    return init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def whole(subject: Subject, folder: str) -> nn.Module:
    """Not cut."""
    return subject.build()


def native(*, sequence: bool = False, **sizes: int) -> Cut:
    """Cut by lorica's own layers."""

    def cut(subject: Subject, folder: str) -> nn.Module:
        from lorica.parallel import parallelize

        return parallelize(subject.build(), _mesh(**sizes), sequence_parallel=sequence)

    return cut


def stages(**sizes: int) -> Cut:
    """Split into stages, perhaps cut by lorica's own layers before."""

    def cut(subject: Subject, folder: str) -> nn.Module:
        from lorica.parallel import parallelize, split_stages

        mesh = _mesh(**sizes)
        return split_stages(parallelize(subject.build(), mesh), mesh)

    return cut


def transformers(**sizes: Any) -> Cut:
    """Loaded by transformers' ``from_pretrained`` with a ``DistributedConfig``."""

    def cut(subject: Subject, folder: str) -> nn.Module:
        from transformers import AutoModelForCausalLM
        from transformers.distributed import DistributedConfig

        model = AutoModelForCausalLM.from_pretrained(
            folder, distributed_config=DistributedConfig(**sizes), attn_implementation="eager", dtype="auto"
        )
        return model.eval().requires_grad_(False)

    return cut


def torch_tensor_parallel(subject: Subject, folder: str) -> nn.Module:
    """torch's ``parallelize_module``."""
    return _cut_by_torch(subject.build())


def _cut_by_torch(model: Any) -> nn.Module:
    """Columns, rows, the embedding and the head."""
    columns, rows = ColwiseParallel, RowwiseParallel
    for layer in model.model.layers:
        plan = {f"self_attn.{name}_proj": columns() for name in "qkv"} | {"self_attn.o_proj": rows()}
        plan |= {"mlp.gate_proj": columns(), "mlp.up_proj": columns(), "mlp.down_proj": rows()}
        parallelize_module(layer, _tp(), plan)
    ends = {
        "model.embed_tokens": rows(input_layouts=Replicate()),
        "lm_head": columns(output_layouts=Replicate()),
    }
    return parallelize_module(model, _tp(), ends)


def torch_sequence_parallel(subject: Subject, folder: str) -> nn.Module:
    """The same with activations between the blocks divided by tokens."""
    model: Any = subject.build()
    columns, rows = ColwiseParallel, RowwiseParallel
    tokens, everywhere = Shard(1), Replicate()
    for layer in model.model.layers:
        gathered = PrepareModuleInput(
            input_kwarg_layouts={"hidden_states": tokens}, desired_input_kwarg_layouts={"hidden_states": everywhere}
        )
        plan = {f"self_attn.{name}_proj": columns() for name in "qkv"}
        plan |= {
            "input_layernorm": SequenceParallel(),
            "self_attn": gathered,
            "self_attn.o_proj": rows(output_layouts=tokens),
            "post_attention_layernorm": SequenceParallel(),
            "mlp": PrepareModuleInput(input_layouts=tokens, desired_input_layouts=everywhere),
            "mlp.gate_proj": columns(),
            "mlp.up_proj": columns(),
            "mlp.down_proj": rows(output_layouts=tokens),
        }
        parallelize_module(layer, _tp(), plan)
    first = PrepareModuleInput(input_layouts=everywhere, desired_input_layouts=tokens, use_local_output=True)
    ends = {
        "model.embed_tokens": rows(input_layouts=everywhere),  # the model takes positions and mask from its output
        "model.layers.0": first,
        "model.norm": SequenceParallel(),
        "lm_head": columns(input_layouts=tokens, output_layouts=everywhere),
    }
    return parallelize_module(model, _tp(), ends)


def _tp() -> DeviceMesh:
    return _mesh(tp=dist.get_world_size())


def shard(model: Any) -> nn.Module:
    """torch's ``fully_shard`` on every block and the rest."""
    mesh = _mesh(fsdp=dist.get_world_size())
    blocks = [module for name, module in model.named_modules() if name.rpartition(".")[0].endswith("layers")]
    for block in blocks or [model.get_base_model()]:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def recut(cut: Callable[[nn.Module], object]) -> Callable[[nn.Module], nn.Module]:
    """A way of cutting a model that is adapted already."""

    def late(model: nn.Module) -> nn.Module:
        from lorica.parallel import cutting

        with cutting(model) as base:
            cut(base)
        return model

    return late


def _cut_natively(base: nn.Module) -> None:
    from lorica.parallel import parallelize

    parallelize(base, _mesh(tp=dist.get_world_size()))


def fully_sharded(subject: Subject, folder: str) -> nn.Module:
    """Sharded before it is adapted."""
    return shard(subject.build())


_ALL = ("llama", "llama's ends", "qwen3-moe", "phi3", "stories260K")

DIVISIONS = {
    "one process": Division(1, whole, (*_ALL, "rest")),
    "native tp2": Division(2, native(tp=2), _ALL),
    "native tp4": Division(4, native(tp=4)),
    "native tp8": Division(8, native(tp=8)),
    "native tp2 sp": Division(2, native(tp=2, sequence=True)),
    "native tp8 fused": Division(8, native(tp=8), ("phi3",), brief=True),
    "native pp2": Division(2, stages(pp=2), runner=Pipelined),
    "native pp2 tp2": Division(4, stages(pp=2, tp=2), runner=Pipelined),
    "native fsdp2 tp2": Division(4, native(fsdp=2, tp=2), data=2),
    "native dp2": Division(2, native(dp=2, tp=1), data=2),
    "native dp2 tp2": Division(4, native(dp=2, tp=2), data=2),
    "transformers tp2": Division(2, transformers(tp_size=2), (*_ALL, "deepseek")),
    "transformers fsdp2": Division(2, transformers(fsdp_size=2), data=2),
    "transformers fsdp2 tp2": Division(4, transformers(fsdp_size=2, tp_size=2), data=2),
    "transformers ep2": Division(2, transformers(ep_size=2, fsdp_size=2), ("qwen3-moe",), data=2),
    "transformers ep2 tp2": Division(2, transformers(ep_size=2, tp_size=2), ("qwen3-moe",)),
    "transformers ep2 tp2 fsdp2": Division(4, transformers(ep_size=2, tp_size=2, fsdp_size=2), ("qwen3-moe",), data=2),
    "torch tp2": Division(2, torch_tensor_parallel),
    "torch tp2 sp": Division(2, torch_sequence_parallel),
    "torch fsdp2": Division(2, fully_sharded, ("llama", "llama's ends"), data=2),
    "torch fsdp2, adapted before": Division(
        2, whole, ("llama", "llama's ends", "rest"), data=2, late=shard, counted=False
    ),
    "native tp2, adapted before": Division(2, whole, late=recut(_cut_natively), counted=False, exact=False),
    "torch tp2, adapted before": Division(2, whole, late=recut(_cut_by_torch), counted=False, exact=False),
    "ddp2": Division(2, whole, ("llama", "rest"), data=2, late=DistributedDataParallel, counted=False),
}
