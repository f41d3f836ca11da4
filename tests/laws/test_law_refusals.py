"""Nothing silent: what cannot be done is an error that names the thing, and the model stays as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from harness import assert_unchanged, state_of
from torch import nn

import lorica
from models import ids, mlp, tiny_llama


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"r": 0}, "r"),
        ({"r": -3}, "r"),
        ({"r": 2.5}, "r"),
        ({"lora_dropout": 1.5}, "lora_dropout"),
        ({"eva_config": {"rho": 0.5}}, "rho"),
        ({"eva_config": {"roh": 1.5}}, "eva_config"),
        ({"corda_config": 3}, "corda_config"),
        ({"corda_config": {}, "init_lora_weights": "corda"}, "lin0.*preprocess_corda"),
        ({"lora_ga_config": {}, "init_lora_weights": "lora_ga"}, "lin0.*preprocess_loraga"),
        ({"init_lora_weights": "loftq"}, "loftq_config"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 3}}, "lin0.*loftq_bits=3"),
        ({"use_bdlora": {"target_modules_bd_a": ["x"], "target_modules_bd_b": ["x"]}}, "overlapping"),
        ({"lora_dropout": -0.1}, "lora_dropout"),
        ({"bias": "some"}, "bias"),
        ({"megatron_core": "os"}, r"megatron_core='os'.*megatron\.core"),
        ({"megatron_config": 3}, "megatron_config"),
        ({"megatron_config": {"init_method": print}}, "megatron_config.*JSON"),
        ({"dropout_position": "middle"}, "dropout_position"),
        ({"lora_dtype": "float99"}, "lora_dtype"),
        ({"rank_pattern": {"lin0": 0}}, "rank_pattern|r"),
        ({"task_type": "SING"}, "task"),
        ({"target_modules": "("}, r"target_modules|regular"),
        ({"target_modules": 5}, "target_modules"),
    ],
    ids=str,
)
def test_values_out_of_range_are_refused_by_name(fields: dict, name: str) -> None:
    base = mlp()
    before = state_of(base)
    with pytest.raises((ValueError, TypeError), match=name):
        lorica.get_peft_model(base, lorica.LoraConfig(**{"target_modules": ["lin0"], **fields}))
    assert_unchanged(base, before)


@pytest.mark.parametrize(
    ("targets", "near"),
    [
        (["q_porj"], "q_proj"),
        (["lmhead"], "lm_head"),
        (["self_atn.q_proj"], "q_proj"),
        (["model.layers.9.mlp.up_proj"], "up_proj"),
    ],
)
def test_a_target_that_matches_nothing_lists_near_names(targets: list[str], near: str) -> None:
    base = tiny_llama()
    before = state_of(base)
    with pytest.raises(ValueError, match=near) as caught:
        lorica.get_peft_model(base, lorica.LoraConfig(target_modules=targets))
    assert targets[0] in str(caught.value)
    assert_unchanged(base, before)


@pytest.mark.parametrize("targets", [["norm"], ["self_attn"], r"model\.layers", ["act_fn"]], ids=str)
def test_a_target_of_an_unsupported_kind_is_named(targets: object) -> None:
    base = tiny_llama()
    before = state_of(base)
    with pytest.raises(ValueError, match=r"norm|self_attn|layers|act_fn"):
        lorica.get_peft_model(base, lorica.LoraConfig(target_modules=targets))
    assert_unchanged(base, before)


def test_the_plan_is_made_before_anything_changes() -> None:
    """One bad target among good ones leaves no half-adapted model."""
    base = tiny_llama()
    before = state_of(base)
    with pytest.raises(ValueError, match="input_layernorm"):
        lorica.get_peft_model(base, lorica.LoraConfig(target_modules=["q_proj", "input_layernorm"]))
    assert_unchanged(base, before)
    model = lorica.get_peft_model(base, lorica.LoraConfig(target_modules=["q_proj"]))
    before = state_of(model)
    with pytest.raises(ValueError, match="input_layernorm"):
        model.add_adapter("other", lorica.LoraConfig(target_modules=["q_proj", "v_proj", "input_layernorm"]))
    assert_unchanged(model, before)
    assert list(model.peft_config) == ["default"]


def test_saving_a_module_that_is_not_there_is_refused() -> None:
    base = mlp()
    before = state_of(base)
    with pytest.raises(ValueError, match="haed"):
        lorica.get_peft_model(base, lorica.LoraConfig(target_modules=["lin0"], modules_to_save=["haed"]))
    assert_unchanged(base, before)


@pytest.mark.parametrize(
    "act",
    [
        lambda m: m.set_adapter("nope"),
        lambda m: m.base_model.set_adapter(["default", "nope"]),
        lambda m: m.delete_adapter("nope"),
        lambda m: m.merge_adapter(adapter_names=["nope"]),
        lambda m: m.merge_and_unload(adapter_names=["nope"]),
        lambda m: m.set_requires_grad("nope"),
        lambda m: lorica.get_peft_model_state_dict(m, adapter_name="nope"),
        lambda m: m.save_pretrained("never-made", selected_adapters=["nope"]),
    ],
    ids=["set", "set-several", "delete", "merge", "merge-and-unload", "requires-grad", "state-dict", "save"],
)
def test_an_unknown_adapter_is_named(act, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = lorica.get_peft_model(mlp(), lorica.LoraConfig(target_modules=["lin0"], init_lora_weights=False))
    before, out = state_of(model), model(torch.ones(1, 10))
    with pytest.raises((ValueError, KeyError), match="nope") as caught:
        act(model)
    assert "default" in str(caught.value)
    assert_unchanged(model, before)
    assert torch.equal(model(torch.ones(1, 10)), out)
    assert not list(tmp_path.iterdir())


def test_a_taken_name_is_refused() -> None:
    model = lorica.get_peft_model(mlp(), lorica.LoraConfig(target_modules=["lin0"]))
    before = state_of(model)
    with pytest.raises(ValueError, match="default"):
        model.add_adapter("default", lorica.LoraConfig(target_modules=["lin1"]))
    assert_unchanged(model, before)


@pytest.mark.parametrize("name", ["a.b", ""])
def test_a_name_that_keys_cannot_carry_is_refused(name: str) -> None:
    base = mlp()
    before = state_of(base)
    with pytest.raises((ValueError, KeyError), match=r"name|adapter"):
        lorica.get_peft_model(base, lorica.LoraConfig(target_modules=["lin0"]), adapter_name=name)
    assert_unchanged(base, before)


def test_adapting_twice_is_not_silent() -> None:
    """PEFT warns of it; an error will do as well."""
    model = lorica.get_peft_model(mlp(), lorica.LoraConfig(target_modules=["lin0"]))
    with pytest.raises((UserWarning, ValueError), match=r"(?i)adapter|second|already"):
        lorica.get_peft_model(model.base_model.model, lorica.LoraConfig(target_modules=["lin1"]))


def test_the_config_of_the_caller_is_not_changed() -> None:
    """One config may serve several models."""
    config = lorica.LoraConfig()
    before = copy.deepcopy(config.to_dict())
    lorica.get_peft_model(tiny_llama(), config)
    changed = {name for name, value in config.to_dict().items() if value != before[name]}
    # PEFT fills the architecture's targets into the caller's object, and code reads them there
    assert changed <= {"target_modules", "base_model_name_or_path", "inference_mode"}


WILDCARDS = {
    "*.layers.0.*.q_proj": {"model.layers.0.self_attn.q_proj"},
    "*.q_proj": {"model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"},
    "model.layers.*.mlp.down_proj": {"model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"},
    "*.layers.1.self_attn.*": {f"model.layers.1.self_attn.{n}_proj" for n in "qkvo"},
    "*lm_head": {"lm_head"},
}


@pytest.mark.parametrize("pattern", WILDCARDS)
def test_wildcards(pattern: str) -> None:
    model = lorica.get_peft_model(tiny_llama(), lorica.LoraConfig(target_modules=[pattern]))
    assert set(model.base_model.targeted_module_names) == WILDCARDS[pattern]
    assert model(ids(1, 3)).logits.shape == (1, 3, 40)


def test_wildcards_mix_with_names_and_exclusions() -> None:
    config = lorica.LoraConfig(target_modules=["*.layers.0.*_proj", "v_proj"], exclude_modules=["*.mlp.*", "o_proj"])
    model = lorica.get_peft_model(tiny_llama(), config)
    assert set(model.base_model.targeted_module_names) == {
        *(f"model.layers.0.self_attn.{n}_proj" for n in "qkv"),
        "model.layers.1.self_attn.v_proj",
    }


def test_a_wildcard_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"linear_qkv"):
        lorica.get_peft_model(tiny_llama(), lorica.LoraConfig(target_modules=["*.layers.0.*.linear_qkv"]))


def test_attention_parts_whose_forward_is_never_called_are_not_ignored() -> None:
    """``nn.MultiheadAttention`` reads its output projection's weight; an adapter on that module would be dead."""
    base = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2, batch_first=True)}).requires_grad_(False)
    x = torch.randn(2, 3, 8)
    config = lorica.LoraConfig(target_modules=["out_proj"], init_lora_weights=False)
    try:
        model = lorica.get_peft_model(copy.deepcopy(base), config)
    except (ValueError, NotImplementedError) as error:
        assert "out_proj" in str(error)  # noqa: PT017 - either a refusal or an effect will do
        return
    adapted = model.base_model.model["attn"](x, x, x)[0]
    assert not torch.equal(adapted, base["attn"](x, x, x)[0])


def test_fields_for_megatron_on_another_model_are_said_to_change_nothing() -> None:
    config = lorica.LoraConfig(target_modules=["lin0"], megatron_config={"tensor_model_parallel_size": 2})
    with pytest.warns(UserWarning, match="megatron_config changes nothing"):
        lorica.get_peft_model(mlp(), config)
