"""A hot swap gives what PEFT's gives."""

from __future__ import annotations

import pytest
import twins
from twins import peft, quiet

import lorica
import models
from lorica.model.hotswap import (
    check_hotswap_configs_compatible,
    hotswap_adapter,
    prepare_model_for_compiled_hotswap,
)

theirs = pytest.importorskip("peft.utils.hotswap")
TARGETS = ["q_proj", "v_proj"]


def saved(folder, **fields):
    """Saved by PEFT."""
    with quiet():
        model = peft.get_peft_model(models.tiny_llama(), peft.LoraConfig(target_modules=TARGETS, **fields))
        models.randomise(model, fields.get("r", 4))
        model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("fields", [{}, {"r": 6}, {"r": 2, "lora_alpha": 5}])
def test_outputs_are_pefts(fields, prepared, tmp_path):
    first, second = saved(tmp_path / "0", r=4), saved(tmp_path / "1", **{"r": 4, **fields})
    batch, outputs, ranks = models.ids(2, 7), [], []
    for library, swap, prepare in (
        (peft, theirs.hotswap_adapter, theirs.prepare_model_for_compiled_hotswap),
        (lorica, hotswap_adapter, prepare_model_for_compiled_hotswap),
    ):
        with quiet():
            model = library.PeftModel.from_pretrained(models.tiny_llama(), first).eval()
            if prepared:
                prepare(model, target_rank=8, config=model.peft_config)
            swap(model, second, "default", torch_device="cpu")
        outputs.append(models.logits(model, batch))
        ranks.append(model.peft_config["default"].r if prepared else None)
    twins.assert_close(outputs[1], outputs[0], 1e-6)
    assert ranks[0] == ranks[1]


def test_ranks_of_single_layers_scale_as_in_a_model_that_loads_the_adapter(tmp_path):
    """PEFT looks for ``rank_pattern`` at the end of a tensor's name, where it never is, and scales by ``r``."""
    first, second = saved(tmp_path / "0", r=4), saved(tmp_path / "1", r=3, rank_pattern={"v_proj": 8})
    batch = models.ids(2, 7)
    with quiet():
        wanted = models.logits(peft.PeftModel.from_pretrained(models.tiny_llama(), second).eval(), batch)
        swapped = peft.PeftModel.from_pretrained(models.tiny_llama(), first).eval()
        theirs.hotswap_adapter(swapped, second, "default", torch_device="cpu")
        ours = lorica.PeftModel.from_pretrained(models.tiny_llama(), first).eval()
    hotswap_adapter(ours, second, "default")
    twins.assert_close(models.logits(ours, batch), wanted, 1e-6)
    assert twins.relative(models.logits(swapped, batch), wanted) > 1e-2


@pytest.mark.parametrize(
    "fields", [{"use_rslora": True}, {"lora_dropout": 0.1}, {"use_dora": True}, {"alpha_pattern": {"a": 1}}]
)
def test_configurations_that_do_not_go_together_are_pefts(fields):
    words = f"Configs are incompatible: for {next(iter(fields))}"
    with pytest.raises(ValueError, match=words):
        theirs.check_hotswap_configs_compatible(peft.LoraConfig(), peft.LoraConfig(**fields))
    with pytest.raises(ValueError, match=words):
        check_hotswap_configs_compatible(lorica.LoraConfig(), lorica.LoraConfig(**fields))
    check_hotswap_configs_compatible(lorica.LoraConfig(r=3), lorica.LoraConfig(lora_alpha=9))


def test_unexpected_keys_are_refused_as_by_peft(tmp_path):
    first, second = saved(tmp_path / "0"), tmp_path / "1"
    with quiet():
        peft.get_peft_model(models.tiny_llama(), peft.LoraConfig(target_modules=[*TARGETS, "o_proj"])).save_pretrained(
            second
        )
        for library, swap in ((peft, theirs.hotswap_adapter), (lorica, hotswap_adapter)):
            model = library.PeftModel.from_pretrained(models.tiny_llama(), first)
            with pytest.raises(RuntimeError, match="Hot swapping the adapter did not succeed, unexpected keys found"):
                swap(model, str(second), "default", torch_device="cpu")
