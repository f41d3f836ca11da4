"""Laws of ``add_weighted_adapter``: what a combination does is the combination of what its adapters do."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorica
from cases import DILATED, OPS, Op
from lorica.adapt.inject import lora_layers
from lorica.combine import TYPES
from lorica.errors import AdapterError
from mixtures import STACKS, deltas, moe
from models import MLP, floats, tiny_llama

ALL = [*OPS, *DILATED]
BY_NAME = {op.name: op for op in ALL}
WEIGHTS = [0.7, -1.3]


def by_name(op: Op) -> str:
    return op.name


def adapted(base: nn.Module, first: lorica.LoraConfig, second: lorica.LoraConfig | None = None) -> Any:
    torch.manual_seed(5)
    model = lorica.get_peft_model(base, first)
    if second is not None:
        model.add_adapter("second", second)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and "magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.rand(parameter.shape, generator=generator))
            elif "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return model.eval()


def two(op: Op, **fields: Any) -> Any:
    """A network with two adapters of the same rank and different α."""
    return adapted(op.build(), op.config(lorica, **fields), op.config(lorica, **{**fields, "lora_alpha": 10}))


@torch.no_grad()
def effect(model: Any, adapter: str, x: Tensor) -> Tensor:
    """What an adapter adds to the output."""
    model.set_adapter(adapter)
    with model.disable_adapter():
        base = model(x).double()
    return model(x).double() - base


def close(found: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    assert float((found - expected).norm()) <= tolerance * float(expected.norm())


def delta(model: Any, adapter: str) -> Tensor:
    (layer,) = lora_layers(model)
    factors = layer.factors(adapter)
    left, right = layer.op.delta(layer.base_layer, factors)
    return (layer.specs[adapter].scaling * left.double() @ right.double()).detach()


FIELDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "bias": {"lora_bias": True},
    "bias, rslora": {"lora_bias": True, "use_rslora": True},
}


def fitting(op: Op, kind: str) -> bool:
    return op.lora_bias or "bias" not in kind


CASES = [
    (op, kind) for op in ALL for kind in FIELDS if fitting(op, kind) and (kind == "plain" or "attention" not in op.name)
]
IDS = [f"{op.name}-{kind}" for op, kind in CASES]


@pytest.mark.parametrize(("op", "kind"), CASES, ids=IDS)
def test_cat_is_the_weighted_sum(op: Op, kind: str):
    model, x = two(op, **FIELDS[kind]), op.inputs()
    model.add_weighted_adapter(["default", "second"], WEIGHTS, "sum", "cat")
    if "attention" in op.name:  # its softmax is not linear: deltas are compared
        for layer in lora_layers(model):
            parts = [w * layer.get_delta_weight(n) for w, n in zip(WEIGHTS, ["default", "second"], strict=True)]
            close(layer.get_delta_weight("sum").double(), sum(parts).double())  # type: ignore[union-attr]
        return
    expected = sum(w * effect(model, name, x) for w, name in zip(WEIGHTS, ["default", "second"], strict=True))
    close(effect(model, "sum", x), expected)  # type: ignore[arg-type]
    assert model.peft_config["sum"].r == 8


@pytest.mark.parametrize(("op", "kind"), CASES, ids=IDS)
def test_svd_of_enough_rank_is_the_weighted_sum(op: Op, kind: str):
    model, x = two(op, **FIELDS[kind]), op.inputs()
    model.add_weighted_adapter(["default", "second"], WEIGHTS, "sum", "svd", svd_rank=8)
    model.add_weighted_adapter(["default", "second"], WEIGHTS, "joined", "cat")
    close(effect(model, "sum", x), effect(model, "joined", x))


@pytest.mark.parametrize("weight", [1.0, -1.0, 0.3, 0.0])
@pytest.mark.parametrize(("op", "kind"), CASES, ids=IDS)
def test_one_adapter_alone_is_multiplied(op: Op, kind: str, weight: float):
    if "attention" in op.name and weight != 1:
        pytest.skip("its softmax is not linear")
    model, x = two(op, **FIELDS[kind]), op.inputs()
    model.add_weighted_adapter(["default"], [weight], "scaled", "svd")
    expected = weight * effect(model, "default", x)
    found = effect(model, "scaled", x)
    assert float((found - expected).abs().max()) <= 2e-5 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("rank", [1, 3, 4, 5])
@pytest.mark.parametrize("op", [op for op in ALL if op.mergeable and "attention" not in op.name], ids=by_name)
def test_svd_is_the_nearest_delta_of_its_rank(op: Op, rank: int):
    model = two(op, use_rslora=True)
    model.add_weighted_adapter(["default", "second"], WEIGHTS, "near", "svd", svd_rank=rank)
    whole = sum(w * delta(model, name) for w, name in zip(WEIGHTS, ["default", "second"], strict=True))
    u, s, v = torch.linalg.svd(whole, full_matrices=False)  # type: ignore[arg-type]
    close(delta(model, "near"), (u[:, :rank] * s[:rank]) @ v[:rank], 1e-6)
    assert model.peft_config["near"].r == rank


@pytest.mark.parametrize("weight", [1, 1.0])
@pytest.mark.parametrize("op", ["linear", "transformers-conv1d", "embedding", "conv2d", "conv3d"])
def test_dora_alone_is_the_adapter_again(op: str, weight: float):
    model, x = two(BY_NAME[op], use_dora=True), BY_NAME[op].inputs()
    model.add_weighted_adapter(["second"], [weight], "again", "cat")
    assert torch.equal(effect(model, "again", x), effect(model, "second", x))
    assert model.peft_config["again"] == model.peft_config["second"]


@pytest.mark.parametrize("op", ["linear", "transformers-conv1d", "embedding", "conv2d"])
@pytest.mark.parametrize("others", [{"use_dora": True}, {}], ids=["both", "one"])
def test_svd_of_dora_is_the_sum_of_the_changes_of_the_weight(op: str, others: dict[str, Any]):
    case = BY_NAME[op]
    model = adapted(case.build(), case.config(lorica, use_dora=True), case.config(lorica, **others))
    model.add_weighted_adapter(["default", "second"], WEIGHTS, "sum", "svd", svd_rank=40)
    x = case.inputs()
    expected = sum(w * effect(model, name, x) for w, name in zip(WEIGHTS, ["default", "second"], strict=True))
    close(effect(model, "sum", x), expected)  # type: ignore[arg-type]
    assert not model.peft_config["sum"].use_dora


VARIANTS: dict[str, dict[str, Any]] = {
    "bdlora": {"use_bdlora": {"target_modules_bd_b": ["target"], "nblocks": 2}},
    "qalora": {"use_qalora": True, "qalora_group_size": 4},
    "velora": {"velora_config": {}},
    "monteclora": {"monteclora_config": {}},
}


@pytest.mark.parametrize("kind", ["cat", "svd"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_are_summed_as_the_plain_lora_that_they_amount_to(variant: str, kind: str):
    case = BY_NAME["linear"]
    model = adapted(case.build(), case.config(lorica, **VARIANTS[variant]), case.config(lorica, lora_alpha=10))
    model.add_weighted_adapter(["default", "second"], WEIGHTS, "sum", kind, svd_rank=8)
    x = case.inputs()
    expected = sum(w * effect(model, name, x) for w, name in zip(WEIGHTS, ["default", "second"], strict=True))
    close(effect(model, "sum", x), expected)  # type: ignore[arg-type]
    (layer,) = lora_layers(model)
    assert layer.specs["sum"].variant == ""
    model.add_weighted_adapter(["default"], [1.0], "again")
    assert torch.equal(effect(model, "again", x), effect(model, "default", x))
    assert model.peft_config["again"] == model.peft_config["default"]


def test_kasa_is_copied_or_refused():
    case = BY_NAME["linear"]
    model = adapted(case.build(), case.config(lorica, kasa_config={}), case.config(lorica, kasa_config={}))
    (layer,) = lora_layers(model)
    weight = layer.base_layer.weight.clone()
    with pytest.raises(AdapterError, match="started with kasa_config, which took its start out of the base weights"):
        model.add_weighted_adapter(["default", "second"], WEIGHTS, "sum")
    model.add_weighted_adapter(["default"], [1.0], "again")
    lorica.set_peft_model_state_dict(model, lorica.get_peft_model_state_dict(model), adapter_name="again")
    assert torch.equal(layer.base_layer.weight, weight)
    assert torch.equal(effect(model, "again", case.inputs()), effect(model, "default", case.inputs()))


def test_adapters_of_the_same_invocation_stay_activated_and_others_are_refused():
    fields = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    first = lorica.LoraConfig(alora_invocation_tokens=[3, 4], **fields)
    second = lorica.LoraConfig(alora_invocation_tokens=[3, 4], lora_alpha=3, **fields)
    model = adapted(tiny_llama(), first, second)
    model.add_weighted_adapter(["default", "second"], WEIGHTS, "sum", "cat")
    assert model.peft_config["sum"].alora_invocation_tokens == [3, 4]
    for layer in lora_layers(model):
        parts = [w * layer.get_delta_weight(name) for w, name in zip(WEIGHTS, ["default", "second"], strict=True)]
        close(layer.get_delta_weight("sum").double(), sum(parts).double())  # type: ignore[union-attr]
    model.add_adapter("other", lorica.LoraConfig(**fields))
    with pytest.raises(AdapterError, match="alora_invocation_tokens is combined only with adapters of the same"):
        model.add_weighted_adapter(["default", "other"], WEIGHTS, "new", "cat")


def test_rows_of_tokens_are_refused():
    fields = {"r": 2, "target_modules": ["q_proj"], "trainable_token_indices": [1, 5]}
    model = lorica.get_peft_model(tiny_llama(), lorica.LoraConfig(**fields))
    for call in (
        lambda: model.add_weighted_adapter(["default"], [1.0], "new"),
        lambda: lorica.convert_to_lora(model, 2),
        lambda: lorica.reduce_intruder_dimension(model),
    ):
        with pytest.raises(AdapterError, match=r"trainable_token_indices=\[1, 5\]"):
            call()


@pytest.mark.parametrize("kind", ["cat", "linear", "ties", "magnitude_prune"])
def test_sums_of_factors_refuse_dora(kind: str):
    model = two(BY_NAME["linear"], use_dora=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(AdapterError, match="target: adapter 'default' with use_dora changes the whole weight"):
        model.add_weighted_adapter(["default", "second"], WEIGHTS, "sum", kind, density=0.5)
    assert_unchanged(model, before)


def assert_unchanged(model: Any, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert set(model.peft_config) == {"default", "second"}


@pytest.mark.parametrize("kind", TYPES)
def test_nothing_else_changes(kind: str):
    model = adapted(MLP(), config(), config(lora_alpha=3))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.add_weighted_adapter(["default", "second"], WEIGHTS, "new", kind, density=0.5)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert {name for name in after if name not in before} == {
        name.replace(".second.", ".new.") for name in before if ".second." in name
    }
    assert model.active_adapters == ["default"]
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".new." in n)
    assert (model.peft_config["new"].r, model.peft_config["new"].lora_alpha) in {(4, 4), (8, 8)}


def config(**fields: Any) -> lorica.LoraConfig:
    return lorica.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["lin0", "lin1"], **fields})


# ---- different targets, ranks and patterns -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["svd", "cat"])
def test_adapters_on_different_layers_with_different_ranks(kind: str):
    first = config(target_modules=["lin0", "lin1"], rank_pattern={"lin1": 2}, alpha_pattern={"lin0": 5})
    second = config(target_modules=["lin1", "head"], r=3, use_rslora=True, rank_pattern={"head": 6})
    model = adapted(MLP(), first, second)
    model.add_weighted_adapter(["default", "second"], WEIGHTS, "sum", kind, svd_rank=9)
    assert model.peft_config["sum"].target_modules == {"lin0", "lin1", "head"}
    for layer in lora_layers(model):
        parts = zip(WEIGHTS, ["default", "second"], strict=True)
        expected = sum(w * layer.get_delta_weight(name) for w, name in parts if name in layer.specs)
        close(layer.get_delta_weight("sum").double(), expected.double())  # type: ignore[union-attr]


def test_layers_of_one_adapter_alone_are_named_where_the_union_of_targets_means_more():
    first = lorica.LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], layers_to_transform=[0], init_lora_weights=False
    )
    second = lorica.LoraConfig(r=2, target_modules=["v_proj"], layers_to_transform=[1], init_lora_weights=False)
    model = adapted(tiny_llama(), first, second)
    model.add_weighted_adapter(["default", "second"], [1.0, 2.0], "sum", "linear")
    held = {layer.target_name for layer in lora_layers(model) if "sum" in layer.specs}
    assert held == {
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.v_proj",
        "model.layers.1.self_attn.v_proj",
    }
    for layer in lora_layers(model):
        expected = (
            layer.get_delta_weight("default") if "default" in layer.specs else 2 * layer.get_delta_weight("second")
        )
        close(layer.get_delta_weight("sum").double(), expected.double())


def test_ranks_that_differ_on_a_layer_are_no_sum_of_factors():
    model = adapted(MLP(), config(rank_pattern={"lin1": 2}), config())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(AdapterError, match=r"lin1: the adapters have the ranks \[2, 4\] here"):
        model.add_weighted_adapter(["default", "second"], WEIGHTS, "sum", "linear")
    assert_unchanged(model, before)


def test_names_given_as_expressions_are_joined():
    model = adapted(MLP(), config(target_modules=".*lin0"), config(target_modules=".*(lin1|head)"))
    model.add_weighted_adapter(["default", "second"], WEIGHTS, "sum", "cat")
    assert model.peft_config["sum"].target_modules == "(.*lin0)|(.*(lin1|head))"
    assert {layer.target_name for layer in lora_layers(model) if "sum" in layer.specs} == {"lin0", "lin1", "head"}


# ---- whole modules, starts that change the base --------------------------------------------------------------------


def test_modules_that_were_trained_whole_come_along():
    model = adapted(MLP(), config(target_modules=["lin0"]), config(modules_to_save=["head"]))
    trained = model.base_model.model.head.modules_to_save["second"]
    with torch.no_grad():
        trained.weight.add_(1)
    model.add_weighted_adapter(["default", "second"], [0.0, 1.0], "sum", "cat")
    assert torch.equal(model.base_model.model.head.modules_to_save["sum"].weight, trained.weight)
    close(effect(model, "sum", floats(3, 10)), effect(model, "second", floats(3, 10)))


def test_two_copies_of_one_module_are_refused():
    model = adapted(MLP(), config(modules_to_save=["head"]), config(modules_to_save=["head"]))
    with pytest.raises(ValueError, match=r"modules_to_save, but found 1 such instance\(s\): \['head'\]"):
        model.add_weighted_adapter(["default", "second"], WEIGHTS, "sum")


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_in_the_base_weight_is_copied_or_refused(init: str, tmp_path: Path):
    base = MLP()
    model = adapted(copy.deepcopy(base), config(init_lora_weights=init), config())
    weight = model.base_model.model.lin0.base_layer.weight.clone()
    x = floats(3, 10)
    with pytest.raises(AdapterError, match="path_initial_model_for_weight_conversion"):
        model.add_weighted_adapter(["default", "second"], WEIGHTS, "sum")
    model.add_weighted_adapter(["default"], [1.0], "again")
    assert torch.equal(model.base_model.model.lin0.base_layer.weight, weight)
    assert torch.equal(effect(model, "again", x), effect(model, "default", x))
    lorica.set_peft_model_state_dict(model, lorica.get_peft_model_state_dict(model), adapter_name="again")
    assert torch.equal(model.base_model.model.lin0.base_layer.weight, weight)
    model.save_pretrained(tmp_path, selected_adapters=["again"])
    loaded = lorica.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "again").eval()
    model.set_adapter("default")
    close(loaded(x).detach().double(), model(x).detach().double())


# ---- random masks and pruning --------------------------------------------------------------------------------------


def wide_model() -> Any:
    return adapted(nn.Sequential(nn.Linear(300, 200)), config(target_modules=["0"]), config(target_modules=["0"]))


@pytest.mark.parametrize("density", [0.3, 0.8])
def test_dare_keeps_its_share_and_the_expectation(density: float):
    model = wide_model()
    (layer,) = lora_layers(model)
    torch.manual_seed(1)
    model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "dropped", "dare_linear", density=density)
    # Of two adapters' entries, each is kept with the chance of the density.
    zero = float((layer.factors("dropped").a == 0).float().mean())
    assert abs(zero - (1 - density) ** 2) < 0.04
    mean = torch.zeros(200, 300, dtype=torch.float64)
    for number in range(40):
        model.add_weighted_adapter(
            ["default", "second"], [1.0, 1.0], f"n{number}", "dare_linear_svd", 200, density=density
        )
        mean += delta(model, f"n{number}") / 40
        model.delete_adapter(f"n{number}")
    whole = delta(model, "default") + delta(model, "second")
    spread = math.sqrt((1 - density) / density / 40)
    assert float((mean - whole).norm() / whole.norm()) < 1.2 * spread


def test_masks_follow_from_torchs_seed_and_the_name():
    def masks(names: list[str], seed: int) -> dict[str, Tensor]:
        model = adapted(MLP(), config(target_modules=names), config(target_modules=names))
        torch.manual_seed(seed)
        model.add_weighted_adapter(["default", "second"], WEIGHTS, "new", "dare_ties", density=0.5)
        return {layer.target_name: layer.factors("new").a != 0 for layer in lora_layers(model)}

    first, second = masks(["lin0", "lin1"], 3), masks(["lin1"], 3)
    assert torch.equal(first["lin1"], second["lin1"])
    assert not torch.equal(first["lin1"], masks(["lin1"], 4)["lin1"])


def test_pruned_deltas_are_the_same_in_chunks(monkeypatch: pytest.MonkeyPatch):
    for kind in ("ties_svd", "magnitude_prune_svd"):
        found = []
        for chunk in (4 * 1024 * 1024, 3000):
            monkeypatch.setattr("lorica.combine.rules.CHUNK_ELEMENTS", chunk)
            model = wide_model()
            model.add_weighted_adapter(["default", "second"], WEIGHTS, "new", kind, 200, density=0.2)
            found.append(delta(model, "new"))
        close(*found, 1e-5)  # type: ignore[misc]


def test_a_clamp_cuts_at_the_quantile_of_both_factors():
    model = wide_model()
    model.add_weighted_adapter(["default", "second"], WEIGHTS, "free", "svd")
    model.add_weighted_adapter(["default", "second"], WEIGHTS, "cut", "svd", svd_clamp=0.9)
    (layer,) = lora_layers(model)
    free, cut = layer.factors("free"), layer.factors("cut")
    highest = torch.cat([free.b.flatten(), free.a.flatten()]).quantile(0.9)
    assert torch.allclose(cut.a, free.a.clamp(-highest, highest), atol=1e-7)
    assert torch.allclose(cut.b, free.b.clamp(-highest, highest), atol=1e-6)


# ---- what is refused -----------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "unknown adapter": ({"adapters": ["default", "thrid"]}, "Adapter thrid does not exist"),
    "no adapters": ({"adapters": [], "weights": []}, "a list of names"),
    "one weight short": ({"weights": [1.0]}, "one finite number for each of the 2"),
    "a weight that is none": ({"weights": [1.0, float("nan")]}, "one finite number"),
    "unknown type": ({"combination_type": "tiles"}, "Invalid combination_type: tiles"),
    "no density": ({"combination_type": "ties"}, "needs density"),
    "negative density": ({"combination_type": "dare_ties_svd", "density": -0.1}, "Density should be >= 0"),
    "unknown method": (
        {"combination_type": "ties", "density": 0.5, "majority_sign_method": "loud"},
        "Unimplemented mask",
    ),
    "negative rank": ({"svd_rank": -2}, "svd_rank=-2"),
    "clamp out of range": ({"svd_clamp": 1.5}, "svd_clamp=1.5"),
    "unknown driver": ({"svd_driver": "fast"}, "svd_driver='fast'"),
    "impossible name": ({"adapter_name": "a.b"}, "without dots"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_cannot_be_meant_is_refused_and_changes_nothing(wrong: str):
    arguments, message = WRONG[wrong]
    model = adapted(MLP(), config(), config())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    given = {"adapters": ["default", "second"], "weights": WEIGHTS, "adapter_name": "new", **arguments}
    with pytest.raises(AdapterError, match=message):
        model.add_weighted_adapter(**given)
    assert_unchanged(model, before)


def test_unequal_ranks_and_mixed_kinds_of_names_are_refused_as_by_peft():
    model = adapted(MLP(), config(), config(r=3))
    with pytest.raises(ValueError, match="All adapters must have the same r value"):
        model.add_weighted_adapter(["default", "second"], WEIGHTS, "new", "linear")
    model = adapted(MLP(), config(), config(target_modules=".*lin0"))
    with pytest.raises(ValueError, match="all adapter configs should follow the same target modules type"):
        model.add_weighted_adapter(["default", "second"], WEIGHTS, "new")


def test_a_name_that_is_there_stays_with_a_warning():
    model = adapted(MLP(), config(), config())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.warns(UserWarning, match="'second' is there already"):
        model.add_weighted_adapter(["default"], [2.0], "second")
    assert_unchanged(model, before)


def test_density_of_one_prunes_nothing_and_says_so():
    model = adapted(MLP(), config(), config())
    with pytest.warns(UserWarning, match="no pruning will be performed"):
        model.add_weighted_adapter(["default", "second"], WEIGHTS, "whole", "magnitude_prune", density=1.0)
    model.add_weighted_adapter(["default", "second"], WEIGHTS, "sum", "linear")
    for layer in lora_layers(model):
        assert torch.equal(layer.factors("whole").a, layer.factors("sum").a)


def test_groups_have_to_divide_the_rank():
    op = BY_NAME["conv2d-grouped"]
    model = two(op)
    with pytest.raises(ValueError, match="groups"):
        model.add_weighted_adapter(["default", "second"], WEIGHTS, "new", "svd", svd_rank=3)


def test_a_combination_is_saved_and_loaded(tmp_path: Path):
    base = MLP()
    model = adapted(copy.deepcopy(base), config(use_rslora=True, lora_bias=True), config(lora_alpha=3))
    x = floats(3, 10)
    for kind in ("svd", "cat", "linear"):
        model.add_weighted_adapter(["default", "second"], WEIGHTS, kind, kind)
        model.save_pretrained(tmp_path, selected_adapters=[kind])
        loaded = lorica.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / kind).eval()
        model.set_adapter(kind)
        assert torch.allclose(loaded(x), model(x), atol=1e-6)


def test_tied_adapters_stay_tied():
    fields = {"target_modules": ["embed_tokens"], "ensure_weight_tying": True, "init_lora_weights": False}
    model = adapted(tiny_llama(tied=True), lorica.LoraConfig(r=2, **fields), lorica.LoraConfig(r=3, **fields))
    model.add_weighted_adapter(["default", "second"], WEIGHTS, "sum", "cat")
    embedding, head = lora_layers(model)
    assert "sum" in head.tied
    for layer in (embedding, head):
        parts = [w * layer.get_delta_weight(name) for w, name in zip(WEIGHTS, ["default", "second"], strict=True)]
        close(layer.get_delta_weight("sum").double(), sum(parts).double())  # type: ignore[union-attr]
    with pytest.warns(UserWarning, match="ensure_weight_tying"):
        model.add_adapter("free", lorica.LoraConfig(r=2, target_modules=["embed_tokens", "lm_head"]))
    with pytest.raises(AdapterError, match=r"lm_head: the adapters .* share the embedding's factors"):
        model.add_weighted_adapter(["default", "free"], WEIGHTS, "other", "svd")


# ---- stacks of experts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True], ids=["a pair each", "one pair"])
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_experts_are_combined_one_by_one(kind: str, shared: bool):
    fields = {"target_modules": [], "target_parameters": STACKS, "share_expert_adapters": shared}
    first = lorica.LoraConfig(r=3, lora_alpha=6, **fields)
    second = lorica.LoraConfig(r=2, lora_alpha=2, use_rslora=True, **fields)
    model = adapted(moe(kind), first, second)
    for name, rank in (("cat", 5), ("svd", 2)):
        model.add_weighted_adapter(["default", "second"], WEIGHTS, name, name, svd_rank=2)
        found = deltas(model, name)
        parts = [deltas(model, adapter) for adapter in ("default", "second")]
        for target, delta in found.items():
            whole = sum(w * part[target].double() for w, part in zip(WEIGHTS, parts, strict=True))
            u, s, v = torch.linalg.svd(whole, full_matrices=False)  # type: ignore[arg-type]
            close(delta.detach().double(), ((u[..., :rank] * s[..., None, :rank]) @ v[..., :rank, :]).detach())
    model.add_weighted_adapter(["default"], [1.0], "again", "linear")
    for target, delta in deltas(model, "again").items():
        close(delta.detach().double(), deltas(model, "default")[target].detach().double())


def test_one_pair_for_all_experts_and_a_pair_each_are_not_combined():
    fields = {"target_modules": [], "target_parameters": STACKS}
    model = adapted(moe(), lorica.LoraConfig(r=2, **fields))
    model.add_adapter("second", lorica.LoraConfig(r=2, share_expert_adapters=True, **fields))
    with pytest.raises(AdapterError, match="differ in share_expert_adapters"):
        model.add_weighted_adapter(["default", "second"], WEIGHTS, "new")
