"""The optimisers' own laws, in float64 and on what PEFT's do not take."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lorica
import mixtures
import models
from lorica import optim
from lorica.optim.pairs import grams, pairs


def adapted(base, **fields):
    torch.manual_seed(1)
    model = lorica.get_peft_model(base, lorica.LoraConfig(**{"r": 3, "init_lora_weights": False, **fields}))
    return model.train()


def step(model, optimizer, batch):
    optimizer.zero_grad()
    model(batch).pow(2).mean().backward()
    optimizer.step()


def test_a_projected_step_is_the_nearest_to_a_full_one():
    """For a plain gradient step, ``s·dB·A`` is the least-squares approximation of the full weight's gradient."""
    layer = nn.Sequential(nn.Linear(6, 4, dtype=torch.float64))
    model = adapted(layer, target_modules=["0"], lora_alpha=5)
    optimizer = optim.create_lorafa_optimizer(model, 3, 5, lr=1.0)
    x = torch.randn(9, 6, dtype=torch.float64)
    weight = (layer[0].get_base_layer().weight + layer[0].get_delta_weight("default")).detach().requires_grad_()
    (full,) = torch.autograd.grad((x @ weight.T + layer[0].bias).pow(2).mean(), weight)
    model(x).pow(2).mean().backward()
    (pair, side, inverse), *_ = optimizer._projections().values()
    projected = pair.apply(side, pair.b.grad, inverse)
    s, a = pair.scaling, pair.a
    wanted = torch.linalg.lstsq(a.T, full.T).solution.T / s
    assert torch.allclose(projected, wanted, rtol=1e-6)


def test_an_embeddings_random_factor_is_the_frozen_one():
    model = adapted(models.embedding_net(), target_modules=["emb", "head"], init_lora_weights=True)
    layer = model.get_base_model().emb
    optimizer = optim.create_lorafa_optimizer(model, 3, 8, lr=0.1)
    before = [factor.detach().clone() for factor in layer.factors("default").tensors()]
    step(model, optimizer, models.ids(2, 5))
    a, b = layer.factors("default").tensors()
    assert not torch.equal(a, before[0])
    assert torch.equal(b, before[1])


def test_what_is_no_pair_is_stepped_as_adam_does():
    """A bias of B, a magnitude, the factors of a grouped convolution: AdamW's step, whatever stands beside them."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2))
    model = adapted(net, r=4, target_modules=["0"], lora_bias=True)
    twin = copy.deepcopy(model)
    ours = optim.create_lorafa_optimizer(model, 4, 8, lr=0.1)
    for parameter in pairs(twin)[0].a, pairs(twin)[0].layer.base_layer.weight:
        parameter.requires_grad_(False)
    plain = torch.optim.AdamW([p for p in twin.parameters() if p.requires_grad], lr=0.1, eps=1e-6, weight_decay=0)
    x = 100 * models.floats(2, 4, 5, 5)
    step(model, ours, x)
    step(twin, plain, x)
    for (name, got), wanted in zip(model.named_parameters(), twin.parameters(), strict=True):
        # Adam adds eps after its correction of the bias, this one before: large gradients hide it.
        assert torch.allclose(got, wanted, atol=1e-5), name


@pytest.mark.parametrize("kind", ["lora_fa", "riemannian"])
def test_state_goes_on_where_it_was(kind):
    def make(model):
        if kind == "lora_fa":
            return optim.create_lorafa_optimizer(model, 3, 8, lr=0.05)
        return optim.create_riemannian_optimizer(model, torch.optim.AdamW, lr=0.05)

    model = adapted(models.mlp(), target_modules=["lin0", "lin1"])
    optimizer = make(model)
    x = models.floats(4, 10)
    step(model, optimizer, x)
    other = copy.deepcopy(model)
    resumed = make(other)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(2):
        step(model, optimizer, x)
        step(other, resumed, x)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_sixteen_bit_factors_have_moments_of_thirty_two():
    model = adapted(models.mlp().bfloat16(), target_modules=["lin0"], lora_dtype="bfloat16")
    optimizer = optim.create_lorafa_optimizer(model, 3, 8, lr=1e-3)
    step(model, optimizer, models.floats(4, 10).bfloat16())
    (state,) = optimizer.state.values()
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.float32
    again = optim.create_lorafa_optimizer(model, 3, 8, lr=1e-3)
    again.load_state_dict(optimizer.state_dict())
    (loaded,) = again.state.values()
    assert torch.equal(loaded["exp_avg"], state["exp_avg"])  # not rounded to the parameter's dtype on the way


def test_the_inverse_follows_a_frozen_factor_that_is_loaded_anew():
    model = adapted(models.mlp(), target_modules=["lin0"])
    optimizer = optim.create_lorafa_optimizer(model, 3, 8, lr=0.05)
    x = models.floats(4, 10)
    step(model, optimizer, x)
    tensors = lorica.get_peft_model_state_dict(model)
    lorica.set_peft_model_state_dict(model, {name: 2 * tensor for name, tensor in tensors.items()})
    (pair,) = pairs(model)
    ((_, _, inverse),) = optimizer._projections().values()
    gram = pair.a @ pair.a.T * pair.scaling**2
    assert torch.allclose(inverse[0] @ gram, torch.eye(3), atol=1e-3)


def test_stacked_experts_have_matrices_of_their_own():
    model = adapted(mixtures.moe(), target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"])
    pair, *_ = [pair for pair in pairs(model) if pair.layer.op.roles_a[0] == "expert"]
    (gram,) = grams([(pair, "b")])
    for expert, b in enumerate(pair.b):
        assert torch.allclose(gram[0, expert], b.T @ b, atol=1e-6)
    optimizer = optim.create_riemannian_optimizer(model, torch.optim.SGD, lr=0.1, reg=0.5)
    model(input_ids=models.ids(2, 5)).logits.pow(2).mean().backward()
    gradient = pair.a.grad.clone()
    optimizer.step()
    wanted = torch.linalg.inv(gram[0] + 0.5 * torch.eye(3)) @ gradient
    assert torch.allclose(pair.a.grad, wanted, atol=1e-5 * float(wanted.norm()))
