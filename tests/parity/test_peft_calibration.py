"""Starts that come from data: as in PEFT on the same data, up to signs that nothing determines."""

from __future__ import annotations

import copy
import dataclasses
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import twins
from torch import Tensor, nn
from twins import peft

import lorica
import models
from lorica.errors import ConfigError

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture
def corda(monkeypatch: pytest.MonkeyPatch) -> Any:
    """PEFT's module, which takes its dataclass from a package that it does not require."""
    if "attr" not in sys.modules:
        attr = types.ModuleType("attr")
        attr.dataclass = dataclasses.dataclass
        monkeypatch.setitem(sys.modules, "attr", attr)
    return pytest.importorskip("peft.tuners.lora.corda")


def batches(count: int = 6, rows: int = 1, length: int = 16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(2, models.VOCABULARY, (rows, length), generator=generator) for _ in range(count)]


def both(fields: dict[str, Any]) -> tuple[Any, Any]:
    """The same configuration of both libraries; options are given as dictionaries."""
    with twins.quiet():
        theirs = peft.LoraConfig(**copy.deepcopy(fields))
    return theirs, lorica.LoraConfig(**copy.deepcopy(fields))


def adapted(bases: tuple[nn.Module, nn.Module], configs: tuple[Any, Any]) -> twins.Twins:
    with twins.quiet():
        theirs = peft.get_peft_model(bases[0], configs[0])
    return theirs, lorica.get_peft_model(bases[1], configs[1])


def assert_equal_up_to_signs(pair: twins.Twins, tolerance: float) -> None:
    """Rows of A and columns of B, each with a sign of its own."""
    with twins.quiet():
        theirs = peft.get_peft_model_state_dict(pair[0])
    ours = lorica.get_peft_model_state_dict(pair[1])
    assert ours.keys() == theirs.keys()
    for name, wanted in theirs.items():
        sign = (wanted * ours[name]).sum(1 if "lora_A" in name else 0, keepdim=True).sign()
        twins.assert_close(ours[name] * sign, wanted, tolerance, name)


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if name.endswith("base_layer.weight")}


# ---- EVA ------------------------------------------------------------------------------------------------------------


def rows(seed: int) -> Tensor:
    """Inputs whose spectrum decays, so that few of them settle it."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(10, 10, generator=torch.Generator().manual_seed(0))).Q
    return (torch.randn(400, 10, generator=generator) * 0.6 ** torch.arange(10)) @ turn


EVA = {"r": 3, "lora_alpha": 6, "target_modules": ["lin0", "lin1", "head"], "init_lora_weights": "eva"}
PLAIN = {
    "forward_fn": lambda model, x: model(x),
    "prepare_model_inputs_fn": None,
    "prepare_layer_inputs_fn": None,
    "show_progress_bar": False,
}


@pytest.mark.parametrize("options", [{"rho": 1.0}, {"rho": 2.0}, {"rho": 2.0, "whiten": True}], ids=str)
def test_eva_finds_the_subspaces_and_the_ranks_that_peft_finds(options: dict[str, Any]) -> None:
    data = [rows(seed) for seed in range(4)]
    fields = {**EVA, "eva_config": {"tau": 0.999, **options}}
    pair = adapted((models.mlp(), models.mlp()), both(fields))
    with twins.quiet():
        theirs = peft.get_eva_state_dict(pair[0], data, **PLAIN)
    ours = lorica.get_eva_state_dict(pair[1], data, **PLAIN)
    assert ours.keys() == theirs.keys()
    for name, wanted in theirs.items():
        # PEFT's decomposition is a sketch of each batch beside what the sketches before it left.
        assert ours[name].shape == wanted.shape
        if len(wanted):
            orthonormal = [torch.linalg.qr(side.float().T).Q for side in (ours[name], wanted)]
            assert torch.linalg.svdvals(orthonormal[0].T @ orthonormal[1]).min() > 0.99
    explained = [_explained(state, data) for state in (ours, theirs)]
    if not options.get("whiten"):
        assert explained[0] >= explained[1] - 1e-4


def _explained(state: dict[str, Tensor], data: list[Tensor]) -> float:
    """The variance of the first layer's inputs that lies in the rows found for it."""
    x = torch.cat(data)
    x = x - x.mean(0)
    found = state["base_model.model.lin0"].float()
    return float((x @ found.T).square().sum() / x.square().sum())


