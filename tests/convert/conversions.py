"""Adapters of tiny models, and what is in the files of each system, tensor by tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import models
from lorica import LoraConfig, get_peft_model
from lorica.convert import Conversion, convert_adapter
from lorica.convert.dcp import Distributed
from lorica.convert.megatron import find_iteration
from lorica.layout.specs import same

DENSE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
OTHER = {
    "peft": ("megatron-bridge", "neuron"),
    "megatron-bridge": ("peft", "neuron"),
    "neuron": ("peft", "megatron-bridge"),
}


def base(kind: str) -> Any:
    """Return a tiny model: ``llama`` (grouped queries), ``mha`` (as many key/value heads), ``phi3``, ``moe``."""
    import transformers

    if kind == "llama":
        return models.tiny_llama()
    sizes: dict[str, Any] = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 4 if kind == "mha" else 2, "pad_token_id": 0}
    torch.manual_seed(0)
    if kind == "mha":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()
    if kind == "phi3":
        config = transformers.Phi3Config(**sizes, bos_token_id=1, eos_token_id=2, max_position_embeddings=32)
        return transformers.Phi3ForCausalLM(config).eval()
    sizes |= {"moe_intermediate_size": 12, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 4}
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**sizes)).eval()


def save(folder: Path, kind: str = "llama", *, shared: bool = False, **fields: Any) -> Path:
    """Save an adapter with random factors, and the model's configuration beside it; return the adapter's directory.

    Args:
        folder: where ``adapter/`` and ``model/`` go.
        kind: of the model.
        shared: whether q, k and v (gate and up) share their A.
        fields: of the configuration.
    """
    model = base(kind)
    model.config.save_pretrained(folder / "model")
    targets = {"phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"], "moe": DENSE[:4]}.get(kind, DENSE)
    given = {"target_modules": targets, "r": 2, "lora_alpha": 6, "task_type": "CAUSAL_LM", "init_lora_weights": False}
    if kind == "moe":
        given["target_parameters"] = EXPERTS
    torch.manual_seed(1)
    adapted = get_peft_model(model, LoraConfig(**given | fields))
    if shared:
        _share(adapted)
    adapted.save_pretrained(str(folder / "adapter"), save_embedding_layers=False)
    return folder / "adapter"


@torch.no_grad()
def _share(adapted: Any) -> None:
    for name, parameter in adapted.named_parameters():
        for group in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            for leaf in group[1:]:
                if f".{leaf}.lora_A." in name:
                    parameter.copy_(adapted.get_parameter(name.replace(f".{leaf}.", f".{group[0]}.")))


def move(source: Path, target: Path, way: tuple[str, str], **options: Any) -> Conversion:
    """Convert from one system to another."""
    return convert_adapter(source, target, source=way[0], target=way[1], **options)


def contents(folder: Path, system: str) -> dict[str, Tensor]:
    """Return every tensor of an adapter's files, under a name that says where it is."""
    if system == "peft":
        return load_file(folder / "adapter_model.safetensors")
    if system == "megatron-bridge":
        stored = Distributed(find_iteration(folder))
        return {
            f"{key}{chunk.offsets}": stored._chunk(key, tensor, chunk)
            for key, tensor in stored.tensors.items()
            for chunk in tensor.chunks
        }
    found = {}
    for path in sorted(folder.rglob("*.pt")):
        state = torch.load(path, weights_only=True)
        found |= {f"{path.name}:{name}": tensor for name, tensor in state.items()}
    return found


def words(folder: Path, system: str) -> Any:
    """Return what the files say besides tensors."""
    if system == "peft":
        return json.loads((folder / "adapter_config.json").read_text())
    if system == "neuron":
        return [json.loads(path.read_text()) for path in sorted(folder.rglob("adapter_config.json"))] + [
            json.loads(path.read_text()) for path in sorted(folder.rglob("mp_metadata*.json"))
        ]
    import yaml

    return yaml.safe_load((find_iteration(folder) / "run_config.yaml").read_text())


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Compare tensors bit for bit."""
    assert found.keys() == expected.keys()
    different = [name for name in expected if not same(found[name], expected[name])]
    assert different == []


def deltas(folder: Path) -> dict[str, Tensor]:
    """Return ``s·B·A`` of each linear layer of an adapter in PEFT's form with one rank and alpha."""
    config = words(folder, "peft")
    tensors = contents(folder, "peft")
    scale = config["lora_alpha"] / config["r"]
    found = {}
    for name, a in tensors.items():
        if name.endswith(".lora_A.weight"):
            owner = name.removesuffix(".lora_A.weight")
            found[owner] = scale * tensors[f"{owner}.lora_B.weight"].double() @ a.double()
    return found
