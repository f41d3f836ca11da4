"""What the trained rows of an embedding do in a model that goes on living."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lorica
import models


def adapted(tied=False, names=("default",), dtype=torch.float32, **fields):
    """One model with adapters of different tokens, with random rows."""
    model = models.tiny_llama(tied=tied).to(dtype)
    made = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for place, name in enumerate(names):
            tokens = {"trainable_token_indices": [3 + place, 20 - place], **fields}
            config = lorica.LoraConfig(r=2, target_modules=["q_proj"], **tokens)
            if made is None:
                made = lorica.get_peft_model(model, config, name)
            else:
                made.add_adapter(name, config)
    for name, parameter in made.named_parameters():
        if "lora_B" in name or "trainable_tokens" in name:
            nn.init.normal_(parameter)
    return made.eval()


BATCH = torch.tensor([[1, 3, 4, 5], [20, 19, 6, 3]])


@pytest.mark.parametrize("tied", [False, True])
def test_the_output_is_that_of_a_weight_with_the_rows_in_it(tied):
    model = adapted(tied)
    base = models.tiny_llama(tied=tied)
    for parameter, name in ((p, n) for n, p in model.named_parameters() if "trainable_tokens" in n):
        assert name.endswith("embed_tokens.token_adapter.trainable_tokens_delta.default")
        with torch.no_grad():
            base.model.embed_tokens.weight[[3, 20]] = parameter
    wanted = lorica.PeftModel(base, lorica.LoraConfig(r=2, target_modules=["q_proj"]))
    tensors = {n: t for n, t in lorica.get_peft_model_state_dict(model).items() if "lora" in n}
    lorica.set_peft_model_state_dict(wanted, tensors)
    assert torch.allclose(model(BATCH).logits, wanted(BATCH).logits, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_merging_gives_the_same_and_unmerging_the_weight_bit_for_bit(tied):
    model = adapted(tied, names=("default", "other"))
    model.set_adapter(["default", "other"])
    weight = model.get_base_model().model.embed_tokens.token_adapter.base_layer.weight
    before, wanted = weight.clone(), model(BATCH).logits
    model.merge_adapter()
    assert not torch.equal(weight, before)
    assert torch.allclose(model(BATCH).logits, wanted, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(weight, before)
    with model.disable_adapter():
        assert torch.allclose(model(BATCH).logits, models.tiny_llama(tied=tied)(BATCH).logits, atol=1e-6)
    plain = model.merge_and_unload()
    assert torch.allclose(plain(BATCH).logits, wanted, atol=1e-5)
    assert not [name for name, _ in plain.named_modules() if "token" in name and "embed_tokens" not in name]
    assert (plain.lm_head.weight is plain.model.embed_tokens.weight) == tied


def test_a_sixteen_bit_weight_comes_back_bit_for_bit():
    model = adapted(dtype=torch.bfloat16)
    weight = model.get_base_model().model.embed_tokens.token_adapter.base_layer.weight
    before = weight.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the linears
        model.merge_adapter()
        model.unmerge_adapter()
    assert torch.equal(weight, before)


@pytest.mark.parametrize("tied", [False, True])
def test_rows_that_have_not_learned_change_nothing(tied):
    model = models.tiny_llama(tied=tied)
    wanted = model(BATCH).logits
    model = lorica.get_peft_model(model, lorica.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3, 20]))
    assert torch.equal(model(BATCH).logits, wanted)


def test_each_adapter_has_its_own_rows():
    model = adapted(names=("default", "other"))
    outputs = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        outputs[name] = model(BATCH).logits
        train = [n for n, p in model.named_parameters() if p.requires_grad and "trainable_tokens" in n]
        assert train == [f"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta.{name}"]
    assert not torch.allclose(outputs["default"], outputs["other"])
    model.delete_adapter("default")
    assert torch.equal(model(BATCH).logits, outputs["other"])
    model.delete_adapter("other")
    assert isinstance(model.get_base_model().model.embed_tokens, nn.Embedding)


def test_two_adapters_may_not_have_a_row_of_the_same_token():
    model = adapted(names=("default", "other"), trainable_token_indices=[3, 5])
    with pytest.raises(ValueError, match="Only disjunct token indices"):
        model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="Only disjunct token indices"):
        model.merge_adapter(["default", "other"])
    assert not model.get_base_model().model.embed_tokens.token_adapter.merged


def test_rows_of_a_batch_have_adapters_of_their_own():
    model = adapted(names=("default", "other"), tied=True)
    wanted = []
    for row, name in enumerate(("other", "default")):
        model.set_adapter(name)
        wanted.append(model(BATCH[row : row + 1]).logits)
    model.set_adapter("default")
    mixed = model(BATCH, adapter_names=["other", "default"]).logits
    assert torch.allclose(mixed, torch.cat(wanted), atol=1e-5)


def test_heads_with_rows_of_their_own_on_a_shared_weight_are_untied_by_a_merge():
    model = adapted(tied=True, trainable_token_indices={"embed_tokens": [3], "lm_head": [3, 5]})
    wanted = model(BATCH).logits
    with pytest.warns(UserWarning, match="tied_target_modules"):
        model.merge_adapter()
    assert torch.allclose(model(BATCH).logits, wanted, atol=1e-5)
    model.unmerge_adapter()
    base = model.get_base_model()
    assert base.lm_head.token_adapter.base_layer.weight is base.model.embed_tokens.token_adapter.base_layer.weight
    assert torch.allclose(model(BATCH).logits, wanted, atol=1e-5)


def test_a_head_may_have_factors_too():
    config = lorica.LoraConfig(r=2, target_modules=["lm_head"], trainable_token_indices=[3], init_lora_weights=False)
    base = models.tiny_llama(tied=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = lorica.get_peft_model(base, config).eval()
    nn.init.normal_(model.get_base_model().model.embed_tokens.token_adapter.trainable_tokens_delta["default"])
    names = sorted(lorica.get_peft_model_state_dict(model, save_embedding_layers=False))
    assert names == [
        "base_model.model.lm_head.lora_A.weight",
        "base_model.model.lm_head.lora_B.weight",
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta",
    ]
    wanted = model(BATCH).logits
    with pytest.warns(UserWarning, match="tied_target_modules"):
        plain = model.merge_and_unload()
    assert torch.allclose(plain(BATCH).logits, wanted, atol=1e-5)


class Largest(TorchDispatchMode):
    """The most elements of any floating tensor made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if isinstance(output, torch.Tensor) and output.is_floating_point() and not func.is_view:
            self.elements = max(self.elements, output.numel())
        return output


