"""``VLMLoRA`` on families of vision-language models: which part trains, beside which adapters, and rightly."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

import vision
from lorica.adapt.found import lora_layers
from lorica.compat.megatron_bridge import LoRA, VLMLoRA
from lorica.errors import TargetError
from lorica.targets.roles import outermost, role_of
from models import randomise, tiny_llama

PARTS = ("vision_model", "vision_projection", "language_model")
MIXES = list(itertools.product([True, False], repeat=3))
LANGUAGE = {"idefics3": "*text_model*.q_proj", "smolvlm": "*text_model*.q_proj"}

pytestmark = pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad:UserWarning")


def adapted(family: str, frozen: dict[str, bool], **fields: object) -> nn.Module:
    model = vision.make(family)
    targets = [LANGUAGE.get(family, "*language_model*.q_proj")]
    flags = {f"freeze_{part}": value for part, value in frozen.items()}
    return VLMLoRA(**({"target_modules": targets, "dim": 4} | fields | flags))(model)


def gradients(model: nn.Module, family: str) -> dict[str, Tensor]:
    vision.loss(model, vision.FAMILIES[family].batch()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", vision.FAMILIES)
def test_the_parts_are_found(family: str) -> None:
    names = [name for name, _ in vision.make(family).named_parameters()]
    for piece, role in vision.FAMILIES[family].roles.items():
        of_piece = [name for name in names if piece in name]
        of_piece = [name for name in of_piece if role == "vision_projection" or "merger" not in name]
        assert {role_of(name) for name in of_piece} == {role}, piece
    assert {role_of(name) for name in names} == set(PARTS)


@pytest.mark.parametrize("family", vision.FAMILIES)
def test_every_mix_trains_what_it_says_and_nothing_else(family: str) -> None:
    for mix in MIXES:
        frozen = dict(zip(PARTS, mix, strict=True))
        model = adapted(family, frozen)
        assert model.training
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad is ("lora_" in name or not frozen[role_of(name)]), (mix, name)


@pytest.mark.parametrize("family", vision.FAMILIES)
def test_parts_that_train_have_the_gradients_of_the_model_without_adapters(family: str) -> None:
    plain = gradients(vision.make(family), family)  # with B = 0 the adapted model is the base model
    for mix in ((False, True, True), (True, False, False)):
        frozen = dict(zip(PARTS, mix, strict=True))
        found = gradients(adapted(family, frozen).eval(), family)
        assert any("lora_B" in name and bool(grad.any()) for name, grad in found.items())
        base = {name.replace(".base_layer", ""): grad for name, grad in found.items() if "lora_" not in name}
        assert base.keys() == {name for name in plain if not frozen[role_of(name)]}, mix
        for name, grad in base.items():
            torch.testing.assert_close(grad, plain[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_a_weight_that_trains_under_its_adapter_has_the_gradient_of_the_merged_one(family: str) -> None:
    model = adapted(family, dict.fromkeys(PARTS, False)).eval()
    randomise(model)
    found = gradients(model, family)
    merged = adapted(family, dict.fromkeys(PARTS, False)).eval()
    randomise(merged)
    layers = lora_layers(merged)
    with torch.no_grad():
        for layer in layers:
            factors = layer.factors("default")
            layer.base_layer.weight += layer.specs["default"].scaling * factors.b @ factors.a
    LoRA().disable_adapter_layers(merged)
    wanted = gradients(merged, family)
    assert layers
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-6)


def test_adapters_go_wherever_a_name_fits_also_into_the_tower() -> None:
    model = adapted("llava", dict.fromkeys(PARTS, True), target_modules=["q_proj"])
    assert {role_of(layer.target_name) for layer in lora_layers(model)} == {"vision_model", "language_model"}


def test_what_neither_sees_nor_speaks_in_words_stays_frozen() -> None:
    model = vision.make("llava")
    model.model.audio_tower = nn.Linear(4, 4)
    VLMLoRA(target_modules=["*language_model*.q_proj"], **{f"freeze_{part}": False for part in PARTS})(model)
    assert not any(p.requires_grad for p in model.model.audio_tower.parameters())


def test_a_model_that_does_not_see_is_refused() -> None:
    model = tiny_llama()
    with pytest.raises(TargetError, match="no part of it sees"):
        VLMLoRA(target_modules=["q_proj"])(model)
    assert not lora_layers(model)


def test_what_holds_a_part_is_found_as_far_out_as_can_be() -> None:
    beside, inside = vision.make("llava_next"), vision.make("qwen3_vl")
    tower = outermost(beside, {"vision_model"})
    assert tower == (("model.vision_tower",), ())
    assert outermost(beside, {"vision_projection"}) == (("model.multi_modal_projector",), ("model.image_newline",))
    assert outermost(inside, {"vision_model", "vision_projection"}) == (("model.visual",), ())
    assert outermost(inside, {"vision_projection"}).modules == (
        "model.visual.merger",
        "model.visual.deepstack_merger_list.0",
    )
    blocks = [f"model.visual.blocks.{number}" for number in range(2)]
    found = outermost(inside, {"vision_model"})
    assert found == (("model.visual.patch_embed", "model.visual.pos_embed", *blocks), ())
    assert outermost(inside, {"other"}) == ((), ())


def test_not_for_training_everything_is_frozen_and_off_means_off() -> None:
    model = vision.make("llava")
    batch = vision.FAMILIES["llava"].batch()
    before = model(**batch).logits
    method = VLMLoRA(target_modules=["*language_model*.q_proj"], lora_B_init_method="normal", freeze_vision_model=False)
    assert method(model, training=False) is model
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert not torch.equal(model(**batch).logits, before)
    with method.disable_adapter(model):
        assert torch.equal(model(**batch).logits, before)
    assert not torch.equal(model(**batch).logits, before)
