"""Tiny GPT models of Megatron-Core: the same model under every division, cut from weights that are drawn whole.

A parameter's *logical* name has the global number of its layer (whatever the pipeline stage) and of its expert
(whatever the expert-parallel rank); the name and nothing else seeds the logical tensor, of which a rank takes what
Megatron-Core's own attributes (``partition_dim``, ``partition_stride``) say. This is written down here once more,
apart from lorica's engine, so that the one is tested against the other.
"""

from __future__ import annotations

import copy
import re
import zlib
from dataclasses import dataclass
from typing import Any

import torch
from stand_ins import AttentionInContext, GroupedLinear, GroupedRow
from torch import Tensor, nn

LAYERS, HIDDEN, FFN, HEADS, GROUPS, VOCABULARY, EXPERTS = 4, 32, 48, 4, 2, 64, 4
#: Longest sequence.
POSITIONS = 32


@dataclass(frozen=True)
class Division:
    """How a model lies over the ranks.

    Attributes:
        tp: tensor-parallel size.
        sp: whether activations between the blocks are divided by tokens.
        pp: pipeline stages.
        vpp: chunks of layers on each stage; None: one.
        ep: expert-parallel size.
        etp: tensor-parallel size of the experts; None: ``tp``.
        cp: context-parallel size; of a sequence, cut into ``2 cp`` pieces, a rank has one from either end.
    """

    tp: int = 1
    sp: bool = False
    pp: int = 1
    vpp: int | None = None
    ep: int = 1
    etp: int | None = None
    cp: int = 1

    def __str__(self) -> str:
        sizes = {"tp": self.tp, "pp": self.pp, "vpp": self.vpp or 1, "ep": self.ep, "cp": self.cp}
        words = [f"{name}{size}" for name, size in sizes.items() if size > 1]
        words += ["sp"] * self.sp + ([f"etp{self.etp}"] if self.etp else [])
        return " ".join(words) or "whole"


def config(division: Division, **changes: Any) -> Any:
    """Return the ``TransformerConfig`` of the tiny model under a division; ``changes`` are fields of it."""
    from megatron.core.transformer import TransformerConfig

    fields: dict[str, Any] = {
        "num_layers": LAYERS,
        "hidden_size": HIDDEN,
        "ffn_hidden_size": FFN,
        "num_attention_heads": HEADS,
        "num_query_groups": GROUPS,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "use_cpu_initialization": True,
        "tensor_model_parallel_size": division.tp,
        "sequence_parallel": division.sp,
        "pipeline_model_parallel_size": division.pp,
        "virtual_pipeline_model_parallel_size": division.vpp,
        "expert_model_parallel_size": division.ep,
        "expert_tensor_parallel_size": division.etp or division.tp,
        "context_parallel_size": division.cp,
        "pipeline_dtype": torch.float32,
        "batch_p2p_comm": False,
    }
    return TransformerConfig(**fields | changes)


def moe(**changes: Any) -> dict[str, Any]:
    """Return the fields of :func:`config` that make the model one of experts; ``changes`` are fields too."""
    fields: dict[str, Any] = {
        "num_layers": 2,  # a stage has one; chunks of layers are tried on dense models
        "num_moe_experts": EXPERTS,
        "moe_ffn_hidden_size": FFN // 2,
        "moe_router_topk": 2,
        "moe_token_dispatcher_type": "alltoall",
        "moe_router_load_balancing_type": "none",
        "moe_router_dtype": "fp32",
    }
    return fields | changes


def chunks(
    division: Division,
    *,
    tied: bool = False,
    train_base: bool = False,
    grouped_layers: bool = False,
    **changes: Any,
) -> list[Any]:
    """Return this rank's ``GPTModel``s, one for each chunk of layers it has (one, without ``vpp``).

    Args:
        division: the one that :func:`world.divided` has set up.
        tied: whether the output layer is the embedding.
        train_base: whether the base weights train too; else they are frozen.
        grouped_layers: whether experts are a ``TEGroupedMLP``, whose layers of many weights are stand-ins.
        **changes: fields of ``TransformerConfig``; for experts ``**moe()``.
    """
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    settings = config(division, **changes)
    layer = get_gpt_layer_local_spec(
        settings.num_moe_experts,
        moe_grouped_gemm=settings.moe_grouped_gemm,
        qk_layernorm=settings.qk_layernorm,
        moe_use_legacy_grouped_gemm=settings.moe_grouped_gemm,
        normalization=settings.normalization,
    )
    if grouped_layers:
        from megatron.core.transformer.mlp import MLPSubmodules
        from megatron.core.transformer.moe.experts import TEGroupedMLP
        from megatron.core.transformer.spec_utils import ModuleSpec

        layers = MLPSubmodules(linear_fc1=GroupedLinear, linear_fc2=GroupedRow)
        layer.submodules.mlp.submodules.experts = ModuleSpec(module=TEGroupedMLP, submodules=layers)
    if division.cp > 1:
        layer.submodules.self_attention.submodules.core_attention = AttentionInContext
    made = []
    for stage in range(division.vpp or 1):
        place = {"vp_stage": stage if division.vpp else None, "ignore_virtual": division.vpp is None}
        model = GPTModel(
            settings,
            layer,
            VOCABULARY,
            POSITIONS,
            pre_process=parallel_state.is_pipeline_first_stage(**_known(place)),
            post_process=parallel_state.is_pipeline_last_stage(**_known(place)),
            share_embeddings_and_output_weights=tied,
            position_embedding_type="rope",
            vp_stage=place["vp_stage"],
        )
        fill(model)
        made.append(model.requires_grad_(train_base))
    return made


