"""The optimisers of adapters step as PEFT's do."""

from __future__ import annotations

import pytest
import torch
import twins

import models
from lorica import optim

peft_optimizers = pytest.importorskip("peft.optimizers")

ALL = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture
def exact(monkeypatch):
    """PEFT rounds LoRA-FA's projected gradient to bfloat16 wherever the machine can; without that it is comparable."""
    monkeypatch.setattr("peft.optimizers.lorafa.is_bf16_available", lambda: False)


def trained(pair, make, steps=3, accumulate=2):
    """Train both with what ``make`` returns for each; batches are accumulated."""
    for model, optimizer in zip(pair, make, strict=True):
        for step in range(steps):
            for part in range(accumulate):
                batch = models.ids(2, 6).roll(step * accumulate + part)
                model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return pair


def same(pair, tolerance=1e-5):
    theirs, ours = (dict(model.named_parameters()) for model in pair)
    for name, parameter in theirs.items():
        twins.assert_close(ours[name], parameter, tolerance, name)


@pytest.mark.parametrize("fields", [{}, {"use_rslora": True, "alpha_pattern": {"v_proj": 3}}])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_lorafa_steps_as_pefts(exact, fields, weight_decay):
    pair = twins.adapted(models.tiny_llama(), {"r": 3, "lora_alpha": 6, "target_modules": ALL, **fields})
    arguments = {"r": 3, "lora_alpha": 6, "lr": 1e-2, "weight_decay": weight_decay}
    before = {name: p.detach().clone() for name, p in pair[1].named_parameters()}
    same(
        trained(
            pair,
            (
                peft_optimizers.create_lorafa_optimizer(pair[0], **arguments),
                optim.create_lorafa_optimizer(pair[1], **arguments),
            ),
        )
    )
    for name, parameter in pair[1].named_parameters():
        assert ("lora_B" in name) != torch.equal(parameter, before[name]), name


def test_lorafa_refuses_a_wrong_scale_as_peft_does(exact):
    pair = twins.adapted(models.tiny_llama(), {"r": 3, "target_modules": ALL})
    for model, create in zip(
        pair, (peft_optimizers.create_lorafa_optimizer, optim.create_lorafa_optimizer), strict=True
    ):
        with pytest.raises(ValueError, match="have `use_rslora` set differently in the model config"):
            create(model, 3, 8, 1e-2, use_rslora=True)
        with pytest.warns(FutureWarning, match="deprecated"):
            create(model, 3, 8, 1e-2, use_rslora=False)


@pytest.mark.parametrize("base", [torch.optim.AdamW, torch.optim.SGD])
def test_riemannian_steps_as_pefts(base):
    pair = twins.adapted(models.tiny_llama(), {"r": 3, "target_modules": [*ALL, "embed_tokens"], "use_dora": True})
    same(
        trained(
            pair,
            (
                peft_optimizers.create_riemannian_optimizer(pair[0], base, lr=1e-2, reg=1e-2, weight_decay=0.1),
                optim.create_riemannian_optimizer(pair[1], base, lr=1e-2, reg=1e-2, weight_decay=0.1),
            ),
            steps=2,
        ),
        1e-4,
    )


@pytest.mark.parametrize("create", [peft_optimizers.create_riemannian_optimizer, optim.create_riemannian_optimizer])
def test_riemannian_refuses_as_peft_does(create, recwarn):
    fields = {"target_modules": ALL}
    model = twins.adapt(models.tiny_llama(), fields)["peft" not in create.__module__]
    with pytest.raises(TypeError, match="must be a subclass"):
        create(model, int, lr=1)
    with pytest.raises(ValueError, match="closure"):
        create(model, torch.optim.LBFGS, lr=1)
    with pytest.raises(ValueError, match="does not support closures"):
        create(model, torch.optim.SGD, lr=1).step(lambda: 0.0)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="did not find any trainable"):
        create(model, torch.optim.SGD, lr=1)


def test_loraplus_has_pefts_groups():
    fields = {"r": 3, "target_modules": [*ALL, "embed_tokens"], "lora_bias": False, "modules_to_save": ["lm_head"]}
    pair = twins.adapted(models.tiny_llama(), fields)
    options = {"lr": 1e-2, "loraplus_lr_ratio": 4.0, "loraplus_weight_decay": 0.1, "loraplus_lr_embedding": 3e-3}
    optimizers = [
        create(model, torch.optim.AdamW, **options, betas=(0.8, 0.9))
        for model, create in zip(
            pair, (peft_optimizers.create_loraplus_optimizer, optim.create_loraplus_optimizer), strict=True
        )
    ]
    shown = []
    for model, optimizer in zip(pair, optimizers, strict=True):
        names = {id(p): name for name, p in model.named_parameters()}
        shown.append(
            [
                (sorted(names[id(p)] for p in group["params"]), group["lr"], group["weight_decay"], group["betas"])
                for group in optimizer.param_groups
            ]
        )
    assert shown[0] == shown[1]
    same(trained(pair, optimizers, steps=2))


def test_loraplus_treats_biases_and_norms_as_peft_does():
    pair = twins.adapted(models.tiny_bert(), {"r": 2, "target_modules": ["query"], "lora_bias": True, "bias": "all"})
    options = {"lr": 1e-2, "loraplus_lr_ratio": 4.0, "loraplus_weight_decay": 0.1}
    theirs, ours = (
        create(model, torch.optim.SGD, **options)
        for model, create in zip(
            pair, (peft_optimizers.create_loraplus_optimizer, optim.create_loraplus_optimizer), strict=True
        )
    )
    assert [[p.shape for p in g["params"]] for g in ours.param_groups] == [
        [p.shape for p in g["params"]] for g in theirs.param_groups
    ]