def test_no_copy_of_the_weight_is_made():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed_tokens, self.head = nn.Embedding(5000, 8), nn.Linear(8, 2)

        def forward(self, ids):
            return self.head(self.embed_tokens(ids))

    config = lorica.LoraConfig(target_modules=["head"], trainable_token_indices=[3, 4000])
    model = lorica.get_peft_model(Net(), config)
    with Largest() as seen:
        model(torch.tensor([[3, 5, 4000]])).sum().backward()
    assert seen.elements < 5000


def test_padding_gets_no_gradient():
    net = nn.Sequential(nn.Embedding(10, 4, padding_idx=2), nn.Linear(4, 2))
    model = lorica.get_peft_model(net, lorica.LoraConfig(target_modules=["1"], trainable_token_indices={"0": [5, 2]}))
    model(torch.tensor([[2, 5, 2]])).sum().backward()
    (gradient,) = (p.grad for n, p in model.named_parameters() if "trainable_tokens" in n)
    assert gradient[0].any()
    assert not gradient[1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_embedding_that_scales_scales_trained_rows(dtype):
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    def make():
        torch.manual_seed(0)
        return Gemma3TextScaledWordEmbedding(10, 4, 0, embed_scale=3.0).to(dtype)

    net = nn.Sequential(make(), nn.Linear(4, 2, dtype=dtype))
    model = lorica.get_peft_model(net, lorica.LoraConfig(target_modules=["1"], trainable_token_indices={"0": [5]}))
    ids = torch.tensor([[5, 1]])
    assert torch.equal(net[0](ids), make()(ids))
    nn.init.ones_(net[0].token_adapter.trainable_tokens_delta["default"])
    assert torch.equal(net[0](ids)[0, 0], torch.full((4,), 3.0, dtype=dtype))
    assert model is not None


def test_rows_train_in_a_compiled_model():
    model = adapted(tied=True)
    wanted = model(BATCH).logits
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(BATCH).logits, wanted, atol=1e-5)


@pytest.mark.parametrize("value", [[], [1, 1], [-1], [1.5], "3", {"embed_tokens": []}, {"embed_tokens": 3}])
def test_impossible_tokens_are_refused(value):
    with pytest.raises(ValueError, match="trainable_token_indices"):
        lorica.LoraConfig(trainable_token_indices=value)


@pytest.mark.parametrize(
    ("make", "fields", "words"),
    [
        (lambda: models.tiny_llama(), {"trainable_token_indices": [40]}, "not among its 40 rows"),
        (lambda: models.tiny_llama(), {"trainable_token_indices": {"norm": [1]}}, "cannot be applied"),
        (
            lambda: nn.Sequential(nn.Embedding(9, 4, max_norm=1.0), nn.Linear(4, 2)),
            {"target_modules": ["1"], "trainable_token_indices": {"0": [1]}},
            "max_norm",
        ),
    ],
)
def test_modules_without_such_rows_are_refused(make, fields, words):
    model = make()
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=words):
        lorica.get_peft_model(model, lorica.LoraConfig(**{"target_modules": ["q_proj"], **fields}))
    assert [name for name, _ in model.named_modules()] == before


def test_another_adapter_cannot_have_factors_where_rows_train():
    model = adapted()
    with pytest.raises(ValueError, match="rows of it train for another adapter"):
        model.add_adapter("other", lorica.LoraConfig(target_modules=["embed_tokens"]))
    with pytest.raises(ValueError, match="no adapter is on"):
        model.add_adapter("other", lorica.LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"]))
