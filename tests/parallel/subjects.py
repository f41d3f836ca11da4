"""What is adapted: tiny models of every family whose layers engines cut, in one piece, from a seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 40
STORIES = Path(__file__).resolve().parents[3] / "shared" / "models" / "stories260K"
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "attn_implementation": "eager",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**_SIZES, intermediate_size=48, attention_bias=True, mlp_bias=True))
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):  # which transformers starts at zero
            nn.init.normal_(parameter, std=0.1)
    return model


def _qwen3_moe() -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    few = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 1}
    experts = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**_SIZES, **few, **experts}, intermediate_size=48))


def _phi3() -> nn.Module:
    from transformers import Phi3Config, Phi3ForCausalLM

    return Phi3ForCausalLM(Phi3Config(**_SIZES, intermediate_size=48))


def _deepseek() -> nn.Module:
    """Latent attention: a projection that every rank has whole and of whose output a part bypasses the next one."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    heads = {"num_key_value_heads": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    ranks = {"q_lora_rank": 16, "kv_lora_rank": 16}
    experts = {"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}
    groups = {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**{**_SIZES, **heads, **ranks, **experts, **groups}))


def _rest() -> nn.Module:
    torch.backends.mha.set_fastpath_enabled(False)  # which rounds otherwise, and is taken only where nothing trains
    return Rest()


def _stories() -> nn.Module:
    # In float32 its attention's gradients are so small that two orders of summation differ by more than 1e-5.
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float64, attn_implementation="eager")


class Rest(nn.Module):
    """The base layers that no engine cuts, one after the other: convolutions and torch's attention."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.embed = nn.Embedding(VOCABULARY, 8)
        self.conv1d = nn.Conv1d(8, 8, 3, padding=1)
        self.conv2d = nn.Conv2d(1, 1, 3, padding=1)
        self.conv3d = nn.Conv3d(1, 1, 3, padding=1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.turned = Conv1D(VOCABULARY, 8)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        x = x + self.conv1d(x.mT).mT
        x = x + self.conv2d(x.unsqueeze(1)).squeeze(1)
        x = x + self.conv3d(x.unsqueeze(1).unsqueeze(1)).squeeze(1).squeeze(1)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.turned(x)


@dataclass(frozen=True)
class Subject:
    """A model and what of it is adapted.

    Attributes:
        make: the model in one piece; the caller seeds.
        fields: what is adapted, as fields of the config.
        embedding: how the name of the token embedding ends.
        there: whether it can be made here.
        brief: whether only variants are tried on it, since it is another one's family, only larger.
    """

    make: Callable[[], nn.Module]
    fields: dict[str, Any] = field(default_factory=dict)
    embedding: str = "embed_tokens"
    there: Callable[[], bool] = lambda: True
    brief: bool = False

    def build(self, seed: int = 0) -> nn.Module:
        """The model, frozen, in evaluation mode."""
        torch.manual_seed(seed)
        return self.make().eval().requires_grad_(False)

    def save(self, folder: Path) -> None:
        """Save it whole, for engines that load."""
        model: Any = self.build()
        if hasattr(model, "save_pretrained"):
            model.save_pretrained(folder)


_ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

SUBJECTS = {
    "llama": Subject(_llama, {"target_modules": _ALL}),
    "llama's ends": Subject(_llama, {"target_modules": ["embed_tokens", "lm_head"]}),
    "qwen3-moe": Subject(
        _qwen3_moe,
        {"target_modules": _ALL[:4], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    ),
    "phi3": Subject(_phi3, {"target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]}),
    "deepseek": Subject(
        _deepseek,
        {"target_modules": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "up_proj"]},
    ),
    "stories260K": Subject(_stories, {"target_modules": _ALL}, there=STORIES.exists, brief=True),
    "rest": Subject(
        _rest,
        {"target_modules": ["conv1d", "conv2d", "conv3d", "attention", "turned"], "fan_in_fan_out": True},
        embedding="embed",
    ),
}


def batch(rows: int, seed: int = 0) -> Tensor:
    """Token ids ``[rows, 8]``."""
    return torch.randint(3, VOCABULARY, (rows, 8), generator=torch.Generator().manual_seed(seed))


def logits_of(output: Any) -> Tensor:
    """The output tensor of a transformers model or of a plain one."""
    return output if isinstance(output, Tensor) else output.logits


def loss_of(logits: Tensor, ids: Tensor) -> Tensor:
    """The mean cross entropy of the next token."""
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
