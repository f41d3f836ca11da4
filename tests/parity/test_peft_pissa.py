"""PiSSA and OLoRA: the same delta leaves the base weight as in PEFT, and files mean the same model in both."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import twins
from torch import Tensor, nn
from twins import peft

import lorica
from lorica.errors import AdapterError, ConfigError, TargetError
from models import floats, mlp, randomise, tiny_gpt2, tiny_llama, transformers_conv1d

INITS = ["pissa", "pissa_niter_16", "olora"]


def net(target: nn.Module) -> nn.Module:
    return nn.ModuleDict({"target": target})


def fields(init: str, **more: object) -> dict:
    return {"target_modules": ["target"], "r": 5, "lora_alpha": 8, "init_lora_weights": init, **more}


def base_weight(model: nn.Module) -> Tensor:
    return model.base_model.model.target.get_base_layer().weight


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("shape", [(30, 24), (24, 30), (5, 24)], ids=str)
@pytest.mark.parametrize("init", INITS)
def test_the_same_residual_and_the_same_factors_up_to_sign(init: str, shape: tuple[int, int], rslora: bool) -> None:
    torch.manual_seed(1)
    base = net(nn.Linear(shape[1], shape[0]))
    pair = twins.adapt(base, fields(init, use_rslora=rslora))
    twins.assert_same_parameters(pair)
    theirs, ours = (base_weight(model).double() for model in pair)
    if "niter" in init:  # PEFT's draws differ from run to run, and it iterates no more columns than it keeps
        assert ours.norm() <= 1.0001 * theirs.norm() + 1e-6
        return
    assert (ours - theirs).norm() <= 2e-6 * base["target"].weight.norm()
    for name, expected in peft.get_peft_model_state_dict(pair[0]).items():
        found = lorica.get_peft_model_state_dict(pair[1])[name]
        dim = 1 if "lora_A" in name else 0
        sign = (found * expected).sum(dim, keepdim=True).sign()
        if init == "olora":
            assert (sign == 1).all()
        twins.assert_close(found * sign, expected, 2e-5, name)


@pytest.mark.parametrize("init", INITS)
def test_a_transposed_weight(init: str) -> None:
    """GPT-2's weights are ``[in, out]``. (PEFT's OLoRA decomposes them as they are stored, and fails.)"""
    base = net(transformers_conv1d(20, 30))
    x = floats(3, 30)
    model = lorica.get_peft_model(copy.deepcopy(base), lorica.LoraConfig(**fields(init, fan_in_fan_out=True)))
    twins.assert_close(model.base_model.model.target(x), base["target"](x), 1e-6)
    if init == "pissa":
        theirs = twins.adapt(base, fields(init, fan_in_fan_out=True))[0]
        twins.assert_close(base_weight(model), base_weight(theirs), 2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("init", INITS)
def test_the_model_starts_as_it_was(init: str, dora: bool, dtype: torch.dtype) -> None:
    base, x = net(nn.Linear(24, 30)).to(dtype), floats(4, 24).to(dtype)
    expected = base["target"](x)
    before = base["target"].weight.clone()
    model = lorica.get_peft_model(base, lorica.LoraConfig(**fields(init, use_dora=dora)))
    assert not torch.equal(base_weight(model), before)
    tolerance = 1e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    twins.assert_close(model.base_model.model.target(x), expected, tolerance)
    delta = model.base_model.model.target.get_delta_weight("default").double()
    rounded = (before.double() - delta).to(dtype)
    wrong = (base_weight(model) != rounded) & ((base_weight(model).double() - rounded.double()).abs() > 1e-6)
    assert float(wrong.double().mean()) < 0.01  # rounded once


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("init", INITS)
def test_files_go_both_ways_and_onto_a_plain_base(init: str, dora: bool, tmp_path: Path) -> None:
    config = {
        "target_modules": ["q_proj", "down_proj", "embed_tokens", "lm_head"],
        "r": 4,
        "init_lora_weights": init,
        "use_dora": dora,
    }
    batch = torch.arange(12).view(2, 6)
    pair = twins.adapt(tiny_llama(), config)
    for source, name in zip(pair, ("theirs", "ours"), strict=True):
        with torch.no_grad():
            for parameter in (p for n, p in source.named_parameters() if "lora_" in n):
                parameter.add_(torch.randn_like(parameter) * 0.05)
        with twins.quiet():
            expected = source.eval()(batch).logits
            source.save_pretrained(tmp_path / name)
            for reader in (peft, lorica):
                if init != "pissa_niter_16" or (name == "ours" and reader is lorica):
                    loaded = reader.PeftModel.from_pretrained(tiny_llama(), tmp_path / name)
                    twins.assert_close(loaded.eval()(batch).logits, expected, 5e-6, f"{name} read by {reader.__name__}")


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("init", INITS)
def test_loading_takes_the_same_out_again_whatever_the_seed(init: str, strict: bool, tmp_path: Path) -> None:
    base = mlp()
    config = lorica.LoraConfig(target_modules=["lin0", "lin1"], r=3, init_lora_weights=init)
    model = lorica.get_peft_model(copy.deepcopy(base), config)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(tmp_path)
    torch.manual_seed(77)
    loaded = lorica.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, strict=strict)
    twins.assert_close(loaded(floats(3, 10)), model(floats(3, 10)), 1e-6)
    merged, plain = model.merge_and_unload(), loaded.merge_and_unload()
    twins.assert_same_tensors(dict(plain.state_dict()), dict(merged.state_dict()), 1e-6)
    twins.assert_close(plain(floats(3, 10)), merged(floats(3, 10)), 1e-6)


def test_a_load_that_fails_leaves_the_base_weight_alone(tmp_path: Path) -> None:
    base = mlp()
    lorica.get_peft_model(
        copy.deepcopy(base), lorica.LoraConfig(target_modules=["lin0"], r=3, init_lora_weights="pissa")
    ).save_pretrained(tmp_path)
    config = lorica.LoraConfig(target_modules=["lin0", "lin1"], r=3, init_lora_weights="pissa")
    before = copy.deepcopy(base.state_dict())
    with pytest.raises(lorica.errors.CheckpointError):
        lorica.PeftModel.from_pretrained(base, tmp_path, config=config)
    twins.assert_same_tensors(dict(base.state_dict()), dict(before))


def test_an_initialisation_that_fails_changes_nothing() -> None:
    base = mlp()
    before = copy.deepcopy(base.state_dict())
    config = lorica.LoraConfig(target_modules=["lin0", "lin1", "head"], r=3, init_lora_weights="pissa")
    with pytest.raises(ConfigError, match=r"head: a weight of 2 × 20 has no 3 directions"):
        lorica.get_peft_model(base, config)
    twins.assert_same_tensors(dict(base.state_dict()), dict(before))


def test_what_would_change_another_layer_or_hide_a_merge_is_refused() -> None:
    config = lorica.LoraConfig(target_modules=["lm_head"], r=3, init_lora_weights="olora", ensure_weight_tying=False)
    with pytest.raises(TargetError, match=r"lm_head.*embed_tokens"), twins.quiet():
        lorica.get_peft_model(tiny_llama(tied=True), config)
    model = randomise(lorica.get_peft_model(mlp(), lorica.LoraConfig(target_modules=["lin0"], r=3)))
    model.merge_adapter()
    with pytest.raises(AdapterError, match=r"lin0.*default.*merged"):
        model.add_adapter("second", lorica.LoraConfig(target_modules=["lin0"], r=3, init_lora_weights="pissa"))


@pytest.mark.parametrize("change", [{"lora_alpha": -2}, {"lora_alpha": 0}], ids=str)
def test_pissa_needs_a_positive_scale(change: dict) -> None:
    with pytest.raises(ConfigError, match=r"target.*positive scale"):
        lorica.get_peft_model(net(nn.Linear(24, 30)), lorica.LoraConfig(**fields("pissa", **change)))


def test_convolutions_have_no_such_start() -> None:
    for init in INITS:
        with pytest.raises(ConfigError, match=r"target.*needs a linear layer"):
            lorica.get_peft_model(net(nn.Conv2d(3, 8, 3)), lorica.LoraConfig(**fields(init, r=2)))


@pytest.mark.parametrize("init", INITS)
def test_gpt2_starts_as_it_was(init: str) -> None:
    base, batch = tiny_gpt2(), torch.arange(10).view(2, 5)
    expected = base.eval()(batch).logits
    config = lorica.LoraConfig(r=4, init_lora_weights=init, fan_in_fan_out=True, target_modules=["c_attn", "c_proj"])
    twins.assert_close(lorica.get_peft_model(base, config).eval()(batch).logits, expected, 2e-6)


SPECTRA = {
    "flat": torch.ones(160),
    "slow": torch.arange(1, 161).float().rsqrt(),
    "fast": 0.9 ** torch.arange(160).float(),
    "step": torch.cat([torch.full((20,), 4.0), torch.ones(140)]),
}


@pytest.mark.parametrize("r", [2, 8, 32])
@pytest.mark.parametrize("spectrum", [*SPECTRA, "normal"])
def test_the_fast_form_leaves_hardly_more_than_the_exact_one(spectrum: str, r: int) -> None:
    torch.manual_seed(5)
    if spectrum == "normal":
        weight = torch.randn(200, 160)
    else:
        u, v = (torch.linalg.qr(torch.randn(rows, 160)).Q for rows in (200, 160))
        weight = u * SPECTRA[spectrum] @ v.T
    left = []
    for init in ("pissa", "pissa_niter_1"):
        linear = nn.Linear(160, 200)
        linear.weight.data.copy_(weight)
        model = lorica.get_peft_model(net(linear), lorica.LoraConfig(**fields(init, r=r)))
        left.append(float(base_weight(model).double().norm()))
    assert left[1] <= 1.003 * left[0]
    assert left[1] >= left[0] * (1 - 1e-6)
