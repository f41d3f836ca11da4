"""KaSA on every layer: what is left of the base weight, what is learned, and what does not come back."""

from __future__ import annotations

import pytest
import torch
from layered import LAYERS, adapt, by_name, close, dense, layer_of, merged

import lorica
from cases import OPS, Op
from lorica.errors import ConfigError, TargetError
from mixtures import STACKS, moe
from models import randomise, tiny_llama

KASA = {"kasa_config": {}, "r": 2}


def matrix(weight: torch.Tensor) -> torch.Tensor:
    return weight.detach().flatten(1)


@pytest.mark.parametrize("op", LAYERS, ids=by_name)
def test_the_smallest_directions_are_gone_and_the_others_are_as_they_were(op: Op) -> None:
    model = adapt(op, **KASA)
    layer = layer_of(model)
    before = matrix(getattr(op.build().target, layer.op.weight_name))
    after = matrix(getattr(layer.get_base_layer(), layer.op.weight_name))
    u, s, v = torch.linalg.svd(before.double(), full_matrices=False)
    close(after, ((u[:, :-2] * s[:-2]) @ v[:-2]).float())
    assert float((after - before).norm()) == pytest.approx(float(s[-2:].norm()), rel=1e-4)


@pytest.mark.parametrize("op", LAYERS, ids=by_name)
def test_the_delta_is_b_times_d_times_a(op: Op) -> None:
    model = randomise(adapt(op, **KASA))
    layer = layer_of(model)
    factors, spec = layer.factors("default"), layer.specs["default"]
    a, b, d = factors.a.flatten(1), factors.b.flatten(1), factors.extras["lora_diag"]
    delta = spec.scaling * (b * d) @ a
    expected = delta.T if layer.op.roles_weight[0] == "in" else delta
    close(layer.get_delta_weight("default").flatten(1), expected)
    close(model(op.inputs()), dense(op, model)(op.inputs()))
    close(merged(model)(op.inputs()), model(op.inputs()))


@pytest.mark.parametrize("op", LAYERS, ids=by_name)
def test_it_starts_as_what_is_left_and_stays_so_when_it_is_gone(op: Op) -> None:
    model = adapt(op, **KASA, init_lora_weights=True)
    layer = layer_of(model)
    out = model(op.inputs())
    with model.disable_adapter():
        assert torch.equal(model(op.inputs()), out)
    left = getattr(layer.get_base_layer(), layer.op.weight_name).clone()
    randomise(model)
    assert not torch.equal(model(op.inputs()), out)
    model.merge_adapter()
    model.unmerge_adapter()
    close(getattr(layer.get_base_layer(), layer.op.weight_name), left)
    model.delete_adapter("default")
    close(getattr(model.base_model.model.target, layer.op.weight_name), left)


@pytest.mark.parametrize("shared", [False, True])
def test_every_expert_loses_its_own(shared: bool) -> None:
    base = moe()
    config = lorica.LoraConfig(target_parameters=STACKS, share_expert_adapters=shared, **KASA)
    before = {name: p.clone() for name, p in base.named_parameters()}
    model = lorica.get_peft_model(base, config)
    for layer in (m for m in model.modules() if isinstance(m, lorica.layers.LoraLayer)):
        for old, new in zip(before[layer.target_name], layer.base_weight, strict=True):
            s, t = torch.linalg.svdvals(old), torch.linalg.svdvals(new)
            close(t[:-2], s[:-2])
            assert float(t[-2:].max()) < 1e-5


def test_several_of_them_and_one_deleted() -> None:
    op = OPS[0]
    model = randomise(adapt(op, **KASA))
    out = model(op.inputs())
    model.add_adapter("second", op.config(lorica, **KASA))  # there is nothing left to lose: the same rank
    close(model(op.inputs()), out, 1e-5)
    model.delete_adapter("second")
    assert not any("second" in name for name, _ in model.named_parameters())
    assert any("lora_diag.default" in name for name, _ in model.named_parameters())


def test_sixteen_bit_weights_are_rounded_once() -> None:
    op = OPS[0]
    base = op.build().bfloat16()
    u, s, v = torch.linalg.svd(base.target.weight.double(), full_matrices=False)
    expected = ((u[:, :-2] * s[:-2]) @ v[:-2]).bfloat16()
    model = lorica.get_peft_model(base, op.config(lorica, **KASA))
    assert torch.equal(layer_of(model).get_base_layer().weight, expected)


@pytest.mark.parametrize(
    ("op", "fields", "error"),
    [
        (next(op for op in OPS if op.name == "conv2d-grouped"), {"r": 4}, TargetError),
        (OPS[0], {"r": 10}, ConfigError),
        (next(op for op in OPS if op.name == "embedding"), {"r": 9}, ConfigError),
    ],
)
def test_layers_that_cannot_lose_so_much(op: Op, fields: dict, error: type[Exception]) -> None:
    base = op.build()
    before = {key: value.clone() for key, value in base.state_dict().items()}
    with pytest.raises(error, match="target"):
        lorica.get_peft_model(base, op.config(lorica, **{**KASA, **fields}))
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())


def test_a_weight_that_another_layer_shares_is_refused() -> None:
    config = lorica.LoraConfig(target_modules=["lm_head"], **KASA)
    with (
        pytest.warns(UserWarning, match="tie_word_embeddings"),
        pytest.raises(TargetError, match=r"lm_head: kasa_config changes the base weight"),
    ):
        lorica.get_peft_model(tiny_llama(tied=True), config)


def test_two_starts_that_change_the_base_weight() -> None:
    with pytest.raises(ConfigError, match=r"pissa.*kasa_config"):
        lorica.LoraConfig(init_lora_weights="pissa", kasa_config={})


def test_merged_adapters_are_in_the_way() -> None:
    op = OPS[0]
    model = adapt(op, **KASA)
    model.merge_adapter()
    with pytest.raises(lorica.errors.AdapterError, match=r"target: kasa_config changes the base weight"):
        model.add_adapter("second", op.config(lorica, **KASA))


def test_a_state_dict_goes_into_another_model() -> None:
    op = OPS[0]
    model = randomise(adapt(op, **KASA))
    other = adapt(op, **KASA)
    lorica.set_peft_model_state_dict(other, lorica.get_peft_model_state_dict(model))
    assert torch.equal(other(op.inputs()), model(op.inputs()))


def test_plain_lora_on_the_whole_weight_is_another_model() -> None:
    with pytest.raises(TypeError, match=r"kasa_config: it took a part of the base weights"):
        lorica.convert_to_lora(randomise(adapt(OPS[0], **KASA)), 4)
