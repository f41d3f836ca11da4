"""aLoRA and Arrow against dense oracles: which tokens are seen, which way a token goes, whatever a layer's form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorica
import mixtures
import models
from lorica.errors import AdapterError
from lorica.layers import LoraLayer
from lorica.variants.arrow import longest

ALORA = {"alora_invocation_tokens": [5], "task_type": "CAUSAL_LM", "init_lora_weights": False}


class Shapes(nn.Module):
    """Linears that see ``[rows, tokens, …]``, tokens one below the other, and pooled rows; and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(models.VOCABULARY, 8)
        self.rows = nn.Linear(8, 8)
        self.flat = nn.Linear(8, 8, bias=False)
        self.heads = nn.Linear(4, 4)
        self.pooled = nn.Linear(8, 3)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.emb(input_ids)
        x = x + self.rows(x)
        x = x + self.flat(x.flatten(0, 1)).view(x.shape)
        x = x + self.heads(x.unflatten(-1, (2, 4)).transpose(1, 2)).transpose(1, 2).flatten(2)
        return torch.cat([x.flatten(1), self.pooled(x[:, -1])], 1)


def dense(model: nn.Module, ids: Tensor, seen: Tensor) -> Tensor:
    """The same network with every delta formed, applied to the tokens of ``seen [rows, tokens]`` alone."""
    layers = {m.target_name: m for m in model.modules() if isinstance(m, LoraLayer)}

    def apply(name: str, x: Tensor, mask: Tensor) -> Tensor:
        layer = layers[name]
        base, delta = layer.base_layer, layer.get_delta_weight("default")
        if name == "emb":
            return base(x) + mask * nn.functional.embedding(x, delta)
        return base(x) + mask * nn.functional.linear(x, delta)

    mask = seen.unsqueeze(-1).to(torch.float32)
    x = apply("emb", ids, mask)
    x = x + apply("rows", x, mask)
    x = x + apply("flat", x.flatten(0, 1), mask.flatten(0, 1)).view(x.shape)
    turned = x.unflatten(-1, (2, 4)).transpose(1, 2)
    x = x + apply("heads", turned, mask.unsqueeze(1)).transpose(1, 2).flatten(2)
    return torch.cat([x.flatten(1), apply("pooled", x[:, -1], mask[:, -1])], 1)


TARGETS = ["emb", "rows", "flat", "heads", "pooled"]
IDS = torch.tensor([[8, 5, 9, 9], [9, 9, 9, 5], [5, 9, 9, 9], [9, 8, 9, 9]])
SEEN = torch.tensor([[0, 1, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0]], dtype=torch.bool)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    config = lorica.LoraConfig(**ALORA, target_modules=TARGETS, r=2)
    return lorica.PeftModel(Shapes().eval(), config).eval()


