"""The modules that are adapted when a configuration names none, by the ``model_type`` of transformers' configs.

The choice for each architecture is PEFT's, so that both adapt the same modules.
"""

from __future__ import annotations

_SHARED: list[tuple[list[str], str]] = [
    (["query", "value"], "bert roberta xlm-roberta electra layoutlm"),
    (
        ["q_proj", "v_proj"],
        "bart opt gptj gpt_neo llama llama4 mistral mixtral stablelm gemma gemma2 gemma3_text qwen2 qwen3",
    ),
    (["query_key_value"], "bloom gpt_neox chatglm RefinedWebModel RefinedWeb falcon"),
    (["q", "v"], "t5 mt5"),
    (["c_attn"], "gpt2 gpt_bigcode"),
]

DEFAULT_TARGETS: dict[str, list[str] | str] = {
    **{architecture: names for names, architectures in _SHARED for architecture in architectures.split()},
    "blip-2": ["q", "v", "q_proj", "v_proj"],
    "btlm": ["c_proj", "c_attn"],
    "codegen": ["qkv_proj"],
    "deberta": ["in_proj"],
    "deberta-v2": ["query_proj", "value_proj"],
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
    "mpt": ["Wqkv"],
    "nemotron_h": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "phi": ["q_proj", "v_proj", "fc1", "fc2"],
    "rwkv": ["key", "value", "receptance", "output"],
    "rwkv7": ["r_proj", "k_proj", "v_proj", "o_proj", "key", "value"],
}
