"""Folders of shards as Optimum Neuron saves them, cut here by its own formulas and not by lorica's layouts.

A model of two decoder layers: grouped-query attention with q, k and v in one layer, an MLP with gate and up in one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PREFIX = "base_model.model."
HIDDEN, HEAD, HEADS, KV, MLP, VOCABULARY, RANK = 16, 2, 16, 4, 24, 40, 3
ATTENTION, EVERYTHING = ("qkv_proj", "o_proj"), ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")


def query_heads(ranks: int, rank: int) -> list[int]:
    """Query heads of a rank: its slots one after the other, each with its copy's share of the head's group."""
    multiplier = max(1, ranks // KV)
    slots, group = KV * multiplier // ranks, HEADS // KV
    share = group // multiplier
    found = []
    for slot in range(rank * slots, (rank + 1) * slots):
        head, copy = slot % KV, slot // KV
        found += [head * group + copy * share + i for i in range(share)]
    return found


def q_rows(whole: Tensor, ranks: int, rank: int) -> Tensor:
    """Rows of the query projection, or of its B."""
    return whole.view(HEADS, HEAD, -1)[query_heads(ranks, rank)].reshape(-1, whole.shape[1])


def kv_rows(whole: Tensor, ranks: int, rank: int) -> Tensor:
    """Rows of the key or value projection, or of its B."""
    return whole.repeat(max(1, ranks // KV), 1).chunk(ranks)[rank].clone()


def o_columns(whole: Tensor, ranks: int, rank: int) -> Tensor:
    """Columns of the output projection, or of its A."""
    return q_rows(whole.T.contiguous(), ranks, rank).T.contiguous()


def specs(prefix: str, layer: int, ranks: int, fuse: bool, bias: bool = False) -> list[dict[str, Any]]:
    """The serialised specifications of one decoder layer."""
    multiplier = max(1, ranks // KV)
    gqa = {
        "gqa_qkv_projection_name": "qkv_proj",
        "query_projection_name": "q_proj",
        "key_projection_name": "k_proj",
        "value_projection_name": "v_proj",
        "output_projection_name": "o_proj",
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV,
        "kv_size_multiplier": multiplier,
        "q_output_size_per_partition": HEADS * HEAD // ranks,
        "kv_output_size_per_partition": KV * HEAD * multiplier // ranks,
        "fuse_qkv": fuse,
        "bias": bias,
        "tp_size": ranks,
        "peft_type": "lora",
    }
    mlp = {
        "fused_linear_name": "gate_up_proj",
        "linear_names": ["gate_proj", "up_proj"],
        "bias": bias,
        "fuse_axis": 0,
        "original_dims": [MLP, MLP],
        "tp_size": ranks,
        "peft_type": "lora",
    }
    place = f"{prefix}model.layers.{layer}"
    return [
        {"module_fully_qualified_name": f"{place}.self_attn", "specs": [["GQAQKVColumnParallelLinearSpec", gqa]]},
        {"module_fully_qualified_name": f"{place}.mlp", "specs": [["FusedLinearsSpec", mlp]]},
    ]


def adapter_tensors(layers: int = 2, targets: tuple[str, ...] = EVERYTHING, seed: int = 0) -> dict[str, Tensor]:
    """An adapter in PEFT's names, as such files can hold it: one A for q, k and v, one for gate and up."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    found: dict[str, Tensor] = {}
    for layer in range(layers):
        place = f"{PREFIX}model.layers.{layer}"
        parts = {
            "qkv_proj": {"q": HEADS * HEAD, "k": KV * HEAD, "v": KV * HEAD},
            "gate_up_proj": {"gate": MLP, "up": MLP},
        }
        for target, rows in parts.items():
            if target in targets:
                inside, a = "self_attn" if target == "qkv_proj" else "mlp", draw(RANK, HIDDEN)
                for name, length in rows.items():
                    found[f"{place}.{inside}.{name}_proj.lora_A.weight"] = a
                    found[f"{place}.{inside}.{name}_proj.lora_B.weight"] = draw(length, RANK)
        for target, columns in {"self_attn.o_proj": HEADS * HEAD, "mlp.down_proj": MLP}.items():
            if target.partition(".")[2] in targets:
                found[f"{place}.{target}.lora_A.weight"] = draw(RANK, columns)
                found[f"{place}.{target}.lora_B.weight"] = draw(HIDDEN, RANK)
    return found


