"""MiCA: B is the base weight's minor directions and stays, A starts as zero and learns."""

from __future__ import annotations

import pytest
import torch
from layered import LAYERS, adapt, by_name, close, layer_of, merged

import lorica
from cases import OPS, Op
from lorica.errors import ConfigError
from mixtures import STACKS, moe
from models import randomise

MICA = {"init_lora_weights": "mica", "r": 3}


@pytest.mark.parametrize("op", LAYERS, ids=by_name)
def test_b_is_the_minor_directions(op: Op) -> None:
    model = adapt(op, **MICA)
    layer = layer_of(model)
    factors = layer.factors("default")
    weight = layer.op.logical_weight(layer.get_base_layer()).flatten(1).double()
    weight = weight.T if layer.op.lookup else weight
    s = torch.linalg.svdvals(weight)
    b = factors.b.detach().flatten(1).double()
    close(b.T @ b, torch.eye(3, dtype=torch.float64), 1e-5)
    close((weight.T @ b).norm(), s[-3:].norm(), 1e-5)  # nothing else that is orthogonal takes less of the weight
    assert not factors.a.any()


@pytest.mark.parametrize("op", LAYERS, ids=by_name)
def test_a_alone_trains(op: Op) -> None:
    model = adapt(op, **MICA)
    out, base = model(op.inputs()), op.build()(op.inputs())
    assert torch.equal(out, base)
    before = layer_of(model).factors("default").b.clone()
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(op.inputs()).square().sum().backward()
    optimiser.step()
    assert torch.equal(layer_of(model).factors("default").b, before)
    assert layer_of(model).factors("default").b.grad is None
    assert not torch.equal(model(op.inputs()), base)
    close(merged(model)(op.inputs()), model(op.inputs()))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all("_A" in name for name in trained)


def test_b_stays_frozen_whatever_is_switched() -> None:
    op = OPS[0]
    model = adapt(op, **MICA)
    model.add_adapter("plain", op.config(lorica, r=2))
    for name, trains in (("plain", 2), ("default", 1), ("plain", 2)):
        model.set_adapter(name)
        assert sum(p.requires_grad for p in model.parameters()) == trains
    model.set_requires_grad("default", True)
    assert not layer_of(model).factors("default").b.requires_grad
    with model.disable_adapter():
        pass
    assert not layer_of(model).factors("default").b.requires_grad


def test_a_file_goes_on_training_a_alone(tmp_path) -> None:
    op = OPS[0]
    model = randomise(adapt(op, **MICA))
    model.save_pretrained(tmp_path)
    loaded = lorica.PeftModel.from_pretrained(op.build(), tmp_path, is_trainable=True)
    assert torch.equal(loaded(op.inputs()), model(op.inputs()))
    assert [p.requires_grad for n, p in loaded.named_parameters() if "lora_" in n] == [True, False]


def test_every_expert_has_its_own() -> None:
    model = lorica.get_peft_model(moe(), lorica.LoraConfig(target_parameters=STACKS, **MICA))
    for layer in (m for m in model.modules() if isinstance(m, lorica.layers.LoraLayer)):
        for weight, b in zip(layer.op.orient(layer.base_weight), layer.factors("default").b, strict=True):
            close((weight.T @ b).norm(), torch.linalg.svdvals(weight)[-3:].norm(), 1e-4)


@pytest.mark.parametrize("r", [11, 40])
def test_ranks_above_a_side_are_refused(r: int) -> None:
    op = OPS[0]
    base = op.build()
    with pytest.raises(ConfigError, match=rf"target.*r={r}"):
        lorica.get_peft_model(base, op.config(lorica, init_lora_weights="mica", r=r))
    assert type(base.target) is torch.nn.Linear


def test_sixteen_bits_and_float64() -> None:
    for dtype in (torch.bfloat16, torch.float64):
        base = OPS[0].build().to(dtype)
        wide = torch.promote_types(dtype, torch.float32)
        u = torch.linalg.svd(base.target.weight.detach().to(wide), full_matrices=False).U
        model = lorica.get_peft_model(base, OPS[0].config(lorica, **MICA))
        assert torch.equal(layer_of(model).factors("default").b, u[:, -3:])
