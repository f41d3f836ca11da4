"""Swapping an adapter's weights: the new adapter's output, nothing compiled again, all or nothing."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import lorica
import models
from cases import OPS
from lorica.model.hotswap import (
    hotswap_adapter,
    hotswap_adapter_from_state_dict,
    prepare_model_for_compiled_hotswap,
)

BATCH = models.ids(2, 7)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def saved(folder, build, seed=0, **fields):
    """An adapter with random factors in a folder; return what it computes."""
    config = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "init_lora_weights": False, **fields}
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = lorica.get_peft_model(build(), lorica.LoraConfig(**config)).eval()
        models.randomise(model, seed + 1)
        model.save_pretrained(folder)
    return model


def loaded(folder, build=models.tiny_llama):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return lorica.PeftModel.from_pretrained(build(), folder).eval()


OTHERS = {
    "the same": {},
    "larger": {"r": 7},
    "smaller": {"r": 2},
    "another scale": {"lora_alpha": 3},
    "ranks of their own": {"r": 3, "rank_pattern": {"v_proj": 6}},
    "fewer layers": {"target_modules": ["q_proj"]},
}


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("fields", OTHERS.values(), ids=OTHERS)
def test_the_new_adapter_computes_what_it_did(fields, prepared, tmp_path):
    saved(tmp_path / "0", models.tiny_llama)
    other = saved(tmp_path / "1", models.tiny_llama, seed=5, **fields)
    model = loaded(tmp_path / "0")
    before = model(BATCH).logits
    if prepared:
        prepare_model_for_compiled_hotswap(model, target_rank=8)
        assert torch.allclose(model(BATCH).logits, before, atol=1e-6)
    hotswap_adapter(model, tmp_path / "1", "default")
    assert torch.allclose(model(BATCH).logits, other(BATCH).logits, atol=1e-6)
    model.save_pretrained(tmp_path / "2")  # what lives is what its configuration says
    assert torch.allclose(loaded(tmp_path / "2")(BATCH).logits, other(BATCH).logits, atol=1e-6)
    hotswap_adapter(model, tmp_path / "0", "default")
    assert torch.allclose(model(BATCH).logits, before, atol=1e-6)


def test_a_swap_of_the_same_shape_is_bit_for_bit(tmp_path):
    saved(tmp_path / "0", models.tiny_llama)
    other = saved(tmp_path / "1", models.tiny_llama, seed=5)
    model = loaded(tmp_path / "0")
    hotswap_adapter(model, tmp_path / "1", "default")
    assert torch.equal(model(BATCH).logits, other(BATCH).logits)


@pytest.mark.parametrize("fields", OTHERS.values(), ids=OTHERS)
def test_nothing_is_compiled_again(fields, tmp_path):
    saved(tmp_path / "0", models.tiny_llama)
    other = saved(tmp_path / "1", models.tiny_llama, seed=5, **fields)
    model = loaded(tmp_path / "0")
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(BATCH)
        with torch.compiler.set_stance("fail_on_recompile"):
            hotswap_adapter(compiled, tmp_path / "1", "default")
            swapped = compiled(BATCH).logits
    assert torch.allclose(swapped, other(BATCH).logits, atol=1e-6)


def test_without_preparation_a_larger_rank_is_compiled_again(tmp_path):
    """The measure measures."""
    saved(tmp_path / "0", models.tiny_llama)
    saved(tmp_path / "1", models.tiny_llama, seed=5, r=7)
    compiled = torch.compile(loaded(tmp_path / "0"), backend="eager")
    with torch.no_grad():
        compiled(BATCH)
        hotswap_adapter(compiled, tmp_path / "1", "default")
        with torch.compiler.set_stance("fail_on_recompile"), pytest.raises(RuntimeError, match="recompil"):
            compiled(BATCH)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
@pytest.mark.parametrize("variant", [{}, {"use_dora": True}], ids=["plain", "dora"])
def test_every_kind_of_layer(op, variant, tmp_path):
    rank = 2 * op.ranks[0]
    try:
        config = op.config(lorica, r=rank, lora_alpha=5, init_lora_weights=False, **variant)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            lorica.get_peft_model(op.build(), config)
    except ValueError:
        pytest.skip("refused")
    batch, outputs = op.inputs(), []
    for seed, r in enumerate((op.ranks[0], rank)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = op.config(lorica, r=r, lora_alpha=5 + seed, init_lora_weights=False, **variant)
            torch.manual_seed(seed)
            model = lorica.get_peft_model(op.build(), config).eval()
            models.randomise(model, seed)
        model.save_pretrained(tmp_path / str(seed), save_embedding_layers=False)
        outputs.append(model(batch))
    model = loaded(tmp_path / "0", op.build)
    prepare_model_for_compiled_hotswap(model, target_rank=rank)
    for seed in (1, 0, 1):
        hotswap_adapter(model, tmp_path / str(seed), "default")
        assert torch.allclose(model(batch), outputs[seed], atol=2e-5), seed


def test_experts(tmp_path):
    import mixtures

    fields = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    saved(tmp_path / "0", mixtures.moe, **fields)
    other = saved(tmp_path / "1", mixtures.moe, seed=5, **{**fields, "r": 2, "lora_alpha": 3})
    model = loaded(tmp_path / "0", mixtures.moe)
    hotswap_adapter(model, tmp_path / "1", "default")
    assert torch.allclose(model(BATCH).logits, other(BATCH).logits, atol=1e-5)


def test_tied_factors_and_trained_rows_are_swapped_too(tmp_path):
    def build():
        return models.tiny_llama(tied=True)

    for fields in (
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
        {"trainable_token_indices": [3, 5]},
    ):
        saved(tmp_path / "0", build, **fields)
        other = saved(tmp_path / "1", build, seed=5, **fields, r=6)
        for name, parameter in other.named_parameters():
            if "trainable_tokens" in name:
                nn.init.normal_(parameter)
        other.save_pretrained(tmp_path / "1", save_embedding_layers=False)
        model = loaded(tmp_path / "0", build)
        hotswap_adapter(model, tmp_path / "1", "default")
        assert torch.allclose(model(BATCH).logits, other(BATCH).logits, atol=1e-6)


@pytest.mark.parametrize("kind", ["live", "file"])
def test_from_a_state_dict(kind, tmp_path):
    saved(tmp_path / "0", models.tiny_llama)
    other = saved(tmp_path / "1", models.tiny_llama, seed=5, r=6)
    tensors = lorica.get_peft_model_state_dict(other)
    if kind == "live":
        tensors = {name.replace(".weight", ".default.weight"): tensor for name, tensor in tensors.items()}
    model = loaded(tmp_path / "0")
    hotswap_adapter_from_state_dict(model, tensors, "default", other.peft_config["default"])
    assert torch.allclose(model(BATCH).logits, other(BATCH).logits, atol=1e-6)


BROKEN = {
    "more layers": ({"target_modules": ["q_proj", "v_proj", "down_proj", "o_proj"]}, RuntimeError, "unexpected keys"),
    "dora": ({"use_dora": True}, ValueError, "for use_dora"),
    "rslora": ({"use_rslora": True}, ValueError, "for use_rslora"),
    "bias": ({"lora_bias": True, "target_modules": ["q_proj"]}, ValueError, "for lora_bias"),
    "pissa": ({"init_lora_weights": "pissa"}, ValueError, "changed its base weight"),
}


@pytest.mark.parametrize(("fields", "error", "words"), BROKEN.values(), ids=BROKEN)
def test_a_swap_that_fails_leaves_the_old_adapter(fields, error, words, tmp_path):
    saved(tmp_path / "0", models.tiny_llama)
    saved(tmp_path / "1", models.tiny_llama, seed=5, **fields)
    unchanged(loaded(tmp_path / "0"), tmp_path / "1", error, words)


@pytest.mark.parametrize("kind", ["NaN", "shape", "missing"])
def test_a_broken_file_leaves_the_old_adapter(kind, tmp_path):
    from safetensors.torch import load_file, save_file

    saved(tmp_path / "0", models.tiny_llama)
    saved(tmp_path / "1", models.tiny_llama, seed=5, r=6)
    path = tmp_path / "1" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[-1]
    if kind == "NaN":
        tensors[name][0, 0] = torch.nan
    elif kind == "shape":
        tensors[name] = tensors[name][:, :-1].contiguous()
    else:
        del tensors[name]
    save_file(tensors, path)
    unchanged(loaded(tmp_path / "0"), tmp_path / "1", ValueError, "NaN|Incompatible shapes|missing")


def unchanged(model, folder, error, words):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = model.peft_config["default"].to_dict()
    with pytest.raises(error, match=words):
        hotswap_adapter(model, folder, "default")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.peft_config["default"].to_dict() == config


def test_a_merged_adapter_is_not_swapped(tmp_path):
    saved(tmp_path / "0", models.tiny_llama)
    model = loaded(tmp_path / "0")
    model.merge_adapter()
    with pytest.raises(ValueError, match="currently merged"):
        hotswap_adapter(model, tmp_path / "0", "default")


def test_preparation_refuses_what_it_cannot_do(tmp_path):
    saved(tmp_path / "0", models.tiny_llama)
    model = loaded(tmp_path / "0")
    with pytest.raises(ValueError, match="original rank is larger"):
        prepare_model_for_compiled_hotswap(model, target_rank=3)
    with pytest.raises(ValueError, match="before\\* compiling"):
        prepare_model_for_compiled_hotswap(torch.compile(model, backend="eager"), target_rank=8)
    with pytest.warns(UserWarning, match="already compiled"):
        prepare_model_for_compiled_hotswap(torch.compile(model, backend="eager"), target_rank=8, check_compiled="warn")
    with pytest.raises(ValueError, match="check_compiles"):
        prepare_model_for_compiled_hotswap(torch.compile(model, backend="eager"), target_rank=8, check_compiled="what")
    with pytest.raises(ValueError, match="No adapter layers"):
        prepare_model_for_compiled_hotswap(models.tiny_llama(), target_rank=8)
    assert model.peft_config["default"].r == 8
