"""Off means off: a disabled adapter, or one with B = 0, leaves the base model's output bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
from harness import ALL_OPS, adapt, batch_of, by_name, zero_b
from torch import nn

import lorica
from cases import OPS, Op
from models import ids, mlp, randomise, tiny_gpt2, tiny_llama, tiny_t5

pytestmark = pytest.mark.filterwarnings("ignore:.*groups.*")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BATCH = torch.linspace(-1, 1, 30).view(3, 10)


def frozen(op: Op, dtype: torch.dtype) -> nn.Module:
    """The base model; frozen, so that torch chooses the same kernels for it as inside an adapted model."""
    return op.build().to(dtype).requires_grad_(False)


def train_a_little(model: nn.Module, batch: torch.Tensor) -> None:
    """Two steps that move every factor."""
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimiser.zero_grad()
        model(batch).float().square().mean().backward()
        optimiser.step()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ALL_OPS, ids=by_name)
def test_disabled_is_the_base_before_and_after_training(op: Op, dtype: torch.dtype) -> None:
    base, batch = frozen(op, dtype), batch_of(op, dtype)
    expected = base(batch)
    model = adapt(base, op)
    with model.disable_adapter():
        assert torch.equal(model(batch), expected)
    train_a_little(model, batch)
    assert not torch.equal(model(batch), expected)
    with model.disable_adapter():
        assert torch.equal(model(batch), expected)
    model.base_model.disable_adapter_layers()
    assert torch.equal(model(batch), expected)
    model.base_model.enable_adapter_layers()
    assert not torch.equal(model(batch), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ALL_OPS, ids=by_name)
def test_zero_b_is_the_base(op: Op, dtype: torch.dtype) -> None:
    """In training mode, where attention has one kernel whether or not anything wants a gradient."""
    base, batch = frozen(op, dtype).train(), batch_of(op, dtype)
    for autocast in (True, False):
        model = lorica.get_peft_model(copy.deepcopy(base), op.config(lorica), autocast_adapter_dtype=autocast)
        out = zero_b(randomise(model)).train()(batch)
        assert out.dtype == dtype
        assert torch.equal(out, base(batch))


@pytest.mark.parametrize("init", [True, "gaussian", "xavier", "kaiming", "normal"])
@pytest.mark.parametrize("op", OPS, ids=by_name)
def test_a_new_adapter_changes_nothing(op: Op, init: object) -> None:
    base, batch = frozen(op, torch.float32).train(), op.inputs()
    model = adapt(base, op, init_lora_weights=init).train()
    assert torch.equal(model(batch), base(batch))


@pytest.mark.parametrize("op", [op for op in OPS if op.dropout], ids=by_name)
def test_the_base_path_sees_no_dropout(op: Op) -> None:
    base, batch = frozen(op, torch.float32).train(), op.inputs()
    for position in ("pre", "post"):
        model = zero_b(adapt(base, op, lora_dropout=0.5, dropout_position=position)).train()
        assert torch.equal(model(batch), base(batch))


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_whole_models(build) -> None:
    base = build().requires_grad_(False)
    expected = base(ids(2, 6)).logits
    config = lorica.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", fan_in_fan_out=build is tiny_gpt2)
    model = lorica.get_peft_model(copy.deepcopy(base), config).eval()
    assert torch.equal(model(ids(2, 6)).logits, expected)
    randomise(model)
    assert not torch.equal(model(ids(2, 6)).logits, expected)
    with model.disable_adapter():
        assert torch.equal(model(ids(2, 6)).logits, expected)


def test_encoder_decoder() -> None:
    base = tiny_t5().requires_grad_(False)  # a mask that wants a gradient has another attention kernel
    batch = {"input_ids": ids(2, 5), "decoder_input_ids": ids(2, 4)}
    config = lorica.LoraConfig(task_type="SEQ_2_SEQ_LM")
    model = lorica.get_peft_model(copy.deepcopy(base), config).eval()
    assert torch.equal(model(**batch).logits, base(**batch).logits)


def test_disabling_restores_saved_modules_too() -> None:
    base = mlp()
    config = lorica.LoraConfig(target_modules=["lin0"], modules_to_save=["head"])
    model = lorica.get_peft_model(copy.deepcopy(base), config).eval()
    train_a_little(model, BATCH)
    assert not torch.equal(model(BATCH), base(BATCH))
    with model.disable_adapter():
        assert torch.equal(model(BATCH), base(BATCH))


def test_disabling_ends_when_an_error_is_raised() -> None:
    model = randomise(lorica.get_peft_model(mlp(), lorica.LoraConfig(target_modules=["lin0"]))).eval()
    expected = model(BATCH)
    with pytest.raises(RuntimeError, match="on purpose"), model.disable_adapter():
        raise RuntimeError("on purpose")
    assert torch.equal(model(BATCH), expected)


def test_disabling_may_be_nested() -> None:
    base = mlp()
    model = randomise(lorica.get_peft_model(copy.deepcopy(base), lorica.LoraConfig(target_modules=["lin0"]))).eval()
    with model.disable_adapter():
        with model.disable_adapter():
            assert torch.equal(model(BATCH), base(BATCH))
        assert torch.equal(model(BATCH), base(BATCH))
    assert not torch.equal(model(BATCH), base(BATCH))


@pytest.mark.parametrize("op", ALL_OPS, ids=by_name)
def test_unloading_gives_the_base_back(op: Op) -> None:
    base, batch = frozen(op, torch.float32), op.inputs()
    unloaded = adapt(base, op).unload()
    assert torch.equal(unloaded(batch), base(batch))
    assert [type(m) for m in unloaded.modules()] == [type(m) for m in base.modules()]
    assert list(unloaded.state_dict()) == list(base.state_dict())