def rank_tensors(whole: dict[str, Tensor], layer: int, ranks: int, rank: int, fuse: bool) -> dict[str, Tensor]:
    """What a rank has of one decoder layer's factors, under the names in its file."""
    place, found = f"{PREFIX}model.layers.{layer}", {}

    def of(name: str, letter: str) -> Tensor | None:
        return whole.get(f"{place}.{name}.lora_{letter}.weight")

    if (a := of("self_attn.q_proj", "A")) is not None:
        names = [("q", q_rows), ("k", kv_rows), ("v", kv_rows)]
        b = {name: cut(of(f"self_attn.{name}_proj", "B"), ranks, rank) for name, cut in names}  # type: ignore[arg-type]
        found[f"{place}.self_attn.qkv_proj.lora_A.weight"] = a
        joined = {"weight_qkv": torch.cat([*b.values()])} if fuse else {f"weight_{n}": t for n, t in b.items()}
        found |= {f"{place}.self_attn.qkv_proj.lora_B.{leaf}": tensor for leaf, tensor in joined.items()}
    if (a := of("self_attn.o_proj", "A")) is not None:
        found[f"{place}.self_attn.o_proj.lora_A.weight"] = o_columns(a, ranks, rank)
        found[f"{place}.self_attn.o_proj.lora_B.weight"] = of("self_attn.o_proj", "B")  # type: ignore[assignment]
    if (a := of("mlp.gate_proj", "A")) is not None:
        pieces = [of(f"mlp.{name}_proj", "B").chunk(ranks)[rank] for name in ("gate", "up")]  # type: ignore[union-attr]
        found[f"{place}.mlp.gate_up_proj.lora_A.weight"] = a
        found[f"{place}.mlp.gate_up_proj.lora_B.weight"] = torch.cat(pieces)
    if (a := of("mlp.down_proj", "A")) is not None:
        found[f"{place}.mlp.down_proj.lora_A.weight"] = a.chunk(ranks, 1)[rank].contiguous()
        found[f"{place}.mlp.down_proj.lora_B.weight"] = of("mlp.down_proj", "B")  # type: ignore[assignment]
    return found


def metadata(names: list[str], layers: list[int], ranks: int, fuse: bool, adapters: tuple[str, ...]) -> dict[str, Any]:
    """What lies beside the shards of a stage: the parameters of the adapted model, with every adapter's name.

    The first of ``adapters`` is the one that was saved.
    """
    cut = {"tensor_model_parallel": True, "partition_stride": 1, "num_partitions": ranks}
    parameters: dict[str, Any] = {}
    for layer in layers:
        place = f"{PREFIX}model.layers.{layer}"
        for base in ("self_attn.qkv_proj.weight_q", "self_attn.o_proj.weight", "mlp.down_proj.weight"):
            owner, _, leaf = base.rpartition(".")
            parameters[f"{place}.{owner}.base_layer.{leaf}"] = {**cut, "partition_dim": int(owner[-6:] != "v_proj")}
    for name in names:
        owner, letter, leaf = name.rpartition(".lora_")[0], name.rpartition(".lora_")[2][0], name.rpartition(".")[2]
        sharded = letter == ("A" if owner.endswith(("o_proj", "down_proj")) else "B")
        about = {**cut, "partition_dim": 0 if letter == "B" else 1} if sharded else {"tensor_model_parallel": False}
        parameters[f"{owner}.lora_{letter}.{adapters[0]}.{leaf}"] = about
        for other in adapters[1:]:  # whose marks are nobody else's, and cannot be
            parameters[f"{owner}.lora_{letter}.{other}.{leaf}"] = {**cut, "partition_dim": 7}
    serialised = [one for layer in layers for one in specs(PREFIX, layer, ranks, fuse)]
    return {"parameters": parameters, "model_weight_transformation_specs": serialised}


def save(
    directory: Path,
    whole: dict[str, Tensor],
    ranks: int,
    *,
    stages: int = 1,
    fuse: bool = False,
    adapter: str = "default",
    others: tuple[str, ...] = (),
    config: dict[str, Any] | None = None,
) -> Path:
    """Save an adapter as Optimum Neuron does; return its folder of shards."""
    folder = directory / f"adapter_{adapter}"
    shards = folder / "adapter_shards"
    (shards / "model").mkdir(parents=True)
    for stage in range(stages):
        layers = [0, 1] if stages == 1 else [stage]
        for rank in range(ranks):
            state = {k: t.clone() for layer in layers for k, t in rank_tensors(whole, layer, ranks, rank, fuse).items()}
            torch.save(state, shards / "model" / f"dp_rank_00_tp_rank_{rank:02d}_pp_rank_{stage:02d}.pt")
        about = metadata([*state], layers, ranks, fuse, (adapter, *others))
        (shards / f"mp_metadata_pp_rank_{stage}.json").write_text(json.dumps(about, indent=4))
    for name in ("checkpoint", "done"):
        (shards / name).write_text("1")
    values = {"peft_type": "LORA", "r": RANK, "lora_alpha": 6, "task_type": "CAUSAL_LM", "base_model_name_or_path": "m"}
    values |= {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(values | (config or {})))
    return shards
