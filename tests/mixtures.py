"""Tiny mixtures of experts, as transformers builds them, and what the tests of them share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from models import VOCABULARY

EXPERTS = 4
KINDS = ("qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3")
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
#: The parameters of the experts of these models.
STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 32,
    "num_experts_per_tok": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_OWN: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": EXPERTS, "moe_intermediate_size": 8, "intermediate_size": 8, "head_dim": 4},
    "mixtral": {"num_local_experts": EXPERTS, "intermediate_size": 8},
    "gpt_oss": {
        "num_local_experts": EXPERTS,
        "intermediate_size": 8,
        "head_dim": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "deepseek_v3": {
        "n_routed_experts": EXPERTS,
        "moe_intermediate_size": 8,
        "intermediate_size": 8,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 0,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "v_head_dim": 4,
        "qk_nope_head_dim": 4,
        "qk_rope_head_dim": 4,
        "n_shared_experts": 1,
        "num_key_value_heads": 4,
    },
}


def moe(kind: str = "qwen3_moe", *, implementation: str = "grouped_mm", seed: int = 0, **fields: Any) -> nn.Module:
    """A model of two layers with four experts each, two for a token; ``implementation`` is how they are computed."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **_COMMON | _OWN[kind] | fields)
    model = AutoModelForCausalLM.from_config(config, experts_implementation=implementation)
    for name, parameter in model.named_parameters():
        if ".experts." in name or "router" in name or name.endswith("gate.weight"):
            nn.init.normal_(parameter, std=0.3)  # so that experts matter and tokens go to all of them
    return model.eval()


def loss_of(output: Any) -> Tensor:
    """A fixed function of the logits."""
    logits: Tensor = output.logits
    return (logits.float() * torch.linspace(-1, 1, logits.numel()).view(logits.shape)).sum()


def deltas(model: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    """The deltas of all stacks of a model, differentiable, by the parameters' names."""
    from lorica.layers import LoraLayer

    found = {}
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and adapter in layer.specs:
            base, factors = layer.get_base_layer(), layer.factors(adapter)
            equation = "...or,...ri->...io" if getattr(base, "is_transposed", False) else "...or,...ri->...oi"
            found[layer.target_name] = layer.scaling[adapter] * torch.einsum(equation, factors.b, factors.a)
    return found
