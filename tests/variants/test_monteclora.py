"""MonteCLoRA: noise in training alone, the same when it is drawn again, with the moments that it should have."""

from __future__ import annotations

import copy

import pytest
import torch
from layered import LAYERS, adapt, by_name, close, layer_of, merged
from torch.utils.checkpoint import checkpoint

import lorica
from cases import OPS, Op
from lorica.helpers import MontecloraTrainerMixin
from lorica.variants import VARIANTS, monteclora
from mixtures import STACKS, moe
from models import randomise, tiny_llama


def noisy(samples: int = 3, size: float = 0.2) -> dict:
    return {"monteclora_config": {"num_samples": samples, "sample_scaler": size}, "r": 4}


def seen(model: torch.nn.Module) -> torch.Tensor:
    """A as one forward sees it."""
    layer = layer_of(model)
    return layer.in_forward(layer.factors("default"), layer.specs["default"]).a


@pytest.mark.parametrize("op", LAYERS, ids=by_name)
def test_noise_is_in_training_alone(op: Op) -> None:
    model, plain = randomise(adapt(op, **noisy())), adapt(op, r=4)
    tensors = lorica.get_peft_model_state_dict(model)
    lorica.set_peft_model_state_dict(plain, {k: v for k, v in tensors.items() if "sampler" not in k})
    assert torch.equal(model(op.inputs()), plain(op.inputs()))
    model.train()
    first, second = model(op.inputs()), model(op.inputs())
    assert not torch.equal(first, second)
    model.eval()
    assert torch.equal(model(op.inputs()), plain(op.inputs()))
    close(merged(model.train()).eval()(op.inputs()), plain(op.inputs()))


@pytest.mark.parametrize("op", LAYERS, ids=by_name)
def test_what_the_sampler_has_learns(op: Op) -> None:
    model = randomise(adapt(op, **noisy())).train()
    out = model(op.inputs())
    (out.square().sum() + model._get_monteclora_loss()).backward()
    grads = [p.grad for name, p in model.named_parameters() if p.requires_grad]
    assert all(grad is not None and bool(grad.isfinite().all()) and bool(grad.any()) for grad in grads)


def test_the_noise_has_the_stated_moments() -> None:
    """Zero mean; in row p a variance of ε²·E[Σw²]·e^(2σₚ)·r, since the χ² of r degrees has the mean r."""
    op = OPS[0]
    model = adapt(op, **noisy(2, 0.1)).train()
    factors = layer_of(model).factors("default")
    with torch.no_grad():
        factors.extras[monteclora.LOG_STD].copy_(torch.tensor([-1.0, 0.0, 0.5, 1.0]))
        factors.extras[monteclora.LOG_WEIGHTS].copy_(torch.tensor([0.3, 0.3]))
    draws, weights = [], []
    for _ in range(4000):
        draws.append((seen(model) - factors.a).detach())
        sample = monteclora.last_sample(layer_of(model), "default", factors)
        weights.append(sample.weights.detach().square().sum())
    noise = torch.stack(draws)
    expected = 0.1**2 * torch.stack(weights).mean() * (2 * factors.extras[monteclora.LOG_STD].detach()).exp() * 4
    found = noise.square().mean((0, 2))
    assert float((found / expected - 1).abs().max()) < 0.05
    assert float((noise.mean((0, 2)) / found.sqrt()).abs().max()) < 0.02


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.filterwarnings("ignore::FutureWarning:torch")
def test_a_seed_governs_and_training_compiles() -> None:
    op = OPS[0]
    model = randomise(adapt(op, **noisy())).train()
    torch.compiler.reset()
    outs = []
    for forward in (model, model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(4)
        outs.append(forward(op.inputs()))
    assert torch.equal(outs[0], outs[1])
    assert outs[2].shape == outs[0].shape
    assert bool(outs[2].isfinite().all())
    torch.compiler.reset()


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_forwards_draw_the_same(reentrant: bool) -> None:
    op = OPS[0]
    grads = []
    for kind in (None, reentrant):
        model = randomise(adapt(op, **noisy())).train()
        torch.manual_seed(2)
        x = op.inputs().requires_grad_()
        y = model(x) if kind is None else checkpoint(model, x, use_reentrant=kind)
        y.square().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(first, second) for first, second in zip(*grads, strict=True))


@pytest.mark.parametrize("shared", [False, True])
def test_on_experts(shared: bool, tmp_path) -> None:
    config = lorica.LoraConfig(target_parameters=STACKS, share_expert_adapters=shared, **noisy())
    model = randomise(lorica.get_peft_model(moe(), config))
    ids = torch.arange(24).view(2, 12)
    out = model(ids).logits
    assert not torch.equal(model.train()(ids).logits, out)
    assert bool(model._get_monteclora_loss() > 0)
    model.eval().save_pretrained(tmp_path)
    loaded = lorica.PeftModel.from_pretrained(moe(), tmp_path)
    close(loaded(ids).logits, out)
    for one in (loaded, copy.deepcopy(model.train())):
        assert len(lorica.get_peft_model_state_dict(one)) == len(lorica.get_peft_model_state_dict(model))


def test_the_buffers_stay_as_they_start() -> None:
    """What depends on a rank's last draw is no part of the adapter's state."""
    op = OPS[0]
    model = adapt(op, **noisy()).train()
    before = {name: b.clone() for name, b in model.named_buffers()}
    model(op.inputs()).sum().backward()
    assert len(before) == 2
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())


def test_many_samples_have_a_finite_loss() -> None:
    """Whose gamma functions are beyond float32."""
    model = adapt(OPS[0], **noisy(60)).train()
    model(OPS[0].inputs())
    loss = model._get_monteclora_loss()
    loss.backward()
    assert bool(torch.as_tensor(loss).isfinite())
    assert all(bool(p.grad.isfinite().all()) for n, p in model.named_parameters() if "sampler" in n)


class Plain:
    """A trainer's own loss."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        out = model(**inputs)
        return (out.logits.sum(), out) if return_outputs else out.logits.sum()


class Trainer(MontecloraTrainerMixin, Plain):
    """With the variational one."""


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_trainer_adds_the_loss(wrapped: bool) -> None:
    model = lorica.get_peft_model(tiny_llama(), lorica.LoraConfig(target_modules=["q_proj"], **noisy())).train()
    inputs = {"input_ids": torch.arange(8).view(2, 4)}
    given = torch.nn.ModuleDict({"module": model}) if wrapped else model
    if wrapped:
        given.forward = model.forward  # type: ignore[method-assign]
    loss, outputs = Trainer().compute_loss(given, inputs, return_outputs=True)
    close(loss, outputs.logits.sum() + model._get_monteclora_loss())
    assert not torch.equal(loss, outputs.logits.sum())
    plain = lorica.get_peft_model(tiny_llama(), lorica.LoraConfig(target_modules=["q_proj"])).train()
    assert torch.equal(Trainer().compute_loss(plain, inputs), Plain().compute_loss(plain, inputs))


def test_ranks_are_told_that_it_is_random() -> None:
    assert [name for name, variant in VARIANTS.items() if variant.random] == ["monteclora_config"]
