"""Merging adds the delta once, unmerging takes it back, and neither changes what the model computes."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from harness import MERGEABLE, adapt, assert_close, assert_unchanged, base_tensors, batch_of, by_name, dense, state_of
from torch import Tensor, nn

import lorica
from cases import OPS, Op
from models import ids, mlp, randomise, tiny_llama

BATCH = torch.linspace(-1, 1, 30).view(3, 10)


def ulp(x: Tensor) -> Tensor:
    """The distance to the next float32 away from zero."""
    x = x.abs()
    return torch.nextafter(x, torch.full_like(x, torch.inf)) - x


@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("op", MERGEABLE, ids=by_name)
def test_merge_and_unmerge_give_the_weight_back(op: Op, safe_merge: bool) -> None:
    base = op.build()
    for lora_bias in (False, True) if op.lora_bias else (False,):
        model = adapt(base, op, lora_bias=lora_bias)
        before = base_tensors(model)
        model.merge_adapter(safe_merge=safe_merge)
        merged = base_tensors(model)
        assert not all(torch.equal(before[name], merged[name]) for name in before)
        model.unmerge_adapter()
        for name, tensor in base_tensors(model).items():
            bound = 2 * ulp(torch.maximum(before[name].abs(), merged[name].abs()))
            assert bool(((tensor - before[name]).abs() <= bound).all()), name


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=str)
@pytest.mark.parametrize("op", MERGEABLE, ids=by_name)
def test_merged_computes_the_same(op: Op, dtype: torch.dtype, tolerance: float) -> None:
    base, batch = op.build().to(dtype), batch_of(op, dtype)
    model = adapt(base, op).to(dtype)
    adapted = model(batch)
    model.merge_adapter()
    assert_close(model(batch), adapted, tolerance)
    model.unmerge_adapter()
    assert_close(model(batch), adapted, tolerance)
    merged = model.merge_and_unload()
    assert_close(merged(batch), adapted, tolerance)
    assert [type(m) for m in merged.modules()] == [type(m) for m in base.modules()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", MERGEABLE, ids=by_name)
def test_low_precision_is_rounded_once(op: Op, dtype: torch.dtype) -> None:
    """Factors on a coarse grid make the delta exact, so the merged weight is one rounding of ``W + ΔW``."""
    base = op.build().to(dtype)
    for autocast in (True, False):
        model = lorica.get_peft_model(
            copy.deepcopy(base), op.config(lorica, lora_alpha=2), autocast_adapter_dtype=autocast
        )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randint(-7, 8, parameter.shape) / 16)
        expected = dense(copy.deepcopy(base).float(), model, 0.5).state_dict()
        merged = model.merge_and_unload().state_dict()
        for name, tensor in expected.items():
            assert torch.equal(merged[name], tensor.to(dtype)), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", [op for op in OPS if op.mergeable], ids=by_name)
def test_low_precision_comes_back_exactly_or_says_that_it_does_not(op: Op, dtype: torch.dtype) -> None:
    model = adapt(op.build().to(dtype), op)
    before = base_tensors(model)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model.merge_adapter()
        model.unmerge_adapter()
    restored = all(torch.equal(before[name], tensor) for name, tensor in base_tensors(model).items())
    assert restored or any("unmerge" in str(w.message).lower() for w in said)


def test_merging_one_of_two_keeps_the_other() -> None:
    for op in (op for op in OPS if op.mergeable):
        model = adapt(op.build(), op)
        model.add_adapter("other", op.config(lorica, r=2))
        randomise(model)
        model.base_model.set_adapter(["default", "other"])
        expected = model(op.inputs())
        for name in ("default", "other"):
            model.merge_adapter(adapter_names=[name])
            assert_close(model(op.inputs()), expected, 1e-5)
            model.unmerge_adapter()
            assert_close(model(op.inputs()), expected, 1e-5)


def test_merging_twice_adds_once() -> None:
    model = adapt(OPS[0].build(), OPS[0])
    model.merge_adapter()
    once = base_tensors(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.merge_adapter()
    assert all(torch.equal(once[name], tensor) for name, tensor in base_tensors(model).items())


def test_unmerging_what_is_not_merged_changes_nothing() -> None:
    model = adapt(OPS[0].build(), OPS[0])
    before = state_of(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.unmerge_adapter()
    assert_unchanged(model, before)


@pytest.mark.parametrize("op", [op for op in OPS if op.mergeable], ids=by_name)
def test_safe_merge_refuses_what_is_not_finite(op: Op) -> None:
    model = adapt(op.build(), op)
    factor = next(p for name, p in model.named_parameters() if "lora_" in name and "B" in name)
    with torch.no_grad():
        factor.view(-1)[0] = torch.nan
    before = base_tensors(model)
    with pytest.raises(ValueError, match=r"(?i)nan|finite"):
        model.merge_adapter(safe_merge=True)
    assert all(torch.equal(before[name], tensor) for name, tensor in base_tensors(model).items())


def test_disabling_undoes_a_merge_for_a_while() -> None:
    base = mlp()
    config = lorica.LoraConfig(target_modules=["lin0"], init_lora_weights=False)
    model = lorica.get_peft_model(copy.deepcopy(base), config).eval()
    expected = model(BATCH)
    model.merge_adapter()
    with model.disable_adapter():
        assert_close(model(BATCH), base(BATCH), 1e-6)
    assert_close(model(BATCH), expected, 1e-5)


def test_deleting_a_merged_adapter_does_not_leave_its_delta_behind() -> None:
    base = mlp()
    model = lorica.get_peft_model(copy.deepcopy(base), lorica.LoraConfig(target_modules=["lin0"]))
    model.add_adapter("other", lorica.LoraConfig(target_modules=["lin0"], init_lora_weights=False))
    model.set_adapter("other")
    model.merge_adapter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.delete_adapter("other")
    except (ValueError, UserWarning):
        return  # said so: that is enough
    for name, tensor in base_tensors(model).items():
        assert_close(tensor, base.state_dict()[name], 1e-6)


def test_a_merged_model_is_a_plain_model_that_answers_alike(tmp_path) -> None:
    """Merged, saved by transformers, loaded by transformers."""
    from transformers import LlamaForCausalLM

    config = lorica.LoraConfig(target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    model = lorica.get_peft_model(tiny_llama(), config).eval()
    expected = model(ids(2, 6)).logits
    merged = model.merge_and_unload(progressbar=False)
    assert isinstance(merged, LlamaForCausalLM)
    assert_close(merged(ids(2, 6)).logits, expected, 1e-5)
    merged.save_pretrained(tmp_path)
    assert_close(LlamaForCausalLM.from_pretrained(tmp_path)(ids(2, 6)).logits, expected, 1e-5)


def test_merging_keeps_the_parameter_and_its_storage() -> None:
    """In place: an optimiser, a tie or a view that holds the weight goes on holding it."""
    base = mlp()
    weight: nn.Parameter = base.lin0.weight
    pointer = weight.data_ptr()
    model = lorica.get_peft_model(base, lorica.LoraConfig(target_modules=["lin0"], init_lora_weights=False))
    model.merge_adapter()
    merged = model.merge_and_unload()
    assert merged.lin0.weight is weight
    assert weight.data_ptr() == pointer
