"""Contexts around an adapted model, and targets by condition number, as PEFT has them."""

from __future__ import annotations

import pytest
import torch
import twins

import lorica
import mixtures
import models
from lorica import helpers
from lorica.targets.kappa import KappaTuneSelector, condition_number, find_kappa_target_modules
from lorica.variants import dora

theirs = pytest.importorskip("peft.helpers")
FIELDS = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
BATCH = models.ids(2, 7)


@pytest.mark.parametrize("multiplier", [0, 0.5, 2])
def test_scales_are_multiplied_and_come_back(multiplier):
    pair = twins.adapted(models.tiny_llama(), FIELDS)
    before = [models.logits(model, BATCH) for model in pair]
    with theirs.rescale_adapter_scale(pair[0], multiplier), helpers.rescale_adapter_scale(pair[1], multiplier):
        twins.assert_close(models.logits(pair[1], BATCH), models.logits(pair[0], BATCH))
    assert torch.equal(models.logits(pair[1], BATCH), before[1])


def test_scales_come_back_after_an_error():
    model = twins.adapted(models.tiny_llama(), FIELDS)[1]
    before = models.logits(model, BATCH)
    with pytest.raises(KeyError), helpers.rescale_adapter_scale(model, 3):
        raise KeyError
    assert torch.equal(models.logits(model, BATCH), before)


@pytest.mark.parametrize("rescale", [theirs.rescale_adapter_scale, helpers.rescale_adapter_scale])
def test_refusals_of_rescaling_are_pefts(rescale):
    base = models.tiny_llama()
    with pytest.raises(ValueError, match="scaling is only supported for models with `LoraLayer`s"), rescale(base, 0.5):
        pass
    with pytest.raises(TypeError, match="Argument multiplier should be of type float"), rescale(base, "a"):
        pass


def test_merged_adapters_are_not_rescaled():
    model = twins.adapted(models.tiny_llama(), FIELDS)[1]
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge before scaling"), helpers.rescale_adapter_scale(model, 0.5):
        pass


def test_inputs_keep_their_dtype():
    model = lorica.get_peft_model(models.mlp().bfloat16(), lorica.LoraConfig(target_modules=["lin0"]))
    x = models.floats(2, 10).bfloat16()
    wanted = model(x)
    with helpers.disable_input_dtype_casting(model):
        assert torch.equal(model(x), wanted)
    assert wanted.dtype == torch.bfloat16


def test_norms_are_kept_or_not(monkeypatch):
    model = lorica.get_peft_model(models.mlp(), lorica.LoraConfig(target_modules=["lin0"], use_dora=True)).eval()
    x, taken = models.floats(2, 10), []
    squares = dora.row_squares
    monkeypatch.setattr(dora, "row_squares", lambda *args: taken.append(1) or squares(*args))

    def count(context=None):
        taken.clear()
        for _ in range(3):
            model(x)
        return len(taken)

    assert count() == 1
    with helpers.DoraCaching(enabled=False):
        assert count() == 3
        with helpers.DoraCaching():
            assert count() <= 1
        assert count() == 3
    assert count() <= 1
    helpers.DoraCaching()(enabled=False)
    try:
        assert count() == 3
    finally:
        helpers.DoraCaching()(enabled=True)


def test_adapters_are_known_by_their_configuration(tmp_path):
    import json

    model = lorica.get_peft_model(models.mlp(), lorica.LoraConfig(target_modules=["lin0"]))
    model.save_pretrained(tmp_path / "adapter")
    models.tiny_llama().save_pretrained(tmp_path / "model")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))
    for name, wanted in (("adapter", True), ("model", False), ("other", True)):
        for check in (theirs.check_if_peft_model, helpers.check_if_peft_model):
            assert check(str(tmp_path / name)) == wanted
    assert not helpers.check_if_peft_model(tmp_path / "nowhere")


@pytest.mark.parametrize("make", [models.tiny_llama, mixtures.moe])
def test_the_best_conditioned_targets_are_pefts(make):
    base = make()
    ours = KappaTuneSelector(base, show_progress=False)
    peft = theirs.KappaTuneSelector(base, show_progress=False)
    for options in ({}, {"top_p": 0.3}, {"num_modules": 3}, {"threshold": 50.0}):
        assert ours.get_best_targets(**options) == peft.get_best_targets(**options)
        assert ours.get_best_target_parameters(**options) == peft.get_best_target_parameters(**options)
    assert find_kappa_target_modules(base, show_progress=False) == theirs.find_kappa_target_modules(
        base, show_progress=False
    )
    adapted = lorica.get_peft_model(base, lorica.LoraConfig(target_modules=["q_proj"]))
    assert (
        KappaTuneSelector(adapted.get_base_model(), show_progress=False).get_best_targets() == ours.get_best_targets()
    )


@pytest.mark.parametrize("smallest", [0.3, 1e-4, 1e-6, 0.0])
def test_condition_numbers_are_exact(smallest):
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, 12, generator=generator, dtype=torch.float64)).Q for n in (20, 12))
    values = torch.linspace(2, 1, 12, dtype=torch.float64)
    values[-1] = smallest
    wanted = 2 / (smallest + 1e-8)
    for weight in ((left * values) @ right.T, right @ (left * values).T):
        assert condition_number(weight) == pytest.approx(wanted, rel=1e-4)