@pytest.mark.parametrize("grad", [False, True])
def test_tokens_are_seen_whatever_the_form_of_a_layers_input(model: nn.Module, grad: bool) -> None:
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(model(input_ids=IDS), dense(model, IDS, SEEN), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wrapped", [True, False])
def test_offsets_may_be_said(model: nn.Module, wrapped: bool) -> None:
    with torch.no_grad():
        if wrapped:
            got = model(input_ids=IDS, alora_offsets=[1, None, 9, 0])
        else:
            with lorica.route_rows(model.get_base_model(), alora_offsets=[1, None, 9, 0]):
                got = model.get_base_model()(input_ids=IDS)
    seen = torch.tensor([[0, 0, 0, 1], [0] * 4, [1] * 4, [0] * 4], dtype=torch.bool)
    torch.testing.assert_close(got, dense(model, IDS, seen), rtol=1e-5, atol=1e-6)


def test_dropout_and_biases_leave_the_tokens_before_alone() -> None:
    torch.manual_seed(0)
    fields: dict[str, Any] = {"lora_dropout": 0.5, "lora_bias": True, "target_modules": ["rows", "pooled"]}
    model = lorica.PeftModel(Shapes(), lorica.LoraConfig(**ALORA, **fields)).train()
    models.randomise(model)
    output = model(input_ids=IDS)
    with model.disable_adapter():
        base = model(input_ids=IDS)
    same = (output == base)[:, : 4 * 8].view(4, 4, 8).all(-1)
    assert torch.equal(same, ~SEEN)


def test_generation_of_a_model_without_a_wrapper() -> None:
    wrapped = lorica.get_peft_model(models.tiny_llama(), lorica.LoraConfig(**ALORA, target_modules=["q_proj"]))
    models.randomise(wrapped).eval()
    ids = models.ids(2, 5).clamp(min=6)
    ids[0, 2] = 5
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    wanted = wrapped.generate(input_ids=ids, **options)
    with lorica.route_rows(wrapped.get_base_model(), input_ids=ids):
        assert torch.equal(wrapped.get_base_model().generate(input_ids=ids, **options), wanted)


def test_a_recomputed_layer_without_rows_is_an_error() -> None:
    model = lorica.get_peft_model(models.tiny_llama(), lorica.LoraConfig(**ALORA, target_modules=["q_proj"])).train()
    layer = model.get_base_model().model.layers[0]
    forward = layer.forward
    layer.forward = lambda x, **kwargs: torch.utils.checkpoint.checkpoint(forward, x, use_reentrant=False, **kwargs)
    output = model(input_ids=models.ids(2, 5)).logits
    with pytest.raises(
        AdapterError, match=r"layers\.0\.self_attn\.q_proj: activation checkpointing ran this layer again"
    ):
        output.sum().backward()


def test_layers_whose_tokens_are_not_their_own_are_refused() -> None:
    config = lorica.LoraConfig(**ALORA, target_modules=["conv"])
    with pytest.raises(lorica.errors.TargetError, match=r"conv.*alora_invocation_tokens is not supported.*Conv1d"):
        lorica.PeftModel(nn.ModuleDict({"conv": nn.Conv1d(4, 4, 3)}), config)
    config = lorica.LoraConfig(**ALORA, target_modules=[], target_parameters=mixtures.STACKS)
    with pytest.raises(lorica.errors.TargetError, match=r"experts.*alora_invocation_tokens is not supported"):
        lorica.PeftModel(mixtures.moe(), config)


# ---- Arrow ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 12, 10), (4, 3, 10), (4, 10, 3), (1, 5, 5), (8, 4, 4)], ids=str)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_prototypes_are_the_first_singular_vectors(shape: tuple[int, int, int], scale: float) -> None:
    r, out, inputs = shape
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(r, inputs, generator=generator), scale * torch.randn(out, r, generator=generator)
    wanted = torch.linalg.svd(b.double() @ a.double())[2][0]
    got = longest(a, b)
    assert abs(float(got @ wanted)) == pytest.approx(1, abs=1e-9)
    assert float(got.norm()) == pytest.approx(1, abs=1e-9)


def test_prototypes_of_singular_factors() -> None:
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(1, 6, generator=generator).repeat(4, 1)
    a[2:] = 0
    b = torch.randn(5, 4, generator=generator)
    wanted = torch.linalg.svd(b.double() @ a.double())[2][0]
    assert abs(float(longest(a, b) @ wanted)) == pytest.approx(1, abs=1e-9)
    assert not longest(a, torch.zeros(5, 4)).any()
    assert not longest(torch.zeros(4, 6), b).any()


def router(**fields: Any) -> tuple[nn.Module, LoraLayer]:
    """One linear, three adapters of different ranks and scales, and a router."""
    torch.manual_seed(0)
    model = lorica.PeftModel(
        nn.ModuleDict({"target": nn.Linear(6, 5)}).eval(), lorica.LoraConfig(r=3, target_modules=["target"]), "one"
    )
    model.add_adapter("two", lorica.LoraConfig(r=2, lora_alpha=5, target_modules=["target"]))
    model.add_adapter("three", lorica.LoraConfig(r=4, target_modules=["target"]))
    config = lorica.ArrowConfig(**fields)
    model.add_adapter("arrow_router", lorica.LoraConfig(r=2, target_modules=["target"], arrow_config=config))
    model.set_adapter("arrow_router")
    models.randomise(model).eval()
    return model, model.base_model.model["target"]


@pytest.mark.parametrize("top_k", [1, 2, 3, 7])
def test_a_token_goes_through_the_adapters_it_fits_best(top_k: int) -> None:
    _, layer = router(top_k=top_k, router_temperature=0.7)
    x = models.floats(2, 3, 6)
    deltas = [layer.get_delta_weight(name).double() for name in ("one", "two", "three")]
    for token, got in zip(x.view(-1, 6).double(), layer(x).view(-1, 5), strict=True):
        scores = torch.stack([(token @ torch.linalg.svd(delta)[2][0]).abs() for delta in deltas])
        worst = scores.topk(min(top_k, 3)).values[-1]
        shares = torch.softmax(torch.where(scores >= worst, scores, -torch.inf) / 0.7, 0)
        wanted = layer.base_layer(token.float()) + sum(s * (d @ token) for s, d in zip(shares, deltas, strict=True))
        torch.testing.assert_close(got, wanted.float(), rtol=1e-5, atol=1e-6)


def test_prototypes_follow_the_factors() -> None:
    _, layer = router(top_k=1)
    x = models.floats(4, 6)
    before = layer(x)
    with torch.no_grad():
        layer.lora_A["two"].weight.mul_(3)
    assert not torch.equal(layer(x), before)
    with torch.no_grad():
        layer.lora_A["two"].weight.div_(3)
    torch.testing.assert_close(layer(x), before)


def test_experts_that_train_get_their_gradients() -> None:
    model, layer = router(top_k=3)
    model.set_requires_grad(["one", "two", "three"])
    layer(models.floats(4, 6)).square().sum().backward()
    for name in ("one", "two", "three"):
        assert layer.lora_A[name].weight.grad.any()
        assert layer.lora_B[name].weight.grad.any()


def test_a_router_alone_says_what_it_needs() -> None:
    torch.manual_seed(0)
    config = lorica.LoraConfig(target_modules=["target"], arrow_config=lorica.ArrowConfig())
    model = lorica.PeftModel(nn.ModuleDict({"target": nn.Linear(6, 5)}), config, "arrow_router")
    with pytest.raises(AdapterError, match=r"target: an Arrow router needs adapters.*create_arrow_model"):
        model.base_model.model["target"](models.floats(2, 6))
