"""A stack of layers with shared weights and adapters of their own."""

from __future__ import annotations

import pytest
import torch

import lorica
import models

BATCH = models.ids(2, 7)
MAP = [(0, 2), (1, 2)]


def adapted(base=None, **fields):
    config = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False, "layer_replication": MAP, **fields}
    return lorica.get_peft_model(models.tiny_llama() if base is None else base, lorica.LoraConfig(**config)).eval()


def test_weights_are_shared_and_factors_are_not():
    base = models.tiny_llama()
    count = sum(parameter.numel() for parameter in base.parameters())
    model = adapted(base)
    layers = base.model.layers
    assert layers[1].mlp.up_proj.weight is layers[2].mlp.up_proj.weight
    one, two = (layers[place].self_attn.q_proj for place in (1, 2))
    assert one.base_layer.weight is two.base_layer.weight
    assert not torch.equal(one.factors("default").a, two.factors("default").a)
    trained, total = model.get_nb_trainable_parameters()
    assert total - trained == count


def test_merging_gives_each_layer_a_weight_of_its_own():
    model = adapted()
    layers = model.get_base_model().model.layers
    wanted, before = model(BATCH).logits, layers[1].self_attn.q_proj.base_layer.weight.clone()
    model.merge_adapter()
    assert torch.allclose(model(BATCH).logits, wanted, atol=1e-5)
    model.unmerge_adapter()
    one, two = (layers[place].self_attn.q_proj.base_layer.weight for place in (1, 2))
    assert one is two
    assert torch.equal(one, before)  # the shared weight was never written to
    plain = model.merge_and_unload()
    assert len(plain.model.layers) == 3
    assert torch.allclose(plain(BATCH).logits, wanted, atol=1e-5)


def test_unloading_gives_the_model_back():
    base = models.tiny_llama()
    wanted, names = base(BATCH).logits, [name for name, _ in base.named_modules()]
    plain = adapted(base).unload()
    assert [name for name, _ in plain.named_modules()] == names
    assert plain.config.num_hidden_layers == 2
    assert torch.equal(plain(BATCH).logits, wanted)


def test_lists_with_an_entry_for_every_layer_follow():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=4, layer_types=["full_attention", "sliding_attention"], sliding_window=3,
        use_sliding_window=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = adapted(Qwen3ForCausalLM(config).eval())
    assert config.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]
    whole = model(BATCH).logits
    cache = model(BATCH[:, :4], use_cache=True)
    rest = model(BATCH[:, 4:], past_key_values=cache.past_key_values).logits
    assert torch.allclose(torch.cat([cache.logits, rest], 1), whole, atol=1e-5)


@pytest.mark.parametrize("fields", [{"layer_replication": [(0, 3)]}, {"target_modules": ["nope"]}])
def test_what_cannot_be_leaves_the_model_as_it_was(fields):
    base = models.tiny_llama()
    names = [name for name, _ in base.named_modules()]
    with pytest.raises(ValueError, match=r"layer_replication|nope"):
        adapted(base, **fields)
    assert [name for name, _ in base.named_modules()] == names
    assert base.config.num_hidden_layers == 2


def test_a_file_that_does_not_fit_leaves_the_model_as_it_was(tmp_path):
    adapted().save_pretrained(tmp_path)
    other = models.tiny_llama(layers=2)
    other.model.layers[0].self_attn.q_proj = torch.nn.Linear(16, 24)
    names = [name for name, _ in other.named_modules()]
    with pytest.raises(lorica.errors.CheckpointError):
        lorica.PeftModel.from_pretrained(other, tmp_path)
    assert [name for name, _ in other.named_modules()] == names
    assert other.config.num_hidden_layers == 2


def test_further_adapters_share_the_stack():
    model = adapted()
    model.add_adapter("same", lorica.LoraConfig(target_modules=["q_proj"], layer_replication=MAP))
    model.add_adapter("none", lorica.LoraConfig(target_modules=["v_proj"]))
    assert len(model.get_base_model().model.layers) == 3
    with pytest.raises(ValueError, match="already"):
        model.add_adapter("other", lorica.LoraConfig(target_modules=["q_proj"], layer_replication=[(0, 1)]))
    plain = lorica.get_peft_model(models.tiny_llama(), lorica.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="adapted already"):
        plain.add_adapter("other", lorica.LoraConfig(target_modules=["q_proj"], layer_replication=MAP))


@pytest.mark.parametrize("value", [[], [(0,)], [(1, 1)], [(-1, 2)], 3, [(0, 1.5)]])
def test_impossible_ranges_are_refused(value):
    with pytest.raises(ValueError, match="layer_replication"):
        lorica.LoraConfig(layer_replication=value)
