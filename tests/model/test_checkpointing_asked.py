"""Whether a model recomputes its activations is asked module by module, as transformers' own property does."""

from __future__ import annotations

import pytest
from torch import nn
from transformers import LlamaConfig, LlamaModel

from lorica.adapt.trainable import is_checkpointing


def llama() -> LlamaModel:
    return LlamaModel(
        LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1)
    )


def test_it_agrees_with_transformers_whichever_module_says_so():
    model = llama()
    assert not model.is_activation_checkpointing
    assert not is_checkpointing(model)
    for name, module in model.named_modules():
        had = vars(module).get("gradient_checkpointing")
        module.gradient_checkpointing = True
        assert model.is_activation_checkpointing, name
        assert is_checkpointing(model), name
        if had is None:
            del module.gradient_checkpointing
        else:
            module.gradient_checkpointing = had
        assert not is_checkpointing(model), name


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_turning_it_on_is_seen():
    model = llama()
    model.gradient_checkpointing_enable()
    assert is_checkpointing(model)
    model.gradient_checkpointing_disable()
    assert not is_checkpointing(model)


@pytest.mark.parametrize("name", ["is_gradient_checkpointing", "is_activation_checkpointing"])
def test_a_model_s_own_answer_counts(name):
    own = type("Own", (LlamaModel,), {name: property(lambda self: True)})
    assert is_checkpointing(own(llama().config)) is (name == "is_activation_checkpointing")
    plain = type("Plain", (nn.Module,), {name: property(lambda self: True)})
    assert is_checkpointing(plain())
    assert not is_checkpointing(nn.Linear(2, 2))
