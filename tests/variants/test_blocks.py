"""BD-LoRA and QA-LoRA: factors that are kept smaller than the ones they stand for."""

from __future__ import annotations

import pytest
import torch
from layered import LAYERS, adapt, close, dense, layer_of, merged
from torch import Tensor

import lorica
from cases import OPS, Op
from lorica.errors import ConfigError, TargetError
from mixtures import STACKS, moe
from models import randomise, tiny_llama


def blocks(factor: str, count: int) -> dict:
    return {"use_bdlora": {f"target_modules_bd_{factor}": ["target"], "nblocks": count}, "r": 4}


def fits(op: Op, factor: str, count: int) -> bool:
    plain = adapt(op, r=4)
    layer = layer_of(plain)
    factors, roles = layer.factors("default"), {"a": layer.op.roles_a, "b": layer.op.roles_b}[factor]
    size = getattr(factors, factor).shape[roles.index({"a": "in", "b": "out"}[factor])]
    return size % count == 0 and not (factor == "a" and layer.op.lookup)


DIVIDED = [
    pytest.param(op, factor, count, id=f"{op.name}-{factor}-{count}")
    for op in LAYERS
    for factor in "ab"
    for count in (1, 2, 4)
    if fits(op, factor, count)
]


@pytest.mark.parametrize(("op", "factor", "count"), DIVIDED)
def test_a_factor_is_block_diagonal(op: Op, factor: str, count: int) -> None:
    """The delta is that of torch's own block-diagonal matrix."""
    model = randomise(adapt(op, **blocks(factor, count)))
    layer = layer_of(model)
    factors, spec = layer.factors("default"), layer.specs["default"]
    a, b = whole(factors.a, factor == "a", count), whole(factors.b, factor == "b", count)
    delta = spec.scaling * b.flatten(1) @ a.flatten(1)
    close(layer.get_delta_weight("default").flatten(1), delta.T if layer.op.roles_weight[0] == "in" else delta)
    close(model(op.inputs()), dense(op, model)(op.inputs()))
    close(merged(model)(op.inputs()), model(op.inputs()))
    plain = layer_of(adapt(op, r=4)).factors("default")
    assert getattr(factors, factor).numel() * count == getattr(plain, factor).numel()


def whole(kept: Tensor, divided: bool, count: int) -> Tensor:
    """A factor with its zeros; each place in a kernel has a block-diagonal matrix of its own."""
    kept = kept.detach()
    if not divided:
        return kept
    places = [torch.block_diag(*place.chunk(count)) for place in kept.flatten(2).unbind(2)] if kept.dim() > 2 else []
    return (
        torch.stack(places, 2).view(len(kept), -1, *kept.shape[2:]) if places else torch.block_diag(*kept.chunk(count))
    )


def test_targets_in_neither_list_have_plain_lora() -> None:
    fields = {"nblocks": 2, "target_modules_bd_a": ["down_proj"], "match_strict": False}
    config = lorica.LoraConfig(target_modules=["q_proj", "down_proj"], r=4, use_bdlora=fields)
    model = lorica.get_peft_model(tiny_llama(), config)
    shapes = {name: tuple(t.shape) for name, t in lorica.get_peft_model_state_dict(model).items() if "layers.0" in name}
    assert sorted(shapes.values()) == [(4, 12), (4, 16), (16, 4), (16, 4)]
    assert lorica.LoraConfig.from_peft_type(**model.peft_config["default"].to_dict()).use_bdlora == (
        model.peft_config["default"].use_bdlora
    )


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("fields", [blocks("a", 2), blocks("b", 2), {"use_qalora": True, "qalora_group_size": 4}])
def test_on_experts(fields: dict, shared: bool, tmp_path) -> None:
    """The routed forward is that of merged weights, and a file gives the same model back."""
    fields = {"r": 4, **fields}
    if "use_bdlora" in fields:
        fields["use_bdlora"] = {k: ["experts"] if "target" in k else v for k, v in fields["use_bdlora"].items()}
    config = lorica.LoraConfig(target_parameters=STACKS, share_expert_adapters=shared, **fields)
    model = randomise(lorica.get_peft_model(moe(), config))
    ids = torch.arange(24).view(2, 12)
    out = model(ids).logits
    model.save_pretrained(tmp_path)
    close(lorica.PeftModel.from_pretrained(moe(), tmp_path)(ids).logits, out)
    model.merge_adapter()
    close(model(ids).logits, out, 5e-6)


# ---- QA-LoRA --------------------------------------------------------------------------------------------------------

GROUPED = [(op, group) for op in LAYERS for group in (1, 2, 3) if "embedding" not in op.name and "1x1" not in op.name]


@pytest.mark.parametrize(("op", "group"), GROUPED, ids=lambda value: getattr(value, "name", str(value)))
def test_features_of_a_group_share_a_column(op: Op, group: int) -> None:
    fields = {"use_qalora": True, "qalora_group_size": group, "r": 3}
    plain = layer_of(adapt(op, r=3)).factors("default").a
    if plain.shape[1] % group:
        with pytest.raises(TargetError, match=rf"target.*\({plain.shape[1]}\).*qalora_group_size.*\({group}\)"):
            adapt(op, **fields)
        return
    model = randomise(adapt(op, **fields))
    layer = layer_of(model)
    factors, spec = layer.factors("default"), layer.specs["default"]
    assert factors.a.shape[1] * group == plain.shape[1]
    pool = torch.zeros(factors.a.shape[1], plain.shape[1])  # the mean of each group, times the number of groups
    for column in range(plain.shape[1]):
        pool[column // group, column] = factors.a.shape[1] / group
    a = torch.einsum("rg...,gi->ri...", factors.a.detach(), pool)
    delta = spec.scaling * factors.b.detach().flatten(1) @ a.flatten(1)
    close(layer.get_delta_weight("default").flatten(1), delta.T if layer.op.roles_weight[0] == "in" else delta)
    close(model(op.inputs()), dense(op, model)(op.inputs()))
    close(merged(model)(op.inputs()), model(op.inputs()))


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("embedding", {"use_qalora": True}, "use_qalora"),
        ("embedding", blocks("a", 2), "target_modules_bd_a"),
        ("conv2d-grouped", blocks("b", 2), "use_bdlora"),
        ("linear", blocks("a", 5), "nblocks=5"),
        ("linear", {**blocks("b", 2), "r": 3}, "nblocks=2 needs r=3"),
    ],
)
def test_layers_that_cannot_have_them(name: str, fields: dict, message: str) -> None:
    op = next(op for op in OPS if op.name == name)
    base = op.build()
    with pytest.raises(TargetError, match=f"target.*{message}"):
        lorica.get_peft_model(base, op.config(lorica, **fields))
    assert type(base.target) is type(op.build().target)


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("fields", [blocks("a", 2), {"use_qalora": True, "qalora_group_size": 2}])
def test_starts_that_need_plain_factors(fields: dict, init: str) -> None:
    op = OPS[0]
    base = op.build()
    with pytest.raises(ConfigError, match="target"):
        lorica.get_peft_model(base, op.config(lorica, **{"r": 4, **fields, "init_lora_weights": init}))
    assert torch.equal(base.target.weight, op.build().target.weight)
