"""The loss curve of many ranks is that of one process, whatever the layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import many
import pytest
import torch

import runs

LAYOUTS = [
    (2, {"dp": 2}),
    (2, {"tp": 2}),
    (2, {"tp": 2, "sp": True}),
    (2, {"fsdp": 2}),
    (4, {"tp": 2, "sp": True, "fsdp": 2}),
    (4, {"tp": 4}),
    (2, {"pp": 2}),
    (4, {"pp": 2, "tp": 2, "sp": True}),
    (4, {"pp": 2, "dp": 2}),
]


def settings(base: Path, data: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """A run whose last batch of an epoch has fewer rows than there are ranks, and whose clipping matters."""
    values = runs.settings(base, data, output, lora__lora_dropout=0.0, training__batch_size=4, **changes)
    values["training"] |= {"max_grad_norm": 0.5, "learning_rate": 2e-3, "loraplus_lr_ratio": 4}
    values["data"]["train"] = str(data)
    values["data"]["eval_fraction"] = 0.3  # 9 of 30 rows; 21 in batches of 4
    return values


@pytest.fixture(scope="module")
def alone(base: Path, data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return many.run(1, settings(base, data_file, tmp_path_factory.mktemp("alone") / "out"))


@pytest.mark.parametrize(("count", "layout"), LAYOUTS, ids=[str(layout) for _, layout in LAYOUTS])
def test_the_curve_is_that_of_one_process(
    count: int, layout: dict[str, Any], base: Path, data_file: Path, tmp_path: Path, alone: list[dict[str, Any]]
) -> None:
    values = settings(base, data_file, tmp_path / "out", parallel=layout)
    many.assert_same_curve(many.run(count, values), alone)
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()


EXPERTS = [(2, {"fsdp": 2, "ep": 2}), (2, {"tp": 2, "ep": 2}), (2, {"tp": 2, "engine": "transformers"})]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of experts whose routing is no matter of rounding."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    directory = tmp_path_factory.mktemp("mixture")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "head_dim": 8, "num_experts": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2, "num_hidden_layers": 2}
    torch.manual_seed(3)
    config = Qwen3MoeConfig(**sizes, **heads, vocab_size=304, bos_token_id=0, eos_token_id=1, initializer_range=0.2)
    Qwen3MoeForCausalLM(config).save_pretrained(directory)
    runs.tokenizer().save_pretrained(directory)
    return directory


def of_experts(mixture: Path, data: Path, output: Path, **changes: Any) -> dict[str, Any]:
    values = settings(mixture, data, output, training__steps=4, **changes)
    values["lora"] |= {"target_modules": "all-linear", "target_parameters": ["experts.gate_up_proj"]}
    return values


@pytest.fixture(scope="module")
def experts_alone(mixture: Path, data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return many.run(1, of_experts(mixture, data_file, tmp_path_factory.mktemp("alone") / "out"))


@pytest.mark.parametrize(("count", "layout"), EXPERTS, ids=[str(layout) for _, layout in EXPERTS])
def test_the_curve_of_experts_is_that_of_one_process(
    count: int,
    layout: dict[str, Any],
    mixture: Path,
    data_file: Path,
    tmp_path: Path,
    experts_alone: list[dict[str, Any]],
) -> None:
    values = of_experts(mixture, data_file, tmp_path / "out", parallel=layout)
    many.assert_same_curve(many.run(count, values), experts_alone, tolerance=1e-4)
    # What the ranks wrote, one process goes on from.
    (tmp_path / "out" / "checkpoints" / "step-000004" / "COMPLETE").unlink()
    del values["parallel"]
    many.assert_same_curve(many.run(1, values, resume=True), experts_alone, tolerance=1e-4)