def _known(place: dict[str, Any]) -> dict[str, Any]:
    return {"ignore_virtual": False, "vp_stage": place["vp_stage"]} if place["vp_stage"] is not None else {}


# ---- logical names and weights -------------------------------------------------------------------------------------


def logical_names(model: nn.Module) -> dict[str, str]:
    """Return the logical name of each module, by its name here."""
    from megatron.core import parallel_state

    found = {"": ""}
    for name, module in model.named_modules():
        parent, _, own = name.rpartition(".")
        if hasattr(module, "layer_number") and own.isdigit():
            own = str(module.layer_number - 1)
        elif parent.endswith(".local_experts"):
            count = len(list(model.get_submodule(parent).children()))
            own = str(parallel_state.get_expert_model_parallel_rank() * count + int(own))
        found[name] = f"{found[parent]}.{own}".lstrip(".")
    return found


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Give every parameter its piece of the logical tensor that its logical name seeds."""
    names = logical_names(model)
    for name, module in model.named_modules():
        if type(module).__name__ == "GroupedMLP":
            _fill_grouped(module, names[name])
            continue
        if isinstance(module, GroupedLinear):
            _fill_layers(model.get_submodule(name.rpartition(".")[0]), module, names[name])
            continue
        for own, parameter in module.named_parameters(recurse=False):
            known = names[name]
            if known == "output_layer" and model.share_embeddings_and_output_weights:
                known = "embedding.word_embeddings"  # a copy of it, on the last stage
            parameter.copy_(piece(f"{known}.{own}", parameter, "experts." in f"{name}."))


def piece(name: str, parameter: Tensor, expert: bool) -> Tensor:
    """Return this rank's piece of the logical tensor under a name."""
    from megatron.core import parallel_state

    routed = expert and "shared_experts" not in name
    if not getattr(parameter, "tensor_model_parallel", False):
        return drawn(name, parameter.shape)
    size = parallel_state.get_expert_tensor_parallel_world_size if routed else _tp_size
    rank = parallel_state.get_expert_tensor_parallel_rank if routed else parallel_state.get_tensor_model_parallel_rank
    shape = list(parameter.shape)
    dim, stride = parameter.partition_dim, parameter.partition_stride  # type: ignore[attr-defined]
    run = shape[dim] // stride
    shape[dim] *= size()
    return torch.cat(torch.split(drawn(name, shape), run, dim)[rank() :: size()], dim)


def _tp_size() -> int:
    from megatron.core import parallel_state

    return int(parallel_state.get_tensor_model_parallel_world_size())


def _fill_grouped(module: Any, name: str) -> None:
    """Give the stacked weights of grouped experts, ``[in, out]`` of each, those of experts that are modules."""
    from megatron.core import parallel_state

    size, rank = module.tp_group.size(), module.tp_group.rank()
    module.config = copy.copy(module.config)
    module.config.bf16 = True  # it is asserted of a kernel that is not here; all is computed in float32 all the same
    count, hidden = module.num_local_experts, module.config.hidden_size
    first = parallel_state.get_expert_model_parallel_rank() * count
    width = module.weight2.numel() // count // hidden * size
    up, down = module.weight1.view(count, hidden, -1), module.weight2.view(count, -1, hidden)
    for index in range(count):
        expert = f"{name}.local_experts.{first + index}"
        gated = 2 if module.config.gated_linear_unit else 1
        whole = drawn(f"{expert}.linear_fc1.weight", (gated * width, hidden))
        run = width // size
        up[index] = torch.cat(torch.split(whole, run)[rank::size]).T
        down[index] = drawn(f"{expert}.linear_fc2.weight", (hidden, width)).T[rank * run : (rank + 1) * run]


def _fill_layers(block: Any, layer: GroupedLinear, name: str) -> None:
    """Give a layer of many weights those of experts that are modules."""
    size, rank, count = block.tp_group.size(), block.tp_group.rank(), block.num_local_experts
    before, _, own = name.rpartition(".")
    for index in range(count):
        weight = layer.get_parameter(f"weight{index}")
        shape = list(weight.shape)
        shape[layer.divided] *= size
        whole = drawn(f"{before}.local_experts.{block.ep_group.rank() * count + index}.{own}.weight", shape)
        runs = 2 if own == "linear_fc1" and block.config.gated_linear_unit else 1
        run = weight.shape[layer.divided] // runs
        weight.copy_(torch.cat(torch.split(whole, run, layer.divided)[rank::size], layer.divided))


def drawn(name: str, shape: Any) -> Tensor:
    """Return the logical tensor that a name seeds."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    whole = torch.randn(tuple(shape), generator=generator) / (shape[-1] ** 0.5)
    norm = len(shape) == 1 and re.search(r"norm", name)
    return 1 + 0.1 * whole if norm else whole
