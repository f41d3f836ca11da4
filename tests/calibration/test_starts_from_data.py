"""CorDA, LoRA-GA and LoftQ: the model starts as it was, its files mean the same model, and nothing is left behind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorica
import models
from lorica.calibration.corda import decomposed, invertible
from lorica.errors import AdapterError, CheckpointError, ConfigError, TargetError
from lorica.init import lora_ga

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = models.ids(4, 12)
FIELDS: dict[str, dict[str, Any]] = {
    "corda": {"init_lora_weights": "corda", "corda_config": {}},
    "lora_ga": {"init_lora_weights": "lora_ga", "lora_ga_config": {}},
    "loftq": {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 2}},
}
DATA = ["corda", "lora_ga"]


def config(init: str, **fields: Any) -> lorica.LoraConfig:
    given = {"r": 4, "lora_alpha": 12, "target_modules": ALL, **copy.deepcopy(FIELDS[init]), **fields}
    return lorica.LoraConfig(**given)


def prepare(base: nn.Module, chosen: lorica.LoraConfig, ids: Tensor = IDS, **arguments: Any) -> None:
    if chosen.init_lora_weights == "corda":
        lorica.preprocess_corda(base, chosen, lambda: base(ids), **arguments)
    elif chosen.init_lora_weights == "lora_ga":
        lorica.preprocess_loraga(base, chosen, lambda: base(ids, labels=ids).loss.backward(), **arguments)


def started(init: str, base: nn.Module | None = None, **fields: Any) -> nn.Module:
    base = models.tiny_llama() if base is None else base
    chosen = config(init, **fields)
    prepare(base, chosen)
    return lorica.get_peft_model(base, chosen).eval()


def factors(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in lorica.get_peft_model_state_dict(model).items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("fields", [{}, {"use_rslora": True}, {"use_dora": True}, {"lora_dtype": "bfloat16"}], ids=str)
@pytest.mark.parametrize("init", DATA)
def test_the_model_starts_as_it_was(init: str, fields: dict[str, Any]) -> None:
    expected = models.tiny_llama()(IDS).logits
    model = started(init, **fields)
    assert torch.allclose(model(IDS).logits, expected, atol=1e-5)
    with model.disable_adapter():
        assert not torch.allclose(model(IDS).logits, expected, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("init", [*DATA, "loftq"])
def test_half_precision_starts_near_what_it_was(init: str, dtype: torch.dtype) -> None:
    base = models.tiny_llama()
    expected = base(IDS).logits
    model = started(init, base.to(dtype))
    assert all(tensor.dtype == torch.float32 for tensor in factors(model).values())
    assert torch.allclose(model(IDS).logits.float(), expected, atol=0.1)


@pytest.mark.parametrize("init", DATA)
def test_nothing_of_the_model_changes_before_the_adapter_is_added(init: str) -> None:
    base = models.tiny_llama()
    base.train()
    base.model.layers[0].eval()
    base.lm_head.requires_grad_(False)
    before = copy.deepcopy(base)
    prepare(base, config(init))
    assert [m.training for m in base.modules()] == [m.training for m in before.modules()]
    for (name, now), (_, then) in zip(base.named_parameters(), before.named_parameters(), strict=True):
        assert torch.equal(now, then), name
        assert now.requires_grad == then.requires_grad, name
        assert now.grad is None, name
    assert all("forward" not in vars(module) and not module._forward_pre_hooks for module in base.modules())


@pytest.mark.parametrize("init", DATA)
def test_what_was_found_out_is_used_up(init: str) -> None:
    model = started(init)
    assert not any("_lorica_found" in vars(module) for module in model.modules())
    with pytest.raises(ConfigError, match=rf"layers.0.self_attn.q_proj.*preprocess_{init.replace('_', '')}"):
        model.add_adapter("second", config(init))


@pytest.mark.parametrize("init", DATA)
def test_without_data_it_says_what_to_call_and_changes_nothing(init: str) -> None:
    base = models.tiny_llama()
    before = copy.deepcopy(base.state_dict())
    with pytest.raises(ConfigError, match=rf"q_proj.*lorica.preprocess_{init.replace('_', '')}"):
        lorica.get_peft_model(base, config(init))
    assert before.keys() == base.state_dict().keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


@pytest.mark.parametrize("init", DATA)
def test_another_rank_than_the_one_prepared_for_is_refused(init: str) -> None:
    base = models.tiny_llama()
    prepare(base, config(init))
    with pytest.raises(ConfigError, match=r"layers.1.mlp.down_proj.*same model and configuration"):
        lorica.get_peft_model(base, config(init, rank_pattern={"layers.1.mlp.down_proj": 2}))


@pytest.mark.parametrize("init", DATA)
def test_a_cache_gives_the_same_start_without_a_run(init: str, tmp_path: Path) -> None:
    cache = str(tmp_path / "folder" / "cache.safetensors")

    def prepared(run: Callable[[nn.Module], object]) -> nn.Module:
        base, chosen = models.tiny_llama(), config(init)
        if init == "corda":
            chosen.corda_config.cache_file = cache
            lorica.preprocess_corda(base, chosen, lambda: run(base))
        else:
            lorica.preprocess_loraga(base, chosen, lambda: run(base), cache_file=cache)
        return lorica.get_peft_model(base, chosen)

    def never(base: nn.Module) -> None:
        raise AssertionError("the cache has it all")

    first = prepared(lambda base: base(IDS, labels=IDS).loss.backward() if init == "lora_ga" else base(IDS))
    assert same(factors(first), factors(prepared(never)))
    Path(cache).write_bytes(b"")  # an empty file is no cache, as in PEFT
    with pytest.raises(AssertionError, match="the cache has it all"):
        prepared(never)


def test_a_covariance_file_serves_another_rank(tmp_path: Path) -> None:
    path = str(tmp_path / "covariance.safetensors")
    fields = {"corda_config": {"covariance_file": path}, "target_modules": ["q_proj", "down_proj"]}
    started("corda", **fields)
    base, chosen = models.tiny_llama(), config("corda", **{**fields, "r": 6})
    lorica.preprocess_corda(base, chosen)
    found = factors(lorica.get_peft_model(base, chosen))
    assert same(found, factors(started("corda", r=6, target_modules=["q_proj", "down_proj"])))
    with pytest.raises(CheckpointError, match=r"covariance_file=.*k_proj.*other targets"):
        lorica.preprocess_corda(models.tiny_llama(), config("corda", corda_config={"covariance_file": path}))


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("field", ["cache_file", "covariance_file", "lora_ga"])
def test_a_pickle_is_never_read(field: str, legacy: bool, tmp_path: Path) -> None:
    path = tmp_path / "old.pt"

    class Trap:
        def __reduce__(self) -> Any:
            return (path.with_name("ran").write_text, ("it ran",))

    torch.save({"x": Trap()}, path, _use_new_zipfile_serialization=not legacy)
    if field == "lora_ga":
        chosen, arguments = config("lora_ga"), {"cache_file": str(path)}
    else:
        chosen, arguments = config("corda", corda_config={field: str(path)}), {}
    with pytest.raises(CheckpointError, match=r"old.pt' is a pickle.*run code"):
        prepare(models.tiny_llama(), chosen, **arguments)
    assert not path.with_name("ran").exists()


@pytest.mark.parametrize("init", [*DATA, "loftq"])
def test_a_file_means_the_same_model_after_the_same_preparation(init: str, tmp_path: Path) -> None:
    model = models.randomise(started(init))
    model.save_pretrained(tmp_path)
    base = models.tiny_llama()
    prepare(base, config(init))
    loaded = lorica.PeftModel.from_pretrained(base, tmp_path)
    assert torch.allclose(loaded(IDS).logits, model(IDS).logits, atol=1e-5)


@pytest.mark.parametrize("init", DATA)
def test_a_file_without_its_preparation_is_refused_and_changes_nothing(init: str, tmp_path: Path) -> None:
    started(init).save_pretrained(tmp_path)
    base = models.tiny_llama()
    before = copy.deepcopy(base.state_dict())
    with pytest.raises(ConfigError, match=r"nothing is known here.*init_lora_weights=True"):
        lorica.PeftModel.from_pretrained(base, tmp_path)
    assert before.keys() == base.state_dict().keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


@pytest.mark.parametrize("init", DATA)
def test_embeddings_start_as_by_default_and_convolutions_are_refused(init: str) -> None:
    base = models.embedding_net()
    chosen = config(init, target_modules=["emb", "head"], r=2)
    step = {"corda": lambda: base(IDS), "lora_ga": lambda: base(IDS).square().mean().backward()}[init]
    getattr(lorica, "preprocess_corda" if init == "corda" else "preprocess_loraga")(base, chosen, step)
    model = lorica.get_peft_model(base, chosen)
    assert not factors(model)["base_model.model.emb.lora_embedding_A"].any()
    conv, alone = nn.Sequential(nn.Conv1d(4, 6, 3)), config(init, target_modules=["0"])
    if init == "corda":
        lorica.preprocess_corda(conv, alone, lambda: conv(models.floats(2, 4, 8)))
    else:
        with pytest.raises(ConfigError, match="starts linear layers"):
            lorica.preprocess_loraga(conv, alone, lambda: None)
    with pytest.raises(ConfigError, match=r"0.*linear layers"):
        lorica.get_peft_model(conv, alone)


def test_a_layer_that_was_not_reached_is_named() -> None:
    base = models.tiny_llama()
    with pytest.raises(AdapterError, match=r"q_proj: run_model did not reach"):
        lorica.preprocess_corda(base, config("corda"), lambda: None)
    with pytest.raises(AdapterError, match=r"q_proj: no backward pass"):
        lorica.preprocess_loraga(base, config("lora_ga"), lambda: base(IDS))
    with pytest.raises(ConfigError, match="run_model must be specified"):
        lorica.preprocess_corda(base, config("corda"))
    with pytest.raises(ConfigError, match="lora_ga_config"):
        lorica.preprocess_loraga(base, config("lora_ga", lora_ga_config=None), lambda: None)


# ---- CorDA ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_the_decomposition_is_that_of_the_weight_along_its_inputs(method: str) -> None:
    weight, x = models.floats(20, 14), models.floats(50, 14) * 0.7 ** torch.arange(14)
    covariance = invertible(x.T @ x).double()
    u, s, v = (tensor.double() for tensor in decomposed(weight, covariance.float(), 14, method).values())
    assert torch.allclose((u * s) @ v, weight.double(), atol=1e-5)
    dense = torch.linalg.svd(weight.double() @ covariance, full_matrices=False)
    part = decomposed(weight, covariance.float(), 5, method)
    chosen = slice(0, 5) if method == "ipm" else slice(9, 14)
    wanted = dense.Vh[chosen] @ torch.linalg.inv(covariance)
    assert torch.allclose(part["s"].double(), dense.S[chosen], rtol=1e-5)
    assert torch.allclose(part["v"].double().abs(), wanted.abs(), atol=1e-5 * float(wanted.abs().max()))


def test_batches_do_not_matter_only_sequences_do() -> None:
    def run(parts: tuple[Tensor, ...]) -> dict[str, Tensor]:
        base, chosen = models.tiny_llama(), config("corda")
        lorica.preprocess_corda(base, chosen, lambda: [base(part) for part in parts])
        return factors(lorica.get_peft_model(base, chosen))

    whole, split = run((IDS,)), run(IDS.split(1))
    for name, tensor in whole.items():
        assert torch.allclose(tensor, split[name], atol=1e-4 * float(tensor.abs().max())), name


def test_half_precision_of_covariances_is_near_and_does_not_overflow() -> None:
    exact, base = started("corda"), models.tiny_llama()
    chosen = config("corda", corda_config={"use_float16_for_covariance": True, "prune_temporary_fields": False})
    lorica.preprocess_corda(base, chosen, lambda: [base(IDS.repeat(1, 2)) for _ in range(40)])
    kept = vars(base.model.layers[0].mlp.down_proj)["_lorica_found"]
    covariance = kept["weight", "inputs' covariance"][""]["c"]
    assert covariance.dtype == torch.float16
    assert covariance.isfinite().all()
    assert same({name: t * 0 for name, t in factors(exact).items()}, {n: t * 0 for n, t in factors(exact).items()})
    lorica.get_peft_model(base, chosen)


def test_another_model_can_be_run_in_place() -> None:
    base, other, chosen = models.tiny_llama(), models.tiny_llama(), config("corda")
    lorica.preprocess_corda(base, chosen, lambda: other(IDS), hooked_model=other)
    assert same(factors(lorica.get_peft_model(base, chosen)), factors(started("corda")))


# ---- LoRA-GA --------------------------------------------------------------------------------------------------------


def dense_gradient(name: str, parts: tuple[Tensor, ...]) -> Tensor:
    base = models.tiny_llama().train()
    for ids in parts:
        (base(ids, labels=ids).loss / len(parts)).backward()
    return base.get_submodule(name).weight.grad.double()


@pytest.mark.parametrize("steps", [1, 4])
def test_the_directions_are_those_of_the_gradient(steps: int) -> None:
    base, parts = models.tiny_llama(), IDS.chunk(steps)
    chosen = config("lora_ga", lora_ga_config={"scale": "unit"})
    lorica.preprocess_loraga(base, chosen, lambda: [base(ids, labels=ids).loss.backward() for ids in parts])
    model = lorica.get_peft_model(base, chosen)
    for name in ("model.layers.0.self_attn.o_proj", "model.layers.1.mlp.up_proj"):
        u, s, v = torch.linalg.svd(dense_gradient(name, parts), full_matrices=False)
        found = {key.rpartition("lora_")[2]: t for key, t in factors(model).items() if f".{name}.lora" in key}
        a, b = found["A.weight"].double(), found["B.weight"].double()
        assert torch.allclose(a.abs(), v[:4].abs(), atol=1e-4)
        assert torch.allclose(b.abs(), (u * s)[:, 4:8].abs(), atol=1e-4 * float(s[4]))


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", [False, "reentrant", "non_reentrant"])
def test_recomputed_activations_give_the_same_gradient(kind: Any) -> None:
    base, chosen = models.tiny_llama(), config("lora_ga")
    if kind:
        base.gradient_checkpointing_enable({"use_reentrant": kind == "reentrant"})
        base.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_())
    prepare(base, chosen)
    found = factors(lorica.get_peft_model(base, chosen))
    for name, tensor in factors(started("lora_ga")).items():
        assert torch.allclose(found[name], tensor, atol=1e-5 * float(tensor.abs().max())), name


def test_chance_chooses_the_same_directions_whenever_a_file_is_loaded(tmp_path: Path) -> None:
    options = {"lora_ga_config": {"direction": "random"}}
    model = models.randomise(started("lora_ga", **options))
    model.save_pretrained(tmp_path)
    torch.manual_seed(99)
    base = models.tiny_llama()
    prepare(base, config("lora_ga", **options))
    loaded = lorica.PeftModel.from_pretrained(base, tmp_path)
    assert torch.allclose(loaded(IDS).logits, model(IDS).logits, atol=1e-5)


def test_a_rank_that_needs_more_directions_than_there_are_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"k_proj.*takes 12 directions.*8 × 16.*rank_pattern"):
        prepare(models.tiny_llama(), config("lora_ga", r=6))


def test_large_gradients_are_sketched(monkeypatch: pytest.MonkeyPatch) -> None:
    import lorica.calibration.lora_ga as statistics

    exact = factors(started("lora_ga", r=2))
    monkeypatch.setattr(statistics, "EXACT_UP_TO", 4)
    monkeypatch.setattr(lora_ga, "EXACT_UP_TO", 4)
    for name, tensor in factors(started("lora_ga", r=2)).items():
        assert torch.allclose(tensor, exact[name], atol=2e-2 * float(tensor.abs().max())), name


# ---- LoftQ ----------------------------------------------------------------------------------------------------------


def losses(**fields: Any) -> float:
    """How far the weights of the adapted layers are from what they were, in all."""
    base, total = models.tiny_llama(), 0.0
    for module in started("loftq", **fields).modules():
        if hasattr(module, "target_name"):
            now = module.base_layer.weight + module.get_delta_weight("default")
            total += float((base.get_submodule(module.target_name).weight - now).detach().square().sum())
    return total


@pytest.mark.parametrize("bits", [4, 8])
def test_factors_give_back_what_quantisation_takes(bits: int) -> None:
    options = {"loftq_config": {"loftq_bits": bits, "loftq_iter": 1}}
    found = [losses(**options, r=r) for r in (1, 4, 8)]
    assert found[0] > found[1] > found[2]
    assert losses(**options, r=4, lora_alpha=1) == pytest.approx(found[1], rel=1e-3)


def test_more_rounds_come_nearer() -> None:
    found = [losses(loftq_config={"loftq_bits": 4, "loftq_iter": rounds}) for rounds in (1, 5)]
    assert found[1] < found[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loftq_bits": 3}, r"loftq_bits=3.*4 bits.*8"),
        ({"loftq_bits": 4, "loftq_iter": 0}, r"loftq_iter=0"),
    ],
)
def test_impossible_quantisers_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        started("loftq", loftq_config=options)
    with pytest.raises(ConfigError, match="`loftq_config` must be specified"):
        config("loftq", loftq_config={})


# ---- options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["eva", "corda"])
def test_missing_options_are_the_default_ones_with_a_word(name: str) -> None:
    with pytest.warns(UserWarning, match=rf"`{name}_config` is not specified"):
        found = lorica.LoraConfig(init_lora_weights=name)
    assert getattr(found, f"{name}_config") == {"eva": lorica.EvaConfig, "corda": lorica.CordaConfig}[name]()


@pytest.mark.parametrize("name", ["eva_config", "corda_config", "lora_ga_config", "loftq_config"])
def test_options_of_another_start_are_ignored_with_a_word(name: str) -> None:
    options = {"loftq_bits": 4} if name == "loftq_config" else {}
    with pytest.warns(UserWarning, match=rf"`{name}` specified but will be ignored"):
        lorica.LoraConfig(**{name: options})


def test_a_quantised_base_is_not_quantised_again() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = bitsandbytes.nn.Linear4bit(64, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    with pytest.raises(TargetError, match=r"0.*replace_lora_weights_loftq"):
        lorica.get_peft_model(nn.Sequential(layer.to("cpu")), config("loftq", target_modules=["0"]))


def quantised() -> tuple[nn.Module, nn.Module]:
    """Two linears in NF4 and what they compute, as plain ones."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))
    packed = nn.Sequential(
        bitsandbytes.nn.Linear4bit(64, 128, quant_type="nf4", compute_dtype=torch.float32),
        nn.Tanh(),
        bitsandbytes.nn.Linear4bit(128, 64, quant_type="nf4", compute_dtype=torch.float32),
    )
    packed.load_state_dict(plain.state_dict())
    packed = packed.to("cpu")
    for index in (0, 2):
        weight = packed[index].weight
        plain[index].weight.data = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state).float()
    return packed, plain


@pytest.mark.filterwarnings("ignore:The adapter's start was taken out of 2 weight")
@pytest.mark.parametrize("init", ["eva", *DATA])
def test_quantised_bases_start_as_the_numbers_they_stand_for(init: str) -> None:
    x, found = models.floats(40, 64), []
    for base in quantised():
        if init == "eva":
            chosen = lorica.LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights="eva", eva_config={"rho": 1.0})
            model = lorica.get_peft_model(base, chosen)
            lorica.initialize_lora_eva_weights(
                model,
                [x],
                forward_fn=lambda model, x: model(x),
                prepare_model_inputs_fn=None,
                prepare_layer_inputs_fn=None,
                show_progress_bar=False,
            )
        else:
            chosen = config(init, target_modules=["0", "2"])
            step = {"corda": lambda: base(x), "lora_ga": lambda: base(x).square().mean().backward()}[init]  # noqa: B023
            (lorica.preprocess_corda if init == "corda" else lorica.preprocess_loraga)(base, chosen, step)
            model = lorica.get_peft_model(base, chosen)
        found.append(factors(model))
    for name, tensor in found[0].items():
        assert torch.allclose(tensor, found[1][name], atol=1e-3 * float(found[1][name].abs().max() + 1e-9)), name
