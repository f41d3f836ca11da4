"""Helpers around training, and further ways of loading, behave as PEFT's do."""

from __future__ import annotations

import copy

import pytest
import torch
import twins
from twins import lorica, peft

from models import ids, mlp, randomise, tiny_llama

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*use_reentrant.*"),
]
BATCH = torch.linspace(-1, 1, 30).view(3, 10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_casting_to_mixed_precision(dtype: torch.dtype) -> None:
    """Trainable parameters become float32, frozen ones the low precision."""
    states = []
    for library in (peft, lorica):
        model = library.get_peft_model(mlp(), library.LoraConfig(target_modules=["lin0"], modules_to_save=["head"]))
        library.cast_mixed_precision_params(model, dtype=dtype)
        states.append({name: (p.dtype, p.requires_grad) for name, p in model.named_parameters()})
    assert states[1] == states[0]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_preparing_for_quantised_training(checkpointing: bool) -> None:
    """Everything frozen; a model that is not quantised is only cast."""
    states, wanted, switched = [], [], []
    for library in (peft, lorica):
        base = tiny_llama().bfloat16()
        model = library.prepare_model_for_kbit_training(base, use_gradient_checkpointing=checkpointing)
        assert model is base
        states.append({name: (p.dtype, p.requires_grad) for name, p in model.named_parameters()})
        wanted.append(model.get_input_embeddings()(ids(1, 3)).requires_grad)
        switched.append([getattr(module, "gradient_checkpointing", None) for module in model.modules()])
    assert states[1] == states[0]
    assert wanted[1] is wanted[0]
    assert switched[1] == switched[0]


def test_a_config_may_be_given_when_loading(tmp_path) -> None:
    base = mlp()
    saved = randomise(peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(target_modules=["lin0"], r=4)))
    saved.save_pretrained(str(tmp_path))
    outs = []
    for library in (peft, lorica):
        config = library.LoraConfig(target_modules=["lin0"], r=4, lora_alpha=16)
        model = library.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path), config=config, is_trainable=True)
        assert model.peft_config["default"].lora_alpha == 16
        outs.append(model.eval()(BATCH))
    twins.assert_close(outs[1], outs[0])


def test_keys_may_be_renamed_when_loading(tmp_path) -> None:
    """``key_mapping``: for a base model whose modules have other names now."""
    base = mlp()
    saved = randomise(peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(target_modules=["lin0", "lin1"])))
    saved.save_pretrained(str(tmp_path))
    outs = []
    for library in (peft, lorica):
        moved = copy.deepcopy(base)
        moved.inner = torch.nn.ModuleDict({"lin0": moved.lin0})
        del moved.lin0
        moved.forward = (  # type: ignore[method-assign]
            lambda x, m=moved: m.head(torch.relu(m.lin1(torch.relu(m.inner["lin0"](x)))))
        )
        with twins.quiet():
            model = library.PeftModel.from_pretrained(moved, str(tmp_path), key_mapping={"^lin0": "inner.lin0"})
        layer = model.base_model.model.inner["lin0"]
        outs.append(layer(BATCH))
    twins.assert_close(outs[1], outs[0])


def test_status_functions_take_any_model() -> None:
    """``get_layer_status`` and ``get_model_status`` as functions, on a wrapped and on a bare model."""
    for wrapped in (True, False):
        names, counts = [], []
        for library in (peft, lorica):
            config = library.LoraConfig(target_modules=["lin0", "lin1"])
            model = library.get_peft_model(mlp(), config) if wrapped else library.inject_adapter_in_model(config, mlp())
            names.append([status.name for status in library.get_layer_status(model)])
            whole = library.get_model_status(model)
            counts.append((whole.base_model_type, whole.adapter_model_type, whole.trainable_params, whole.total_params))
        assert names[1] == names[0]
        assert counts[1] == counts[0]


def test_model_cards_say_the_same_in_their_head(tmp_path) -> None:
    from huggingface_hub import ModelCard

    heads = []
    for library in (peft, lorica):
        folder = tmp_path / library.__name__
        folder.mkdir()
        base = tiny_llama()
        base.name_or_path = "someone/some-model"
        model = library.get_peft_model(base, library.LoraConfig(task_type="CAUSAL_LM"))
        model.create_or_update_model_card(str(folder))
        heads.append(ModelCard.load(folder / "README.md").data.to_dict())
    assert heads[1]["base_model"] == "someone/some-model"
    assert set(heads[1].get("tags", [])) >= {"lora"}
    assert heads[1].get("pipeline_tag") == heads[0].get("pipeline_tag")
