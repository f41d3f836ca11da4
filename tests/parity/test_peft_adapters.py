"""Several adapters on one model, and patterns that differ between layers, count as they do in PEFT."""

from __future__ import annotations

import pytest
import torch
import twins
from twins import peft

from cases import OPS, Op
from models import ids, mlp, tiny_gpt2, tiny_llama, tiny_t5

pytestmark = pytest.mark.filterwarnings("ignore:.*groups.*")

LLAMA = {"target_modules": ["q_proj", "v_proj", "down_proj"], "lora_alpha": 10}
PATTERNS = [
    {"rank_pattern": {"q_proj": 2}},
    {"rank_pattern": {"layers.0.self_attn.q_proj": 3}, "alpha_pattern": {"v_proj": 5}},
    {"rank_pattern": {r"layers\.1\..*_proj": 6, "down_proj": 2}, "alpha_pattern": {r".*\.0\.mlp\.down_proj": 3}},
    {"rank_pattern": {"^model.layers.1.self_attn.v_proj": 5}, "use_rslora": True},
    {"rank_pattern": {"proj": 7}, "alpha_pattern": {"layers.0.self_attn.q_proj": 1, "q_proj": 2}},
]


def by_name(op: Op) -> str:
    return op.name


@pytest.mark.parametrize("patterns", PATTERNS, ids=range(len(PATTERNS)))
def test_rank_and_alpha_patterns(patterns: dict) -> None:
    pair = twins.adapted(tiny_llama(), {**LLAMA, "r": 4, **patterns})
    twins.assert_same_parameters(pair)
    twins.assert_same_files(pair)
    twins.assert_same_run(pair, ids(2, 5), 2e-6)


@pytest.mark.parametrize(
    ("build", "fields"),
    [
        (tiny_gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
        (tiny_llama, {"target_modules": "all-linear"}),
        (tiny_llama, {"target_modules": ["embed_tokens", "q_proj"]}),
        (mlp, {"target_modules": ["lin0", "lin1"], "modules_to_save": ["head"]}),
    ],
    ids=["gpt2", "llama", "llama-embedding", "mlp"],
)
def test_whole_models(build, fields: dict) -> None:
    batch = torch.randn(3, 10) if build is mlp else ids(2, 5)
    for bias in ("none", "lora_only"):
        pair = twins.adapted(build(), {"r": 4, "bias": bias, **fields})
        twins.assert_same_parameters(pair)
        twins.assert_same_run(pair, batch, 2e-6)


def test_encoder_decoder() -> None:
    pair = twins.adapted(tiny_t5(), {"r": 4, "task_type": "SEQ_2_SEQ_LM"})
    batch = ids(2, 6)
    losses = [model(input_ids=batch, labels=batch).loss for model in pair]
    for loss in losses:
        loss.backward()
    twins.assert_close(losses[1], losses[0])
    grads = [{n: p.grad for n, p in model.named_parameters() if p.grad is not None} for model in pair]
    twins.assert_same_tensors(grads[1], grads[0], 2e-6)


def second(op: Op) -> dict:
    """Another rank, scale and bias than the first adapter's."""
    merged = {"target_modules": ["target"], "init_lora_weights": False, "r": op.ranks[-1], "lora_alpha": 3, **op.fields}
    return {**merged, "use_rslora": True}


def two(op: Op) -> twins.Twins:
    first = {"target_modules": ["target"], "init_lora_weights": False, "r": 4, "lora_alpha": 6, **op.fields}
    pair = twins.adapt(op.build(), first)
    twins.add(pair, "other", second(op))
    twins.share_factors(pair)
    return pair


@pytest.mark.parametrize("op", OPS, ids=by_name)
def test_two_adapters_have_peft_names_and_flags(op: Op) -> None:
    pair = two(op)
    for active in (["default"], ["other"], ["default", "other"]):
        for model in pair:
            model.base_model.set_adapter(active)
        twins.assert_same_parameters(pair)
        twins.assert_same_files(pair, "default")
        twins.assert_same_files(pair, "other")


@pytest.mark.parametrize("op", [op for op in OPS if op.peft_exact], ids=by_name)
def test_two_adapters_add_up(op: Op) -> None:
    pair = two(op)
    for active in (["default"], ["other"], ["default", "other"], ["other", "default"]):
        for model in pair:
            model.base_model.set_adapter(active)
        twins.assert_same_run(pair, op.inputs(), 2e-6)


@pytest.mark.parametrize("op", [op for op in OPS if op.peft_exact and op.mergeable], ids=by_name)
@pytest.mark.parametrize("names", [["default"], ["other"], ["default", "other"]], ids="+".join)
def test_two_adapters_merge_alike(op: Op, names: list[str]) -> None:
    pair = two(op)
    theirs, ours = (model.merge_and_unload(adapter_names=names) for model in pair)
    twins.assert_same_tensors(dict(ours.state_dict()), dict(theirs.state_dict()), 2e-6)


def test_adapters_on_different_targets() -> None:
    pair = twins.adapt(tiny_llama(), {"target_modules": ["q_proj"], "r": 4})
    twins.add(pair, "other", {"target_modules": ["v_proj", "q_proj"], "r": 2, "layers_to_transform": [1]})
    twins.add(pair, "third", {"target_modules": ["gate_proj"], "r": 3, "lora_dropout": 0.3})
    twins.share_factors(pair)
    for model in pair:
        model.train()
    for active in (["other"], ["third"], ["default", "third"], ["third", "other", "default"]):
        for model in pair:
            model.base_model.set_adapter(active)
        twins.assert_same_parameters(pair)
        twins.assert_same_run(pair, ids(2, 5), 2e-6, seed=5)
    for name in ("default", "other", "third"):
        twins.assert_same_files(pair, name)


def test_only_one_adapter_may_train_biases() -> None:
    for library in (peft, twins.lorica):
        model = library.get_peft_model(mlp(), library.LoraConfig(target_modules=["lin0"], bias="all"))
        with pytest.raises(ValueError, match="bias"):
            model.add_adapter("other", library.LoraConfig(target_modules=["lin0"], bias="lora_only"))


def test_scales_can_be_changed() -> None:
    """``set_scale``, ``scale_layer`` and ``unscale_layer`` of a live layer."""
    pair = twins.adapted(mlp(), {"target_modules": ["lin0"], "r": 4, "lora_alpha": 6, "use_rslora": True})
    batch = torch.randn(3, 10)
    layers = [model.base_model.model.lin0 for model in pair]
    for change in (
        lambda layer: layer.scale_layer(2.5),
        lambda layer: layer.unscale_layer(2.5),
        lambda layer: layer.set_scale("default", 0.25),
        lambda layer: layer.scale_layer(3.0),
        lambda layer: layer.unscale_layer(),
    ):
        for layer in layers:
            change(layer)
        assert layers[1].scaling["default"] == pytest.approx(layers[0].scaling["default"])
        twins.assert_same_run(pair, batch)
