"""Our classes are peft's in name only, and peft's constructors give way to them only for configurations of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft", reason="it is about peft's classes")

import peft
import ranks
import real

import lorica
import models
from lorica.compat.peft import LoraConfig, PeftConfig, get_peft_model, take_over
from lorica.compat.peft.config import ours
from lorica.compat.peft.tuners.lora.layer import Embedding, Linear

pytestmark = pytest.mark.filterwarnings("ignore")

FIELDS = {"r": 4, "target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["norm"]}
TASKS = ["CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION", None]


def adapted(**fields: Any) -> Any:
    return models.randomise(get_peft_model(models.tiny_llama(), LoraConfig(**FIELDS, **fields)))


def parts(model: Any) -> list[Any]:
    """One of each class: wrapper, tuner, layers, a module that is saved whole."""
    base = model.get_base_model().model
    return [model, model.base_model, base.layers[0].self_attn.q_proj, base.embed_tokens, base.norm]


def test_they_are_instances_of_pefts():
    theirs = [
        peft.PeftModelForCausalLM,
        peft.LoraModel,
        peft.tuners.lora.LoraLayer,
        peft.tuners.tuners_utils.BaseTunerLayer,
        peft.utils.ModulesToSaveWrapper,
    ]
    assert all(isinstance(*pair) for pair in zip(parts(adapted(task_type="CAUSAL_LM")), theirs, strict=True))
    assert isinstance(adapted().peft_config["default"], peft.LoraConfig)


def test_nothing_of_pefts_is_found_in_them():
    """A lookup ends at what is lorica's or torch's, or goes on to the base model."""
    for part in parts(adapted(task_type="CAUSAL_LM")):
        for name in dir(type(part)):
            value = getattr(type(part), name, None)
            found = getattr(value, "fget", value)
            place = getattr(found, "__module__", None) or ""
            assert not place.startswith(("peft", "transformers.utils.hub")), (
                f"{type(part).__name__}.{name} is from {place}"
            )


def test_what_only_peft_has_is_looked_up_in_the_base_model():
    model = adapted()
    assert hasattr(peft.PeftModel, "get_prompt")
    assert not hasattr(model, "get_prompt")
    model.get_base_model().get_prompt = lambda: "the base model's"
    assert model.get_prompt() == "the base model's"


@pytest.mark.parametrize("task", TASKS)
def test_peft_builds_our_class_for_our_configuration(task):
    base = {"SEQ_2_SEQ_LM": models.tiny_t5, "SEQ_CLS": models.tiny_bert}.get(task, models.tiny_llama)()
    targets = {"SEQ_2_SEQ_LM": ["q"], "SEQ_CLS": ["query"]}.get(task, ["q_proj"])
    model = peft.get_peft_model(base, LoraConfig(target_modules=targets, task_type=task))
    kind = peft.PeftModel if task is None else peft.auto.MODEL_TYPE_TO_PEFT_MODEL_MAPPING[task]
    assert type(model).__name__ == kind.__name__
    assert type(model).__module__ == "lorica.compat.peft.peft_model"
    assert isinstance(model, kind)
    own = get_peft_model(models.mlp(), LoraConfig(target_modules=["lin0"]))
    assert isinstance(own, lorica.PeftModel)


def test_pefts_own_models_stay_pefts():
    model = peft.get_peft_model(models.tiny_llama(), peft.LoraConfig(task_type="CAUSAL_LM"))
    assert type(model) is peft.PeftModelForCausalLM
    assert type(model.base_model) is peft.LoraModel
    other = peft.get_peft_model(models.mlp(), peft.AdaLoraConfig(target_modules=["lin0"], total_step=10))
    assert type(other.base_model) is peft.AdaLoraModel
    take_over()
    try:
        other = peft.get_peft_model(models.mlp(), peft.AdaLoraConfig(target_modules=["lin0"], total_step=10))
    finally:
        take_over(False)
    assert type(other.base_model) is peft.AdaLoraModel


@pytest.mark.parametrize("library", [peft, lorica])
def test_configurations_of_others_become_ours(library):
    fields = {"r": 3, "use_rslora": True, "rank_pattern": {"q_proj": 2}, "target_modules": ["q_proj"], "bias": "all"}
    config = library.LoraConfig(**fields, runtime_config=library.LoraRuntimeConfig())
    made = ours(config)
    assert type(made) is LoraConfig
    assert isinstance(made, PeftConfig | lorica.LoraConfig)
    assert {name: getattr(made, name) for name in fields} == {name: getattr(config, name) for name in fields}
    made.rank_pattern["k_proj"] = 1
    assert library is lorica or config.rank_pattern == {"q_proj": 2}
    model = get_peft_model(models.tiny_llama(), config)
    assert type(model.peft_config["default"]) is LoraConfig


def test_other_methods_are_refused_by_name():
    with pytest.raises(ValueError, match="IA3Config: lorica adapts by LoRA only"):
        get_peft_model(models.mlp(), peft.IA3Config(target_modules=["lin0"], feedforward_modules=[]))
    with pytest.raises(ValueError, match="AdaLoraConfig: lorica adapts by LoRA only"):
        get_peft_model(models.mlp(), peft.AdaLoraConfig(target_modules=["lin0"], total_step=10))


def test_layers_of_later_adapters_are_of_our_classes_too():
    model = adapted()
    model.add_adapter("second", LoraConfig(target_modules=["v_proj"]))
    base = model.get_base_model().model
    assert type(base.layers[1].self_attn.v_proj) is Linear
    assert type(base.embed_tokens) is Embedding
    plain = lorica.get_peft_model(models.tiny_llama(), lorica.LoraConfig(**FIELDS)).get_base_model().model
    assert type(plain.layers[1].self_attn.q_proj) is lorica.layers.LoraLayer
    assert isinstance(plain.layers[1].self_attn.q_proj, Linear)
    assert not isinstance(plain.embed_tokens, Linear)


def test_pefts_functions_read_our_models():
    """transformers and accelerate call these themselves."""
    model = adapted()
    ours_, theirs = lorica.get_peft_model_state_dict(model), peft.get_peft_model_state_dict(model)
    assert ours_.keys() == theirs.keys()
    assert all(torch.equal(ours_[name], tensor) for name, tensor in theirs.items())
    other = get_peft_model(models.tiny_llama(), LoraConfig(**FIELDS))
    peft.set_peft_model_state_dict(other, theirs)
    batch = models.ids(2, 5)
    assert torch.equal(models.logits(other.eval(), batch), models.logits(model.eval(), batch))


def test_compiled_models_compute_the_same():
    model = adapted(use_dora=False).eval()
    batch = models.ids(2, 5)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(models.logits(compiled, batch), models.logits(model, batch))


def sharded(folder: str) -> tuple[float, bool]:
    from torch.distributed.fsdp import fully_shard

    import lorica.parallel

    model = adapted(task_type="CAUSAL_LM").train()
    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        loss = model(input_ids=models.ids(2, 7), labels=models.ids(2, 7)).loss
        loss.backward()
        lorica.parallel.sum_gradients(model)
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return float(loss), isinstance(model, peft.PeftModelForCausalLM)


@pytest.mark.slow
def test_they_keep_their_names_when_they_are_sharded(tmp_path):
    """``fully_shard`` gives modules classes of its own, made of ours."""
    results = ranks.run(2, sharded, str(tmp_path))
    model = adapted(task_type="CAUSAL_LM").train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        loss = model(input_ids=models.ids(2, 7), labels=models.ids(2, 7)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert results[0] == (pytest.approx(float(loss), rel=1e-5), True)
    read = real.library("peft").PeftModel.from_pretrained(models.tiny_llama(), Path(tmp_path))
    batch = models.ids(2, 5)
    expected = models.logits(model.eval(), batch)
    torch.testing.assert_close(models.logits(read.eval(), batch), expected, rtol=1e-4, atol=1e-5)
