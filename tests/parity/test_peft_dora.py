"""DoRA computes what PEFT's does: outputs, gradients, files, merged weights."""

from __future__ import annotations

import copy

import pytest
import torch
import twins
from torch import Tensor, nn
from twins import peft

import lorica
from cases import OPS, Op
from lorica import kernels
from models import tiny_llama

DORA = [op for op in OPS if op.mergeable and op.peft_exact]


def by_name(op: Op) -> str:
    return op.name


def fields(op: Op, **more: object) -> dict:
    return {
        "target_modules": ["target"],
        "init_lora_weights": False,
        "lora_alpha": 6,
        "r": 4,
        "use_dora": True,
        **op.fields,
        **more,
    }


@pytest.mark.parametrize("op", DORA, ids=by_name)
def test_the_magnitudes_start_as_the_norms(op: Op) -> None:
    pair = twins.adapt(op.build(), fields(op))
    with twins.quiet():
        tensors = peft.get_peft_model_state_dict(pair[0])
    lorica.set_peft_model_state_dict(pair[1], {name: t for name, t in tensors.items() if "magnitude" not in name})
    again = copy.deepcopy(pair[1])
    twins.assert_same_parameters(pair)
    layer = again.base_model.model.target
    variant = lorica.variants.VARIANTS["use_dora"]
    (start,) = variant.start(layer, layer.factors("default"), layer.specs["default"], 0).values()
    name = "base_model.model.target.lora_magnitude_vector"
    twins.assert_close(start.view(tensors[name].shape), tensors[name])


@pytest.mark.parametrize("op", DORA, ids=by_name)
def test_outputs_gradients_and_files_are_equal(op: Op) -> None:
    for rslora, bias in ((False, "none"), (True, "all")):
        pair = twins.adapted(op.build(), fields(op, use_rslora=rslora, bias=bias))
        twins.assert_same_run(pair, op.inputs(), 2e-6)
        twins.assert_same_files(pair)


