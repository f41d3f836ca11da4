"""Merging in files gives bit for bit what merging the loaded model and saving it gives, or nothing at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from safetensors.torch import load_file, save_file
from saved import load_base, merge_loaded, save_adapter, save_base, tensors
from torch import nn

import models
from lorica.errors import AdapterError, CheckpointError, TargetError
from lorica.merge import NotFollowedError, merge_files

pytestmark = pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`:UserWarning")


def qwen3_moe(**fields: Any) -> nn.Module:
    """A mixture whose experts lie one by one in its files and stacked in memory."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=models.VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        moe_intermediate_size=12,
        num_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        **fields,
    )
    return Qwen3MoeForCausalLM(config).eval()


def biased() -> nn.Module:
    return models.tiny_llama(attention_bias=True, mlp_bias=True)


def tied() -> nn.Module:
    return models.tiny_llama(tied=True)


TWO = ["q_proj", "down_proj"]
BLOCKS = {"target_modules_bd_a": ["down_proj"], "target_modules_bd_b": ["q_proj"], "nblocks": 2}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CASES: dict[str, tuple[Any, torch.dtype, dict[str, Any]]] = {
    "llama": (models.tiny_llama, torch.bfloat16, {"target_modules": "all-linear"}),
    "rows": (models.tiny_llama, torch.bfloat16, {"target_modules": TWO, "trainable_token_indices": [17, 3]}),
    "rows of a shared weight": (tied, torch.float32, {"target_modules": TWO, "trainable_token_indices": [17, 3]}),
    "rows of two ends": (
        tied,
        torch.float32,
        {"target_modules": TWO, "trainable_token_indices": {"embed_tokens": [17], "lm_head": [3, 17]}},
    ),
    "rows and factors": (
        tied,
        torch.float32,
        {"target_modules": [*TWO, "lm_head"], "trainable_token_indices": [17, 3]},
    ),
    "biases": (
        biased,
        torch.float32,
        {"target_modules": TWO, "lora_bias": True, "use_rslora": True, "bias": "all", "rank_pattern": {"q_proj": 3}},
    ),
    "dora": (models.tiny_llama, torch.bfloat16, {"target_modules": [*TWO, "embed_tokens"], "use_dora": True}),
    "pissa": (models.tiny_llama, torch.float32, {"target_modules": TWO, "init_lora_weights": "pissa"}),
    "saved": (models.tiny_llama, torch.bfloat16, {"target_modules": TWO, "modules_to_save": ["lm_head", "norm"]}),
    "tied-embedding": (tied, torch.float32, {"target_modules": ["embed_tokens", "q_proj"]}),
    "tied-head": (tied, torch.float32, {"target_modules": ["lm_head"]}),
    "tied-both": (tied, torch.float32, {"target_modules": ["embed_tokens", "lm_head"]}),
    "tied-jointly": (tied, torch.float32, {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}),
    "tied-saved": (tied, torch.float32, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "gpt2": (models.tiny_gpt2, torch.float32, {"target_modules": ["c_attn", "c_fc", "wte"]}),
    "gpt2-dora": (models.tiny_gpt2, torch.bfloat16, {"target_modules": ["c_attn", "c_proj"], "use_dora": True}),
    "experts": (qwen3_moe, torch.bfloat16, {"target_modules": ["o_proj"], "target_parameters": EXPERTS}),
    "kasa": (models.tiny_llama, torch.bfloat16, {"target_modules": [*TWO, "embed_tokens"], "kasa_config": {}}),
    "gpt2-kasa": (models.tiny_gpt2, torch.float32, {"target_modules": ["c_attn"], "kasa_config": {}}),
    "bdlora": (models.tiny_llama, torch.float32, {"target_modules": TWO, "use_bdlora": BLOCKS}),
    "qalora": (models.tiny_llama, torch.bfloat16, {"target_modules": TWO, "use_qalora": True, "qalora_group_size": 8}),
    "experts-shared": (
        qwen3_moe,
        torch.float32,
        {"target_modules": ["o_proj"], "target_parameters": [*EXPERTS, "gate.weight"], "share_expert_adapters": True},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_files_are_those_of_the_loaded_model(case: str, tmp_path: Path):
    model, dtype, fields = CASES[case]
    base = save_base(model(), tmp_path / "base", dtype)
    adapter = save_adapter(base, tmp_path / "adapter", **fields)
    merge_files(adapter, base, tmp_path / "merged")
    wanted = tensors(merge_loaded(adapter, base, tmp_path / "loaded"))
    found, before = tensors(tmp_path / "merged"), tensors(base)
    assert found.keys() == wanted.keys()
    assert {name: tensor.dtype for name, tensor in found.items()} == {n: tensor.dtype for n, tensor in wanted.items()}
    assert [name for name in found if not torch.equal(found[name], wanted[name])] == []
    assert any(name not in before or not torch.equal(found[name], before[name]) for name in found)


def test_the_directory_is_a_model_with_the_files_of_its_base(tmp_path: Path):
    base = save_base(tied(), tmp_path / "base")
    (base / "tokenizer.json").write_text("{}")
    (base / "chat_template.jinja").write_text("…")
    (base / "notes.md").write_text("no part of it")
    (base / "pytorch_model.bin").write_text("nor is this")
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=["lm_head"])
    told: list[int] = []
    merge_files(adapter, base, tmp_path / "merged", progress=lambda total: _Told(total, told))
    assert [path.name for path in tmp_path.glob(".partial*")] == []
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert names == {path.name for path in base.iterdir()} - {"notes.md", "pytorch_model.bin"}
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    found = tensors(tmp_path / "merged")
    assert index["weight_map"].keys() == found.keys()
    assert (
        index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values()) == sum(told[1:]) == told[0]
    )
    assert index["metadata"]["total_parameters"] == sum(tensor.numel() for tensor in found.values())
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False
    plain = load_base(tmp_path / "merged")
    assert plain.lm_head.weight is not plain.model.embed_tokens.weight
    assert torch.equal(plain.lm_head.weight, found["lm_head.weight"])


class _Told:
    def __init__(self, total: int, told: list[int]) -> None:
        told.append(total)
        self.told = told

    def __enter__(self) -> Any:
        return self.told.append

    def __exit__(self, *error: object) -> None:
        pass


def test_unchanged_files_are_the_same_bytes_and_a_dtype_can_be_asked_for(tmp_path: Path):
    base = save_base(models.tiny_llama(), tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["model.layers.0.self_attn.q_proj"])
    merge_files(adapter, base, tmp_path / "merged")
    files = [path.name for path in base.glob("*.safetensors")]
    same = [name for name in files if (base / name).read_bytes() == (tmp_path / "merged" / name).read_bytes()]
    assert len(same) == len(files) - 1
    merge_files(adapter, base, tmp_path / "narrow", dtype=torch.bfloat16)
    narrow = tensors(tmp_path / "narrow")
    assert {tensor.dtype for tensor in narrow.values()} == {torch.bfloat16}
    assert load_base(tmp_path / "narrow").dtype == torch.bfloat16


def test_names_that_transformers_changes_stay_what_they_are(tmp_path: Path):
    base = tmp_path / "base"
    model = models.tiny_gpt2()
    model.save_pretrained(base)
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["c_attn", "wte"])
    stored = {
        name.removeprefix("transformer."): tensor for name, tensor in load_file(base / "model.safetensors").items()
    }
    save_file(stored, base / "model.safetensors", metadata={"format": "pt"})
    merge_files(adapter, base, tmp_path / "merged")
    assert tensors(tmp_path / "merged").keys() == stored.keys() | {"lm_head.weight"}
    merged = load_base(tmp_path / "merged").state_dict()
    wanted = load_base(merge_loaded(adapter, base, tmp_path / "loaded")).state_dict()
    assert merged.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(merged[name], wanted[name])] == []