@pytest.mark.parametrize("adjust", [True, False])
def test_eva_puts_a_state_into_the_model_as_peft_does(adjust: bool, tmp_path: Path) -> None:
    fields = {**EVA, "target_modules": ALL, "eva_config": {"adjust_scaling_factors": adjust}}
    pair = adapted((models.tiny_llama(), models.tiny_llama()), both(fields))
    data = [{"input_ids": ids} for ids in batches(2, rows=4)]
    state = lorica.get_eva_state_dict(pair[1], data, show_progress_bar=False)
    gone = [*state][4]
    state[gone] = state[gone][:0]
    with twins.quiet():
        peft.initialize_lora_eva_weights(pair[0], eva_state_dict=copy.deepcopy(state))
    lorica.initialize_lora_eva_weights(pair[1], eva_state_dict=state)
    twins.assert_same_parameters(pair)
    twins.assert_same_files(pair)
    theirs, ours = (model.peft_config["default"] for model in pair)
    assert ours.rank_pattern == theirs.rank_pattern
    assert ours.alpha_pattern == theirs.alpha_pattern
    pair[1].save_pretrained(tmp_path)
    with twins.quiet():
        loaded = peft.PeftModel.from_pretrained(models.tiny_llama(), tmp_path)
    ids = data[0]["input_ids"]
    twins.assert_close(pair[1].eval()(ids).logits, loaded(ids).logits)


def test_the_positions_that_count_are_pefts() -> None:
    ids, labels, mask = (torch.randint(0, 3, (3, 7)) for _ in range(3))
    for use in (True, False):
        options = {"use_label_mask": use, "label_mask_value": 1}
        theirs, ours = both({"init_lora_weights": "eva", "eva_config": options})
        for more in ({}, {"labels": labels}, {"attention_mask": mask}, {"attention_mask": mask, "labels": labels}):
            batch = {"input_ids": ids, **more}
            wanted = peft.tuners.lora.eva.prepare_model_inputs_fn_language_modeling(batch, theirs)
            found = lorica.calibration.inputs.prepare_model_inputs_fn_language_modeling(batch, ours)
            assert torch.equal(found, wanted)


# ---- CorDA ----------------------------------------------------------------------------------------------------------

BASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "llama": (models.tiny_llama, {"target_modules": ALL}),
    "gpt2": (models.tiny_gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
}


@pytest.mark.parametrize("method", ["ipm", "kpm"])
@pytest.mark.parametrize("base", BASES)
def test_corda_starts_as_in_peft(corda: Any, base: str, method: str) -> None:
    make, fields = BASES[base]
    data = batches()
    fields = {"r": 4, "lora_alpha": 12, "init_lora_weights": "corda", "corda_config": {"corda_method": method}} | fields
    configs, bases = both(fields), (make(), make())
    corda.preprocess_corda(bases[0], configs[0], lambda: [bases[0](ids) for ids in data])
    lorica.preprocess_corda(bases[1], configs[1], lambda: [bases[1](ids) for ids in data])
    pair = adapted(bases, configs)
    # PEFT inverts the covariance in float32, whose smallest values "kpm" depends on.
    assert_equal_up_to_signs(pair, 1e-3 if method == "ipm" else 2e-2)
    twins.assert_same_tensors(base_weights(pair[1]), base_weights(pair[0]), 1e-3)
    twins.assert_close(pair[1](data[0]).logits, make()(data[0]).logits, 1e-5)


def test_sequences_of_one_batch_count_as_peft_counts_batches_of_one(corda: Any) -> None:
    data = torch.cat(batches(4))
    fields = {"r": 4, "init_lora_weights": "corda", "corda_config": {}, "target_modules": ALL}
    configs, bases = both(fields), (models.tiny_llama(), models.tiny_llama())
    corda.preprocess_corda(bases[0], configs[0], lambda: [bases[0](ids) for ids in data.split(1)])
    lorica.preprocess_corda(bases[1], configs[1], lambda: bases[1](data))
    assert_equal_up_to_signs(adapted(bases, configs), 1e-3)


