"""VeLoRA: the forward is plain LoRA's, the gradient of A comes from the compressed input, and less is kept."""

from __future__ import annotations

import copy

import pytest
import torch
from layered import LINEAR, adapt, by_name, close, layer_of, merged
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lorica
from cases import OPS, Op
from lorica.errors import TargetError
from lorica.variants import velora
from mixtures import STACKS, moe
from models import floats, randomise, tiny_llama


def velora_of(groups: int, kind: str = "batch_average", scale: float = 1.0) -> dict:
    return {"velora_config": {"num_groups": groups, "init_type": kind, "scale": scale}}


def oracle(x_TI: Tensor, dh_TR: Tensor, v_D: Tensor, groups: int, scale: float) -> Tensor:
    """The gradient of A, token by token and group by group, in float64."""
    tokens, features = x_TI.shape
    restored = torch.zeros(tokens, groups * len(v_D), dtype=torch.float64)
    for token in range(tokens):
        for group in range(groups):
            part = slice(group * len(v_D), (group + 1) * len(v_D))
            mine = torch.zeros(len(v_D), dtype=torch.float64)
            mine[: len(x_TI[token, part])] = x_TI[token, part].double()
            restored[token, part] = (mine @ v_D.double()) * v_D.double()
    return scale * dh_TR.double().T @ restored[:, :features]


@pytest.mark.parametrize("groups", [1, 3, 5, 12, 64])
@pytest.mark.parametrize("op", LINEAR, ids=by_name)
def test_the_gradient_of_a_is_that_of_the_compressed_input(op: Op, groups: int) -> None:
    plain = randomise(adapt(op, r=4)).train()
    model = randomise(adapt(op, r=4, **velora_of(groups, scale=0.8))).train()
    x = op.inputs().requires_grad_()
    y = op.inputs().requires_grad_()
    out = model(x)
    assert torch.equal(out, plain(y))
    weights = floats(*out.shape)
    (out * weights).sum().backward()
    (plain(y) * weights).sum().backward()
    ours, theirs = layer_of(model).factors("default"), layer_of(plain).factors("default")
    close(x.grad, y.grad)
    close(ours.b.grad, theirs.b.grad)
    flat = x.detach().flatten(0, -2)
    dh = weights.flatten(0, -2) @ ours.b.detach() * layer_of(model).scaling["default"]
    length = -(-flat.shape[1] // groups)
    padded = torch.nn.functional.pad(flat.double(), (0, groups * length - flat.shape[1]))
    v = nn.functional.normalize(padded.view(-1, length).mean(0), dim=0)
    close(ours.a.grad.double(), oracle(flat, dh, v, groups, 0.8))


def test_one_group_per_feature_loses_nothing() -> None:
    op = OPS[0]
    plain = randomise(adapt(op, r=4)).train()
    model = randomise(adapt(op, r=4, **velora_of(12, "random"))).train()
    for one in (plain, model):
        one(op.inputs()).square().sum().backward()
    close(layer_of(model).factors("default").a.grad, layer_of(plain).factors("default").a.grad)


def kept_for_backward(model: nn.Module, x: Tensor) -> int:
    found: dict[int, int] = {}
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model(x)
    del out
    return sum(found.values())


def test_the_input_is_not_kept() -> None:
    """Of 256 features one number for each of 8 groups."""
    base = nn.Sequential(nn.Linear(256, 32))
    sizes = []
    for fields in ({}, velora_of(8)):
        torch.manual_seed(0)
        config = lorica.LoraConfig(target_modules=["0"], r=4, **fields)
        model = lorica.get_peft_model(copy.deepcopy(base), config).train()
        sizes.append(kept_for_backward(model, torch.randn(512, 256)))
    assert sizes[0] >= 512 * 256 * 4
    assert sizes[1] <= 512 * (8 + 4 + 32) * 4 + 4096


@pytest.mark.parametrize("kind", ["batch_average", "batch_average_once", "random"])
def test_directions_that_are_kept(kind: str, tmp_path) -> None:
    """Only the first batch's is found and kept, also across a file; nothing is found in evaluation."""
    op = OPS[0]
    model = randomise(adapt(op, r=4, **velora_of(3, kind)))
    kept = layer_of(model).factors("default").extras[velora.DIRECTION]
    start = kept.clone()
    assert bool(start.any()) is (kind == "random")
    model(op.inputs()).sum().backward()
    with torch.no_grad():
        model.train()(op.inputs())
    assert torch.equal(kept, start)
    model(op.inputs()).sum().backward()
    first = kept.clone()
    model(op.inputs() + 1).sum().backward()
    assert torch.equal(kept, first)
    assert torch.equal(first, start) is (kind != "batch_average_once")
    if kind != "batch_average":
        assert float(first.norm()) == pytest.approx(1, rel=1e-5)
    model.save_pretrained(tmp_path)
    loaded = lorica.PeftModel.from_pretrained(op.build(), tmp_path, is_trainable=True).train()
    loaded(op.inputs() - 1).sum().backward()
    assert torch.equal(layer_of(loaded).factors("default").extras[velora.DIRECTION], first)


def test_a_batch_of_zeros_gives_numbers() -> None:
    op = OPS[0]
    model = randomise(adapt(op, r=4, **velora_of(3))).train()
    model(torch.zeros_like(op.inputs())).sum().backward()
    assert bool(layer_of(model).factors("default").a.grad.isfinite().all())


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_forwards_have_the_same_gradients(reentrant: bool) -> None:
    op = OPS[0]
    grads = []
    for kind in (None, reentrant):
        model = randomise(adapt(op, r=4, lora_dropout=0.3, **velora_of(4, "batch_average_once"))).train()
        torch.manual_seed(2)
        x = op.inputs().requires_grad_()
        y = model(x) if kind is None else checkpoint(model, x, use_reentrant=kind)
        y.square().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(first, second) for first, second in zip(*grads, strict=True))


def test_merging_and_deleting() -> None:
    op = OPS[0]
    model = randomise(adapt(op, r=4, **velora_of(4)))
    close(merged(model)(op.inputs()), model(op.inputs()))
    model.delete_adapter("default")
    assert not dict(model.named_buffers())


def test_under_autocast_and_in_sixteen_bits() -> None:
    model = lorica.get_peft_model(
        tiny_llama().bfloat16(), lorica.LoraConfig(target_modules="all-linear", r=4, **velora_of(4))
    ).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(torch.arange(12).view(2, 6)).logits.float().sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["embedding", "conv1d", "attention"])
def test_layers_that_multiply_no_vectors_by_a(name: str) -> None:
    op = next(op for op in OPS if op.name == name)
    base = op.build()
    with pytest.raises(TargetError, match=r"target: velora_config"):
        lorica.get_peft_model(base, op.config(lorica, **velora_of(2)))
    assert type(base.target) is type(op.build().target)


def test_experts_are_refused() -> None:
    with pytest.raises(TargetError, match=r"experts.*velora_config"):
        lorica.get_peft_model(moe(), lorica.LoraConfig(target_parameters=STACKS, **velora_of(2)))
