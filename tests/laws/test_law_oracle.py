"""An adapted layer computes ``(W + s·B·A)·x``, and its gradients are that function's."""

from __future__ import annotations

import math

import pytest
import torch
from harness import ALL_OPS, MERGEABLE, adapt, assert_close, batch_of, by_name, dense, grouped

import lorica
from cases import Op
from models import randomise

pytestmark = pytest.mark.filterwarnings("ignore:.*groups.*")

# These embeddings drop or rescale gradients by design, so a difference quotient cannot judge them.
DIFFERENTIATED = [op for op in ALL_OPS if op.name not in ("embedding-padded", "embedding-by-frequency")]


def scale_of(alpha: float, r: int, rslora: bool) -> float:
    return alpha / math.sqrt(r) if rslora else alpha / r


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("op", MERGEABLE, ids=by_name)
def test_the_dense_oracle(op: Op, rslora: bool) -> None:
    base, batch = op.build().double(), batch_of(op, torch.float64)
    for r in op.ranks:
        for lora_bias in (False, True) if op.lora_bias else (False,):
            model = adapt(base, op, r=r, lora_alpha=6, use_rslora=rslora, lora_bias=lora_bias).double()
            expected = dense(base, model, scale_of(6, r, rslora))
            assert_close(model(batch), expected(batch), 1e-12)
            merged = model.merge_and_unload().state_dict()
            for name, tensor in expected.state_dict().items():
                assert_close(merged[name], tensor, 1e-12)


@pytest.mark.parametrize("op", [op for op in ALL_OPS if not op.mergeable], ids=by_name)
def test_the_oracle_of_grouped_convolutions(op: Op) -> None:
    base, batch = op.build().double(), batch_of(op, torch.float64)
    for r in op.ranks:
        model = adapt(base, op, r=r, lora_alpha=6).double()
        assert_close(model(batch), grouped(base, model, 6 / r, batch), 1e-12)


@pytest.mark.parametrize("op", DIFFERENTIATED, ids=by_name)
def test_gradients_are_right(op: Op) -> None:
    """``gradcheck`` with respect to the input and every factor."""
    torch.manual_seed(1)
    model = adapt(op.build().double(), op, r=op.ranks[0], lora_bias=op.lora_bias).double().train()
    factors = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert factors
    batch = batch_of(op, torch.float64)
    inputs = (batch.requires_grad_(),) if op.differentiable_input else ()

    def forward(*tensors: torch.Tensor) -> torch.Tensor:
        values = dict(zip(factors, tensors[len(inputs) :], strict=True))
        return torch.func.functional_call(model, values, tensors[0] if inputs else batch)

    assert torch.autograd.gradcheck(forward, (*inputs, *factors.values()), fast_mode=True)


@pytest.mark.parametrize("op", ALL_OPS, ids=by_name)
def test_every_factor_learns(op: Op) -> None:
    """No factor is left out of the graph, and nothing else gets a gradient."""
    model = adapt(op.build(), op, lora_bias=op.lora_bias).train()
    model(op.inputs()).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name), name
        assert (parameter.grad is not None) == ("lora_" in name), name
        if parameter.grad is not None:
            assert bool(parameter.grad.abs().sum() > 0), name


@pytest.mark.parametrize("op", [op for op in ALL_OPS if not op.name.startswith("attention")], ids=by_name)
def test_two_adapters_add(op: Op) -> None:
    """Two active adapters add the sum of what each adds, in any order (attention is not linear in its delta)."""
    base, batch = op.build().double(), batch_of(op, torch.float64)
    model = adapt(base, op, r=op.ranks[0])
    model.add_adapter("other", op.config(lorica, r=op.ranks[-1], lora_alpha=3))
    model = randomise(model).double().eval()
    outs = {}
    for names in (["default"], ["other"], ["default", "other"], ["other", "default"]):
        model.base_model.set_adapter(names)
        outs["+".join(names)] = model(batch) - base(batch)
    assert_close(outs["default+other"], outs["default"] + outs["other"], 1e-12)
    assert_close(outs["other+default"], outs["default"] + outs["other"], 1e-12)


@pytest.mark.parametrize("op", ALL_OPS, ids=by_name)
def test_autocast(op: Op) -> None:
    """Under bfloat16 autocast the adapted model runs, and stays near its float32 self."""
    model = adapt(op.build(), op)
    expected = model(op.inputs())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(op.inputs())
    assert_close(out, expected, 3e-2)
