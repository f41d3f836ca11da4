"""Adapters are exchanged as files, in both directions, and give the same outputs."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import twins
from safetensors.torch import load_file
from twins import lorica, peft

from cases import OPS
from models import embedding_net, ids, logits, mlp, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5

pytestmark = pytest.mark.filterwarnings("ignore:.*groups.*")

DIRECTIONS = [pytest.param(peft, lorica, id="peft-to-lorica"), pytest.param(lorica, peft, id="lorica-to-peft")]
WEIGHTS = "adapter_model.safetensors"
MLP_BATCH = torch.linspace(-1, 1, 30).view(3, 10)


def save(library, model, path, **arguments) -> None:
    if library is peft:
        with twins.quiet():
            model.save_pretrained(str(path), **arguments)
    else:
        model.save_pretrained(str(path), **arguments)


def load(library, base, path, **arguments):
    if library is peft:
        with twins.quiet():
            return library.PeftModel.from_pretrained(copy.deepcopy(base), str(path), **arguments).eval()
    return library.PeftModel.from_pretrained(copy.deepcopy(base), str(path), **arguments).eval()


def randomised(library, base, fields: dict, seed: int = 3):
    """An adapted copy whose every trainable parameter was moved."""
    with twins.quiet():
        model = library.get_peft_model(copy.deepcopy(base), library.LoraConfig(**fields)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


MODELS = {
    "mlp": (mlp, {"target_modules": ["lin0", "lin1"]}),
    "mlp-saved-head": (mlp, {"target_modules": ["lin0"], "modules_to_save": ["head"]}),
    "mlp-biases": (mlp, {"target_modules": ["lin0"], "bias": "all"}),
    "mlp-lora-biases": (mlp, {"target_modules": ["lin0"], "bias": "lora_only"}),
    "mlp-lora-bias": (mlp, {"target_modules": ["lin0", "lin1"], "lora_bias": True}),
    "mlp-rslora": (mlp, {"target_modules": ["lin0"], "use_rslora": True, "rank_pattern": {"lin0": 5}}),
    "embedding": (embedding_net, {"target_modules": ["emb", "head"]}),
    "llama": (tiny_llama, {"task_type": "CAUSAL_LM"}),
    "llama-saved": (tiny_llama, {"task_type": "CAUSAL_LM", "modules_to_save": ["lm_head", "embed_tokens"]}),
    "llama-saved-norms": (tiny_llama, {"modules_to_save": ["input_layernorm"]}),
    "gpt2": (tiny_gpt2, {"task_type": "CAUSAL_LM", "fan_in_fan_out": True}),
    "bert-classifier": (tiny_bert, {"task_type": "SEQ_CLS"}),
    "bert-tokens": (lambda: tiny_bert("TokenClassification"), {"task_type": "TOKEN_CLS"}),
    "bert-answers": (lambda: tiny_bert("QuestionAnswering"), {"task_type": "QUESTION_ANS"}),
}


def batch_for(base) -> torch.Tensor:
    return MLP_BATCH if hasattr(base, "lin0") else ids(2, 6)


@pytest.mark.parametrize("case", MODELS)
@pytest.mark.parametrize(("writer", "reader"), DIRECTIONS)
def test_an_adapter_moves(case: str, writer, reader, tmp_path) -> None:
    build, fields = MODELS[case]
    base = build()
    trained = randomised(writer, base, fields)
    save(writer, trained, tmp_path)
    assert (tmp_path / "README.md").is_file()
    loaded = load(reader, base, tmp_path)
    batch = batch_for(base)
    twins.assert_close(logits(loaded, batch), logits(trained, batch))
    # PEFT leaves trained biases trainable even when it loads for inference, so only the adapter's own are asked for.
    assert not any(p.requires_grad for name, p in loaded.named_parameters() if "lora_" in name)


@pytest.mark.parametrize("case", MODELS)
def test_the_files_are_equal(case: str, tmp_path) -> None:
    build, fields = MODELS[case]
    base = build()
    theirs = randomised(peft, base, fields)
    save(peft, theirs, tmp_path / "peft")
    ours = load(lorica, base, tmp_path / "peft", is_trainable=True)
    save(lorica, ours, tmp_path / "ours")
    twins.assert_same_tensors(load_file(tmp_path / "ours" / WEIGHTS), load_file(tmp_path / "peft" / WEIGHTS))
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("peft", "ours")]
    for config in configs:
        config.pop("peft_version")
        for name in ("target_modules", "modules_to_save"):
            if isinstance(config[name], list):  # PEFT names a task head twice after it was loaded
                config[name] = sorted(set(config[name]))
    assert configs[1] == configs[0]


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
@pytest.mark.parametrize(("writer", "reader"), DIRECTIONS)
def test_every_base_layer_moves(op, writer, reader, tmp_path) -> None:
    base = op.build()
    trained = randomised(writer, base, {"target_modules": ["target"], "r": 4, **op.fields})
    save(writer, trained, tmp_path)
    loaded = load(reader, base, tmp_path)
    with twins.quiet():
        expected = writer.get_peft_model_state_dict(trained)
    twins.assert_same_tensors(reader.get_peft_model_state_dict(loaded), expected)
    if op.peft_exact:
        twins.assert_close(loaded(op.inputs()), trained(op.inputs()))


@pytest.mark.parametrize(("writer", "reader"), DIRECTIONS)
def test_several_adapters_lie_in_subfolders(writer, reader, tmp_path) -> None:
    base = mlp()
    trained = randomised(writer, base, {"target_modules": ["lin0"]})
    trained.add_adapter("second", writer.LoraConfig(target_modules=["lin1"], r=3))
    trained.add_adapter("third", writer.LoraConfig(target_modules=["lin0", "lin1"], r=2))
    twins.randomise(trained)
    save(writer, trained, tmp_path, selected_adapters=["default", "second"])
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["second"]
    save(writer, trained, tmp_path)
    loaded = load(reader, base, tmp_path)
    for name in ("second", "third"):
        loaded.load_adapter(str(tmp_path / name), adapter_name=name)
    assert sorted(loaded.peft_config) == ["default", "second", "third"]
    for names in (["default"], ["second"], ["third"], ["default", "second"]):
        for model in (trained, loaded):
            model.base_model.set_adapter(names)
        twins.assert_close(loaded(MLP_BATCH), trained(MLP_BATCH))
    again = load(reader, base, tmp_path, subfolder="third", adapter_name="renamed")
    trained.set_adapter("third")
    twins.assert_close(again(MLP_BATCH), trained(MLP_BATCH))


@pytest.mark.parametrize(("writer", "reader"), DIRECTIONS)
def test_encoder_decoder_moves(writer, reader, tmp_path) -> None:
    base = tiny_t5()
    trained = randomised(writer, base, {"task_type": "SEQ_2_SEQ_LM"})
    save(writer, trained, tmp_path)
    loaded = load(reader, base, tmp_path)
    batch = {"input_ids": ids(2, 5), "labels": ids(2, 4)}
    twins.assert_close(loaded(**batch).loss, trained(**batch).loss)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("is_trainable", [False, True])
def test_loading_has_the_same_result(low_cpu_mem_usage: bool, is_trainable: bool, tmp_path) -> None:
    base = tiny_llama()
    save(peft, randomised(peft, base, {"modules_to_save": ["lm_head"]}), tmp_path)
    arguments = {"low_cpu_mem_usage": low_cpu_mem_usage, "is_trainable": is_trainable}
    pair = tuple(load(library, base, tmp_path, **arguments) for library in (peft, lorica))
    twins.assert_same_parameters(pair)
    twins.assert_same_tensors(dict(pair[1].state_dict()), dict(pair[0].state_dict()))
    assert pair[1].peft_config["default"].inference_mode is pair[0].peft_config["default"].inference_mode


def test_load_adapter_flags_follow_peft(tmp_path) -> None:
    base = mlp()
    save(peft, randomised(peft, base, {"target_modules": ["lin0"]}), tmp_path)
    pair = twins.adapt(base, {"target_modules": ["lin1"]})
    for index, is_trainable in enumerate((False, True)):
        for model in pair:
            result = model.load_adapter(str(tmp_path), adapter_name=f"more{index}", is_trainable=is_trainable)
            assert not result.unexpected_keys
        twins.assert_same_parameters(pair)
        assert pair[1].active_adapters == pair[0].active_adapters == ["default"]
