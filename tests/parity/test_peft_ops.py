"""Every kind of base layer computes what PEFT computes: outputs, gradients, names, counts, merged weights."""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch
import twins
from twins import peft

import lorica
from cases import OPS, Op

# Both libraries may say beforehand that a grouped convolution cannot be merged.
pytestmark = pytest.mark.filterwarnings("ignore:.*groups.*")

CASES = [pytest.param(op, r, id=f"{op.name}-r{r}") for op in OPS for r in op.ranks]
EXACT = [op for op in OPS if op.peft_exact]
BIASES = ("none", "all", "lora_only")


def by_name(op: Op) -> str:
    return op.name


def fields(op: Op, **more: object) -> dict:
    return {"target_modules": ["target"], "init_lora_weights": False, "lora_alpha": 6, **op.fields, **more}


@pytest.mark.parametrize(("op", "r"), CASES)
def test_names_shapes_and_counts_are_equal(op: Op, r: int) -> None:
    base = op.build()
    for bias, lora_bias in product(BIASES, (False, True) if op.lora_bias else (False,)):
        pair = twins.adapted(base, fields(op, r=r, bias=bias, lora_bias=lora_bias))
        twins.assert_same_parameters(pair)
        twins.assert_same_files(pair)


@pytest.mark.parametrize(("op", "r"), [case for case in CASES if case.values[0].peft_exact])
def test_outputs_and_gradients_are_equal(op: Op, r: int) -> None:
    base, batch = op.build(), op.inputs()
    for bias, rslora, lora_bias in product(BIASES, (False, True), (False, True) if op.lora_bias else (False,)):
        pair = twins.adapted(base, fields(op, r=r, bias=bias, use_rslora=rslora, lora_bias=lora_bias))
        twins.assert_same_run(pair, batch)


@pytest.mark.parametrize("op", EXACT, ids=by_name)
def test_training_steps_are_equal(op: Op) -> None:
    """Three steps of SGD keep the twins together: no gradient is lost or counted twice."""
    pair = twins.adapted(op.build(), fields(op, r=4, bias="all"))
    for model in pair:
        optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
        for _ in range(3):
            twins.run(model, op.inputs())
            optimiser.step()
    trained = [dict(model.named_parameters()) for model in pair]
    twins.assert_same_tensors(trained[1], trained[0], 1e-5)


@pytest.mark.parametrize("op", [op for op in EXACT if op.dropout], ids=by_name)
def test_dropout_before_the_factors_uses_the_same_random_stream(op: Op) -> None:
    pair = twins.adapted(op.build(), fields(op, r=4, lora_dropout=0.4))
    for model in pair:
        model.train()
    twins.assert_same_run(pair, op.inputs(), seed=11)
    for model in pair:
        model.eval()
    twins.assert_same_run(pair, op.inputs(), seed=11)


@pytest.mark.parametrize("op", [op for op in EXACT if op.mergeable], ids=by_name)
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merged_weights_are_equal(op: Op, safe_merge: bool) -> None:
    for rslora, lora_bias in product((False, True), (False, True) if op.lora_bias else (False,)):
        pair = twins.adapted(op.build(), fields(op, r=4, use_rslora=rslora, lora_bias=lora_bias))
        theirs, ours = (model.merge_and_unload(safe_merge=safe_merge) for model in pair)
        assert type(ours.target) is type(theirs.target)
        twins.assert_same_tensors(dict(ours.state_dict()), dict(theirs.state_dict()), 1e-6)


@pytest.mark.parametrize("op", [op for op in OPS if not op.mergeable], ids=by_name)
def test_what_peft_cannot_merge_is_refused_and_left_as_it_was(op: Op) -> None:
    pair = twins.adapted(op.build(), fields(op, r=4))
    for model in pair:
        before = copy.deepcopy(model.state_dict())
        with pytest.raises((NotImplementedError, ValueError)):
            model.merge_adapter()
        twins.assert_same_tensors(dict(model.state_dict()), dict(before))


@pytest.mark.parametrize("op", [op for op in OPS if op.name.startswith("embedding")], ids=by_name)
def test_an_embedding_has_no_lora_bias(op: Op) -> None:
    for library in (peft, lorica):
        with pytest.raises((ValueError, NotImplementedError), match="lora_bias"):
            library.get_peft_model(op.build(), op.config(library, lora_bias=True))


@pytest.mark.parametrize("op", [op for op in OPS if not op.mergeable], ids=by_name)
def test_a_rank_that_groups_do_not_divide_is_refused(op: Op) -> None:
    for library in (peft, lorica):
        with pytest.raises(ValueError, match="groups"):
            library.get_peft_model(op.build(), op.config(library, r=3))


@pytest.mark.parametrize("op", EXACT, ids=by_name)
def test_low_precision_bases_get_float32_factors(op: Op) -> None:
    for dtype, autocast in product((torch.bfloat16, torch.float16), (True, False)):
        base = op.build().to(dtype)
        pair = twins.adapt(base, fields(op, r=4), autocast_adapter_dtype=autocast)
        twins.assert_same_parameters(pair)


@pytest.mark.parametrize("op", EXACT, ids=by_name)
def test_low_precision_outputs_agree(op: Op) -> None:
    """bfloat16 keeps 8 bits: the two orders of rounding stay within a few of them."""
    batch = op.inputs()
    batch = batch.bfloat16() if batch.is_floating_point() else batch
    for autocast in (True, False):
        pair = twins.adapted(op.build().bfloat16(), fields(op, r=4), autocast_adapter_dtype=autocast)
        theirs, ours = (twins.run(model, batch) for model in pair)
        assert ours[0].dtype == torch.bfloat16
        twins.assert_close(ours[0], theirs[0], 2e-2, "output")
        twins.assert_same_tensors(ours[1], theirs[1], 4e-2)
