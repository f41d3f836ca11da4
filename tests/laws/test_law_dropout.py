"""Dropout keeps the mean, drops the fraction it says, where it says, and only in training."""

from __future__ import annotations

import pytest
import torch
from harness import adapt, by_name
from torch import Tensor, nn

import lorica
from cases import OPS, Op
from models import mlp, tiny_llama

DROPPING = [op for op in OPS if op.dropout]
WIDTH = 64


def identity_adapter(position: str, p: float) -> nn.Module:
    """An adapter on a zero weight whose delta is the identity: what comes out is what dropout let through."""
    model = nn.ModuleDict({"target": nn.Linear(WIDTH, WIDTH, bias=False)})
    nn.init.zeros_(model["target"].weight)
    config = lorica.LoraConfig(
        target_modules=["target"], r=WIDTH, lora_alpha=WIDTH, lora_dropout=p, dropout_position=position
    )
    layer = lorica.get_peft_model(model, config).base_model.model["target"]
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(torch.eye(WIDTH))
        layer.lora_B["default"].weight.copy_(torch.eye(WIDTH))
    return layer.train()


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
@pytest.mark.parametrize("position", ["pre", "post"])
def test_fraction_and_mean(position: str, p: float) -> None:
    out = identity_adapter(position, p)(torch.ones(500, WIDTH))
    n = out.numel()
    dropped = (out == 0).float().mean().item()
    assert dropped == pytest.approx(p, abs=4 * (p * (1 - p) / n) ** 0.5)
    assert out.mean().item() == pytest.approx(1, abs=4 * (p / (1 - p) / n) ** 0.5)
    kept = out[out != 0]
    assert torch.allclose(kept, torch.full_like(kept, 1 / (1 - p)))


@pytest.mark.parametrize("position", ["pre", "post"])
def test_where_it_drops(position: str) -> None:
    """A of one row of ones and B of one column of ones: before the factors every output feature sees one mask."""
    torch.manual_seed(0)
    layer = identity_adapter(position, 0.5)
    with torch.no_grad():
        layer.lora_A["default"].weight.fill_(1 / WIDTH)
        layer.lora_B["default"].weight.fill_(1 / WIDTH)
    out = layer(torch.ones(50, WIDTH))
    features_agree = bool(torch.isclose(out, out[:, :1].expand_as(out)).all())
    assert features_agree == (position == "pre")
    assert bool((out == 0).any()) == (position == "post")


def test_the_scale_acts_outside() -> None:
    layer = identity_adapter("post", 0.5)
    layer.set_scale("default", 3.0)
    assert set(layer(torch.ones(10, WIDTH)).unique().tolist()) <= {0.0, 6.0}


@pytest.mark.parametrize("position", ["pre", "post"])
@pytest.mark.parametrize("op", DROPPING, ids=by_name)
@pytest.mark.filterwarnings("ignore:.*groups.*")
def test_none_in_evaluation(op: Op, position: str) -> None:
    base = op.build()
    plain, dropping = (adapt(base, op, lora_dropout=p, dropout_position=position) for p in (0.0, 0.5))
    assert torch.equal(plain(op.inputs()), dropping(op.inputs()))
    dropping.train()
    assert not torch.equal(plain(op.inputs()), dropping(op.inputs()))


@pytest.mark.parametrize("position", ["pre", "post"])
@pytest.mark.parametrize("op", DROPPING, ids=by_name)
@pytest.mark.filterwarnings("ignore:.*groups.*")
def test_the_mean_over_masks_is_the_output_without(op: Op, position: str) -> None:
    base = op.build()
    model = adapt(base, op, lora_dropout=0.3, dropout_position=position)
    batch = op.inputs()
    expected = model(batch)
    model.train()
    with torch.no_grad():
        draws = torch.stack([model(batch) for _ in range(600)])
    spread = draws.std(0) / 600**0.5
    assert bool(((draws.mean(0) - expected).abs() <= 5 * spread + 1e-5).all())


def test_the_seed_governs_it() -> None:
    config = lorica.LoraConfig(target_modules=["lin0"], lora_dropout=0.5, init_lora_weights=False)
    model = lorica.get_peft_model(mlp(), config).train()
    outs: list[Tensor] = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(model(torch.ones(4, 10)))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


def test_each_adapter_has_its_own_probability() -> None:
    model = lorica.get_peft_model(
        mlp(), lorica.LoraConfig(target_modules=["lin0"], lora_dropout=0.5, init_lora_weights=False)
    ).train()
    model.add_adapter("plain", lorica.LoraConfig(target_modules=["lin0"], init_lora_weights=False))
    x = torch.ones(4, 10)
    assert not torch.equal(model(x), model(x))
    model.set_adapter("plain")
    assert torch.equal(model(x), model(x))


def test_a_merged_adapter_drops_nothing() -> None:
    config = lorica.LoraConfig(target_modules=["q_proj"], lora_dropout=0.5, init_lora_weights=False)
    model = lorica.get_peft_model(tiny_llama(), config).train()
    model.merge_adapter()
    batch = torch.tensor([[1, 2, 3]])
    assert torch.equal(model(batch).logits, model(batch).logits)