# ---- LoRA-GA --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["ArBr", "A2rBr", "ArB2r"])
@pytest.mark.parametrize("scale", ["stable", "weight_svd", "gd_scale", "unit"])
def test_lora_ga_starts_as_in_peft(direction: str, scale: str) -> None:
    from peft.tuners.lora.loraga import preprocess_loraga

    data = batches(3, rows=4)
    options = {"direction": direction, "scale": scale}
    # Of four times the rank PEFT's sketch is exact where that is a whole side of the gradient.
    fields = {"r": 4, "lora_alpha": 12, "init_lora_weights": "lora_ga", "target_modules": ALL}
    configs, bases = both({**fields, "lora_ga_config": options}), (models.tiny_llama(), models.tiny_llama())

    def step(model: nn.Module) -> Callable[[], None]:
        def run() -> None:
            for ids in data:
                model(ids, labels=ids).loss.backward()

        return run

    with twins.quiet():
        preprocess_loraga(bases[0], configs[0], step(bases[0]))
    lorica.preprocess_loraga(bases[1], configs[1], step(bases[1]))
    assert all(parameter.grad is None for parameter in bases[1].parameters())
    pair = adapted(bases, configs)
    assert_equal_up_to_signs(pair, 1e-3 if scale != "weight_svd" else 2e-2)  # PEFT sketches the weight's norm too
    twins.assert_close(pair[1].eval()(data[0]).logits, models.tiny_llama()(data[0]).logits, 1e-5)


# ---- LoftQ ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def loftq(monkeypatch: pytest.MonkeyPatch) -> Any:
    """PEFT's module, which computes on "cuda" whatever there is."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    module = pytest.importorskip("peft.utils.loftq_utils")

    def here(to: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def moved(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            args = tuple("cpu" if arg == "cuda" else arg for arg in args if not isinstance(arg, Tensor))
            return to(self, *args, **{k: "cpu" if v == "cuda" else v for k, v in kwargs.items()})

        return moved

    for cls in (Tensor, bitsandbytes.nn.Params4bit, bitsandbytes.nn.Int8Params):
        monkeypatch.setattr(cls, "to", here(cls.to))
    return module


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("bits", [4, 8])
def test_loftq_starts_as_in_peft(loftq: Any, bits: int, rounds: int) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 48, bias=False))
    quantised, a, b = loftq.loftq_init(base[0].weight.detach(), bits, 4, rounds)
    fields = {"r": 4, "lora_alpha": 4, "target_modules": ["0"], "init_lora_weights": "loftq"}
    config = lorica.LoraConfig(**fields, loftq_config={"loftq_bits": bits, "loftq_iter": rounds})
    model = lorica.get_peft_model(base, config)
    layer = model.base_model.model[0]
    twins.assert_close(layer.base_layer.weight, quantised, 1e-6)
    twins.assert_close(layer.get_delta_weight("default"), b @ a, 1e-4)


def test_quantised_models_get_pefts_factors(loftq: Any, tmp_path: Path) -> None:
    from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=models.VOCABULARY, num_hidden_layers=1, **sizes)).eval()
    base.save_pretrained(tmp_path)
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=four)
    model = lorica.get_peft_model(model, lorica.LoraConfig(r=8, lora_alpha=8, target_modules=ALL))
    lorica.replace_lora_weights_loftq(model, tmp_path)
    for layer in model.modules():
        if hasattr(layer, "target_name"):
            weight = base.get_submodule(layer.target_name).weight.detach()
            a, b = loftq._loftq_init_new(layer.base_layer.weight, weight, num_bits=4, reduced_rank=8)
            twins.assert_close(layer.get_delta_weight("default"), b @ a, 1e-4, layer.target_name)


# ---- files ----------------------------------------------------------------------------------------------------------


def test_a_file_of_peft_whose_start_nobody_knows_is_refused_by_name(tmp_path: Path) -> None:
    from peft.tuners.lora.loraga import preprocess_loraga

    ids = batches(1, rows=4)[0]
    fields = {"r": 4, "init_lora_weights": "lora_ga", "target_modules": ALL, "lora_ga_config": {}}
    config, base = both(fields)[0], models.tiny_llama()
    with twins.quiet():
        preprocess_loraga(base, config, lambda: base(ids, labels=ids).loss.backward())
    theirs = models.randomise(adapted((base, models.tiny_llama()), (config, lorica.LoraConfig(target_modules=ALL)))[0])
    with twins.quiet():
        theirs.save_pretrained(tmp_path)
    fresh = models.tiny_llama()
    before = copy.deepcopy(fresh.state_dict())
    with pytest.raises(ConfigError, match=r"layers.0.self_attn.q_proj.*preprocess_loraga.*init_lora_weights=True"):
        lorica.PeftModel.from_pretrained(fresh, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in fresh.state_dict().items())
    # The model that was saved with the change, or the start again from the same data, mean the same model.
    plain = lorica.PeftConfig.from_pretrained(tmp_path)
    plain.init_lora_weights, plain.lora_ga_config = True, None
    loaded = lorica.PeftModel.from_pretrained(copy.deepcopy(theirs).unload(), tmp_path, config=plain)
    twins.assert_close(loaded(ids).logits, theirs.eval()(ids).logits)
