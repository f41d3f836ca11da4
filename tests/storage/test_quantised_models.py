"""transformers' quantised models: loading on a CPU, training, generating, saving, merging."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import quantised_layers  # noqa: F401 (quietens bitsandbytes)
from lorica import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from lorica.storage import Packed, stored_weight

transformers = pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")
pytest.importorskip("torchao")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:Merged into"),
]
logging.getLogger("transformers").setLevel(logging.ERROR)
KINDS = ["nf4", "int8", "torchao"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(vocab_size=64, num_hidden_layers=2, max_position_embeddings=64, **sizes)
    folder = tmp_path_factory.mktemp("llama")
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def load(saved: Path, kind: str) -> Any:
    if kind == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        config = transformers.TorchAoConfig(Int8WeightOnlyConfig())
    elif kind == "int8":
        config = transformers.BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=True
        )
    return transformers.AutoModelForCausalLM.from_pretrained(saved, quantization_config=config, device_map="cpu")


def adapted(saved: Path, kind: str, **fields: Any) -> PeftModel:
    torch.manual_seed(1)
    config = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "init_lora_weights": False, **fields}
    return get_peft_model(load(saved, kind), LoraConfig(**config))


def ids(rows: int = 2) -> torch.Tensor:
    return torch.randint(0, 64, (rows, 12), generator=torch.Generator().manual_seed(2))


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    model.train()
    model(input_ids=ids(), labels=ids()).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", KINDS)
def test_all_linear_layers_but_the_head_are_found_and_are_quantised(kind: str, saved: Path) -> None:
    model = adapted(saved, kind)
    assert len(model.targeted_module_names) == 14
    for name in model.targeted_module_names:
        base = model.base_model.model.get_submodule(name).base_layer
        assert isinstance(stored_weight(base, "weight"), Packed), name
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_activations_give_the_same_gradients(kind: str, reentrant: bool, saved: Path) -> None:
    plain = gradients(adapted(saved, kind))
    torch.manual_seed(1)
    base = prepare_model_for_kbit_training(
        load(saved, kind), gradient_checkpointing_kwargs={"use_reentrant": reentrant}
    )
    assert base.is_gradient_checkpointing
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    found = gradients(get_peft_model(base, config))
    assert found.keys() == plain.keys()
    for name, gradient in plain.items():
        assert torch.allclose(found[name], gradient, atol=1e-6, rtol=1e-4), name


@pytest.mark.parametrize("kind", KINDS)
def test_preparing_leaves_quantised_weights_and_widens_the_rest(kind: str, saved: Path) -> None:
    model = load(saved, kind)
    before = {name: type(p) for name, p in model.named_parameters()}
    model.model.norm.to(torch.bfloat16)
    prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    assert {name: type(p) for name, p in model.named_parameters()} == before
    assert not any(p.requires_grad for p in model.parameters())
    # As in PEFT: torchao's kernels want the rest of the model in the dtype that they were made for.
    assert model.model.norm.weight.dtype == (torch.bfloat16 if kind == "torchao" else torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_generating_saving_loading_and_merging(kind: str, saved: Path, tmp_path: Path) -> None:
    model = adapted(saved, kind).eval()
    with torch.no_grad():
        logits = model(input_ids=ids()).logits
        text = model.generate(input_ids=ids(1)[:, :4], max_new_tokens=6, do_sample=False)
        model.save_pretrained(str(tmp_path / "adapter"))
        again = PeftModel.from_pretrained(load(saved, kind), str(tmp_path / "adapter")).eval()
        assert torch.equal(again(input_ids=ids()).logits, logits)
        assert torch.equal(again.generate(input_ids=ids(1)[:, :4], max_new_tokens=6, do_sample=False), text)
        merged = model.merge_and_unload(safe_merge=True)
        near = merged(input_ids=ids()).logits
        assert (near - logits).norm() < (0.3 if kind == "nf4" else 0.03) * logits.norm()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            merged.save_pretrained(str(tmp_path / "merged"))
            whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", device_map="cpu")
        assert torch.equal(whole(input_ids=ids()).logits, near)