def undropped(model: nn.Module, seed: int, p: float) -> None:
    """Have PEFT's layer multiply the base product that is there, and not a second one of the dropped input."""
    layer = model.base_model.model.target

    def correct(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        magnitude, base = layer.lora_magnitude_vector["default"].weight, layer.get_base_layer()
        adapted = (base.weight + layer.get_delta_weight("default")).detach()
        rows = adapted.T if getattr(layer, "fan_in_fan_out", False) else adapted.flatten(1)
        gain = magnitude / rows.norm(dim=1).view(magnitude.shape)
        torch.manual_seed(seed)  # the mask that the layer has just drawn
        return out + (gain - 1) * (base(args[0]) - base(nn.functional.dropout(args[0], p)))

    layer.register_forward_hook(correct)


@pytest.mark.parametrize("op", [op for op in DORA if op.dropout], ids=by_name)
def test_with_dropout_the_base_product_sees_the_whole_input(op: Op) -> None:
    """That is all in which the two differ, outputs and gradients."""
    pair = twins.adapted(op.build(), fields(op, lora_dropout=0.4))
    for model in pair:
        model.train()
    undropped(pair[0], seed=11, p=0.4)
    with kernels.using("plain"):  # which draws its masks as PEFT does
        twins.assert_same_run(pair, op.inputs(), 2e-6, seed=11)


@pytest.mark.parametrize("op", DORA, ids=by_name)
def test_training_steps_are_equal(op: Op) -> None:
    """Norms follow the factors from step to step."""
    pair = twins.adapted(op.build(), fields(op))
    for model in pair:
        optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
        for _ in range(3):
            twins.run(model, op.inputs())
            optimiser.step()
    trained = [dict(model.named_parameters()) for model in pair]
    twins.assert_same_tensors(trained[1], trained[0], 1e-5)
    twins.assert_same_run(pair, op.inputs(), 1e-5)


@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("op", DORA, ids=by_name)
def test_merged_weights_are_equal(op: Op, safe_merge: bool) -> None:
    pair = twins.adapted(op.build(), fields(op))
    before = copy.deepcopy(pair[1].base_model.model.target.get_base_layer().weight)
    out = pair[1](op.inputs())
    with twins.quiet():
        pair[0].merge_adapter(safe_merge=safe_merge)
    pair[1].merge_adapter(safe_merge=safe_merge)
    merged = [model.base_model.model.target.get_base_layer().weight for model in pair]
    twins.assert_close(merged[1], merged[0], 1e-6)
    twins.assert_close(pair[1](op.inputs()), out, 2e-6)
    pair[1].unmerge_adapter()
    twins.assert_close(merged[1], before, 1e-6)
    twins.assert_close(pair[1](op.inputs()), out, 1e-6)


@pytest.mark.parametrize("op", DORA, ids=by_name)
def test_several_adapters_one_after_the_other(op: Op) -> None:
    pair = twins.adapt(op.build(), fields(op))
    twins.add(pair, "second", fields(op, r=8, lora_alpha=3))
    twins.add(pair, "plain", fields(op, use_dora=False))
    twins.share_factors(pair)
    for model in pair:
        model.base_model.set_adapter(["default", "plain", "second"])
    twins.assert_same_run(pair, op.inputs(), 5e-6)
    out = pair[1](op.inputs())
    with twins.quiet():
        pair[0].merge_adapter(["default"])
        pair[0].merge_adapter(["plain", "second"])
    pair[1].merge_adapter(["default"])
    twins.assert_close(pair[1](op.inputs()), out, 5e-6)  # one merged, two not
    pair[1].merge_adapter(["plain", "second"])
    merged = [model.base_model.model.target.get_base_layer().weight for model in pair]
    twins.assert_close(merged[1], merged[0], 5e-6)
    twins.assert_close(pair[1](op.inputs()), out, 5e-6)
    pair[1].unmerge_adapter()
    twins.assert_close(pair[1](op.inputs()), out, 5e-6)


@pytest.mark.parametrize("autocast", [False, True])
def test_sixteen_bit_base_weights(autocast: bool) -> None:
    op = DORA[0]
    pair = twins.adapted(op.build().bfloat16(), fields(op), autocast_adapter_dtype=autocast)
    twins.assert_same_parameters(pair)
    with torch.no_grad():
        for model in pair:  # magnitudes near the norms, as training leaves them
            weight = model.base_model.model.target.get_base_layer().weight.float()
            layer = model.base_model.model.target
            a, b = (getattr(layer, name)["default"].weight.float() for name in ("lora_A", "lora_B"))
            norm = (weight + layer.scaling["default"] * b @ a).norm(dim=1)
            factor = torch.linspace(0.9, 1.1, len(norm))
            layer.lora_magnitude_vector["default"].weight.copy_(norm * factor)
    outs = [twins.run(model, op.inputs().bfloat16())[0] for model in pair]
    assert outs[1].dtype == outs[0].dtype == torch.bfloat16
    twins.assert_close(outs[1], outs[0], 1e-2)


@pytest.mark.parametrize("direction", ["theirs to ours", "ours to theirs"])
def test_files_go_both_ways(direction: str, tmp_path) -> None:
    config = {"target_modules": ["q_proj", "down_proj", "embed_tokens"], "r": 4, "use_dora": True}
    pair = twins.adapted(tiny_llama(), config, autocast_adapter_dtype=False)
    batch = torch.arange(12).view(2, 6)
    source, reader = (pair[0], lorica) if direction == "theirs to ours" else (pair[1], peft)
    with twins.quiet():
        source.save_pretrained(tmp_path)
        loaded = reader.PeftModel.from_pretrained(tiny_llama(), tmp_path)
        twins.assert_close(loaded(batch).logits, source.eval()(batch).logits, 2e-6)


@pytest.mark.parametrize(
    "change",
    [{"lora_bias": True}, {"use_dora": "yes"}],
    ids=str,
)
def test_contradictions_are_refused(change: dict) -> None:
    with pytest.raises(ValueError, match=r"dora|DoRA"):
        lorica.LoraConfig(**{"use_dora": True, **change})