def _edit(file: Path, change: Any) -> None:
    content = load_file(file)
    change(content)
    save_file(content, file, metadata={"format": "pt"})


def _key(content: dict[str, Any], part: str = "lora_A") -> str:
    return next(name for name in content if part in name)


def _nan(content: dict[str, Any]) -> None:
    content[_key(content)][0, 0] = float("nan")


def _stranger(content: dict[str, Any]) -> None:
    content[_key(content).replace("q_proj", "z_proj")] = torch.zeros(8, 16)


def _short(content: dict[str, Any]) -> None:
    content[_key(content)] = torch.zeros(8, 15)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_nan, "lora_A.weight holds NaN"),
        (_stranger, "unexpected.*z_proj"),
        (_short, "wrong shape"),
        (dict.clear, "miss"),
    ],
)
def test_an_adapter_that_does_not_fit_leaves_nothing_behind(change: Any, says: str, tmp_path: Path):
    base = save_base(models.tiny_llama(), tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    _edit(adapter / "adapter_model.safetensors", change)
    with pytest.raises(CheckpointError, match=says):
        merge_files(adapter, base, tmp_path / "merged")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


def test_a_base_that_does_not_fit_leaves_nothing_behind(tmp_path: Path):
    base = save_base(models.tiny_llama(), tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    name = "model.layers.1.self_attn.q_proj.weight"
    index = json.loads((base / "model.safetensors.index.json").read_text())
    file = base / index["weight_map"][name]
    whole = file.read_bytes()

    def refused(error: type[Exception], says: str) -> None:
        with pytest.raises(error, match=says):
            merge_files(adapter, base, tmp_path / "merged")
        assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}

    _edit(file, lambda content: content.update({name: torch.full((16, 16), float("inf"))}))
    refused(CheckpointError, rf"{name}: the merged weight holds NaN or infinity")
    _edit(file, lambda content: content.update({name: torch.zeros(16, 12)}))
    refused(CheckpointError, rf"{name} is \(16, 12\)")
    _edit(file, lambda content: content.update({name: torch.zeros(16, 16, dtype=torch.int8)}))
    refused(AdapterError, "int8")
    _edit(file, lambda content: content.pop(name))
    refused(CheckpointError, f"no tensor for {name}")
    file.write_bytes(whole[:-8])
    refused(CheckpointError, "safetensors")
    file.write_bytes(whole)
    index["weight_map"][name] = "../adapter/adapter_model.safetensors"
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(CheckpointError, "not the name of a safetensors file beside it")
    (base / "model.safetensors.index.json").unlink()
    refused(NotFollowedError, "has neither")
    shutil.rmtree(base)
    save_base(models.tiny_llama(), base)
    with pytest.raises(FileExistsError):
        merge_files(adapter, base, base)


def test_an_adapter_for_another_model_is_refused(tmp_path: Path):
    base = save_base(models.tiny_llama(), tmp_path / "base")
    other = save_base(models.tiny_gpt2(), tmp_path / "other")
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    with pytest.raises(TargetError, match="q_proj"):
        merge_files(adapter, other, tmp_path / "merged")


def test_a_conversion_that_computes_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from transformers.core_model_loading import Concatenate

    base = save_base(qwen3_moe(), tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["o_proj"], target_parameters=EXPERTS)
    plain = save_adapter(base, tmp_path / "plain", target_modules=["o_proj"])
    monkeypatch.setattr(Concatenate, "convert", lambda self, found, **kwargs: {"x": next(iter(found.values())) * 2})
    with pytest.raises(NotFollowedError, match=r"experts\.gate_up_proj: WeightConverter"):
        merge_files(adapter, base, tmp_path / "merged")
    merge_files(plain, base, tmp_path / "merged")  # what is not adapted need not be followed


def _merge_as_rank(adapter: Path, base: Path, output: Path) -> str:
    try:
        merge_files(adapter, base, output)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_ranks_share_the_files(tmp_path: Path):
    base = save_base(tied(), tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["lm_head", "q_proj"])
    merge_files(adapter, base, tmp_path / "alone")
    assert ranks.run(2, _merge_as_rank, adapter, base, tmp_path / "together") == ["", ""]
    for path in (tmp_path / "alone").iterdir():
        assert (tmp_path / "together" / path.name).read_bytes() == path.read_bytes()
    name = "model.layers.1.self_attn.q_proj.weight"
    index = json.loads((base / "model.safetensors.index.json").read_text())
    _edit(base / index["weight_map"][name], lambda content: content[name].fill_(float("nan")))
    said = ranks.run(2, _merge_as_rank, adapter, base, tmp_path / "broken")
    assert sorted(text.partition(":")[0] for text in said) == ["CheckpointError", "RankError"]
    assert all(name in text for text in said)
    assert not (tmp_path / "broken").exists()
    assert not list(tmp_path.glob(".partial*"))


def test_layers_that_files_do_not_have_are_refused(tmp_path: Path):
    base = save_base(models.tiny_llama(), tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=TWO, layer_replication=[(0, 2), (1, 2)])
    with pytest.raises(AdapterError, match="call merge_and_unload"):
        merge_files(adapter, base, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
