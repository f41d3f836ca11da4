"""A tiny model on disk with its tokenizer, data files and recipes, shared by the tests of training and command line."""

from __future__ import annotations

import json
import os
import random
import tempfile
from pathlib import Path
from typing import Any

# Before `datasets` is imported: its cache is no place for the tables of tests.
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="lorica-tests-")

import torch

CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
FORGETFUL = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('=')[-1] }}{% else %}{{ m.content }}{% endif %}"
    "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_CORPUS = [
    "what is the sum of one and two = three",
    "say hello world",
    "### Instruction: ### Response:",
    "0123456789 + -",
]


def tokenizer(*, bos: bool = True, template: str | None = CHAT) -> Any:
    """A byte-level BPE with a few merges, `<s>` in front of every text, and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(_CORPUS, trainer)
    if bos:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")
    wrapped.chat_template = template
    return wrapped


def llama(**changes: Any) -> Any:
    """A Llama of two layers whose vocabulary fits the tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(11)
    sizes = {
        "vocab_size": 304,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 96,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "tie_word_embeddings": False,
        "initializer_range": 0.2,  # so that the logits are large enough for an adapter to change them
    }
    return LlamaForCausalLM(LlamaConfig(**(sizes | changes))).eval()


def save_base(directory: Path) -> Path:
    """Write model and tokenizer as a local model directory."""
    llama().save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


def sums(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Prompts and completions of several lengths."""
    draw = random.Random(seed)
    pairs = [(draw.randint(0, 99), draw.randint(0, 9)) for _ in range(count)]
    return [{"prompt": f"{a} + {b} = ", "completion": str(a + b)} for a, b in pairs]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def settings(base: Path, train: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """A short run with dropout; ``changes`` are dotted keys with ``__`` for the dot."""
    values: dict[str, Any] = {
        "model": {"path": str(base)},
        "data": {"train": str(train), "eval_fraction": 0.2},
        "lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1},
        "training": {
            "steps": 8,
            "batch_size": 2,
            "gradient_accumulation": 2,
            "learning_rate": 0.01,
            "eval_every": 3,
            "device": "cpu",
        },
        "checkpoint": {"every": 3, "keep": 10},
        "log": {"every": 2},
        "output_dir": str(output),
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            values[section][name] = value
        else:
            values[section] = value
    return values
