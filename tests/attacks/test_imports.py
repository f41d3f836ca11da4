"""Nothing that a configuration names is imported, looked up outside of a table, read or written."""

from __future__ import annotations

import builtins
import json
import sys
import warnings

import pytest
import torch

import lorica
from lorica.compat import peft as compat
from lorica.convert.peft import read_peft_adapter
from lorica.errors import ConfigError, LoricaError
from lorica.train.models import base_of
from models import ids, mlp, tiny_llama

EVIL = "evil_module_of_a_stranger"

#: A module that no test imports.
UNUSED = "transformers.models.cvt.modeling_cvt"

#: A value of a field, which names something that could be imported or called.
NAMES = {
    "megatron_core": [EVIL, "os", "megatron.core.transformer", "megatron", "../evil"],
    "lora_dtype": ["_inductor", "_dynamo", "onnx", "load", "nn", "Tensor", "__loader__", "int8", "os", EVIL],
    "init_lora_weights": ["__import__", "os.system", EVIL, "pissa_niter_99999999999", "pissa_niter_" + "9" * 5000],
    "task_type": ["os.system", EVIL],
    "peft_type": ["os.system", "PROMPT_TUNING", EVIL],
    "bias": [EVIL],
    "dropout_position": [EVIL],
    "corda_config": [{"corda_method": EVIL}, {"__class__": EVIL}],
    "lora_ga_config": [{"direction": EVIL}, {"scale": "os.system"}],
    "velora_config": [{"init_type": EVIL}],
}


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """A module that anybody could import, and that says so."""
    (tmp_path / f"{EVIL}.py").write_text("import builtins\nbuiltins.evil_was_here = True\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    assert EVIL not in sys.modules
    assert not hasattr(builtins, "evil_was_here")


@pytest.fixture
def adapter(tmp_path):
    """An adapter on the disk, and what rewrites its configuration."""
    folder = tmp_path / "adapter"
    lorica.get_peft_model(mlp(), lorica.LoraConfig(target_modules=["lin0"])).save_pretrained(folder)
    file = folder / "adapter_config.json"
    fields = json.loads(file.read_text())

    def rewrite(**changes):
        file.write_text(json.dumps(fields | changes))
        return folder

    return rewrite


@pytest.mark.parametrize("library", [lorica, compat], ids=["lorica", "compat"])
@pytest.mark.parametrize("field", NAMES)
def test_names_of_a_configuration_are_looked_up_in_tables(field, library, adapter, evil) -> None:
    before = set(sys.modules)
    for value in NAMES[field]:
        folder = adapter(**{field: value})
        base = mlp()
        for door in (
            lambda folder=folder: library.PeftConfig.from_pretrained(folder),
            lambda folder=folder, base=base: library.PeftModel.from_pretrained(base, folder),
        ):
            with pytest.raises(ConfigError, match=r"adapter_config\.json") as caught:
                door()
            assert field in str(caught.value)
            assert len(str(caught.value)) < 1500
        assert not hasattr(base, "peft_config")
    added = set(sys.modules) - before
    assert all(name.startswith(("lorica.", "huggingface_hub.")) for name in added), added


def test_a_configuration_on_its_own_imports_nothing(adapter, evil) -> None:
    folder = adapter(auto_mapping={"parent_library": EVIL, "base_model_class": "Evil", "unsloth_fixed": True})
    lorica.PeftModel.from_pretrained(mlp(), folder)


@pytest.mark.parametrize(
    ("parent", "name"),
    [
        (EVIL, "Evil"),
        (f"transformers.{EVIL}", "Evil"),
        (f"transformers.../{EVIL}", "Evil"),
        ("os", "system"),
        ("transformersevil", "Evil"),
        ("transformers", "pipeline"),
        ("transformers", "AutoTokenizer"),
        ("transformers", "__name__"),
        ("transformers.utils.import_utils", "importlib"),
        ("transformers.models.llama", "sys"),
        (UNUSED, "CvtLayer"),
        ("transformers", ["LlamaForCausalLM"]),
        (None, "LlamaForCausalLM"),
        ({"transformers": 1}, "LlamaForCausalLM"),
        ("", ""),
    ],
)
def test_the_class_of_a_base_model_is_one_of_a_tables(parent, name, adapter, evil, tmp_path) -> None:
    """``auto_mapping`` names a module and a class in it."""
    base = tmp_path / "base"
    base.mkdir()
    folder = adapter(
        auto_mapping={"parent_library": parent, "base_model_class": name}, base_model_name_or_path=str(base)
    )
    with pytest.raises(ValueError, match=r"auto.mapping"):
        compat.AutoPeftModel.from_pretrained(folder)
    folder = adapter(auto_mapping={"base_model_class": name}, base_model_name_or_path=str(base))
    with pytest.raises(ConfigError, match="parent_library"):
        compat.AutoPeftModel.from_pretrained(folder)
    assert f"transformers.{EVIL}" not in sys.modules
    assert UNUSED not in sys.modules


def test_a_base_model_s_own_code_runs_only_where_the_caller_says_so(tmp_path, evil) -> None:
    """The adapter names the model, so the adapter must not decide that the model may run code."""
    base = tmp_path / "base"
    tiny_llama().save_pretrained(base)
    values = json.loads((base / "config.json").read_text())
    values["auto_map"] = {"AutoConfig": f"{EVIL}.Config", "AutoModelForCausalLM": f"{EVIL}.Model"}
    values["model_type"] = "of_a_stranger"
    model = tiny_llama()
    model.config.name_or_path = str(base)
    model.name_or_path = str(base)
    config = compat.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    compat.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    loaded = compat.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert loaded(ids(1, 3)).logits.shape == (1, 3, 40)
    (base / "config.json").write_text(json.dumps(values))
    (base / f"{EVIL}.py").write_text("import builtins\nbuiltins.evil_was_here = True\n")
    with pytest.raises(ValueError, match="trust_remote_code"):
        compat.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")


def test_an_adapter_that_names_no_base_model_says_so(adapter) -> None:
    folder = adapter(task_type="CAUSAL_LM", base_model_name_or_path=None)
    with pytest.raises(ConfigError, match="base_model_name_or_path"):
        compat.AutoPeftModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("option", ["cache_file", "covariance_file"])
def test_paths_of_a_configuration_are_not_taken_over(option, adapter, tmp_path) -> None:
    """They would be read, and written over, where the reader goes on to train."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    folder = adapter(corda_config={option: str(victim)}, init_lora_weights="corda")
    with pytest.warns(UserWarning, match=rf"corda_config\.{option}.*ignored"):
        config = lorica.LoraConfig.from_pretrained(folder)
    assert getattr(config.corda_config, option) is None
    base = mlp()
    lorica.preprocess_corda(base, config, run_model=lambda: base(torch.ones(20, 10)))
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("key", ["cls", "self", "kwargs", "__class__", "_from_fields", "to_dict", "config", ""])
def test_keys_of_a_file_are_no_arguments(key, adapter) -> None:
    with pytest.warns(UserWarning, match="later version"):
        config = lorica.LoraConfig.from_pretrained(adapter(**{key: {"r": 3}}))
    assert config.r == 8
    assert callable(config.to_dict)


def test_a_configuration_of_another_version_with_many_keys_is_told_of_briefly(adapter) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lorica.LoraConfig.from_pretrained(adapter(**{f"field_{i}": i for i in range(50_000)}))
    assert len(caught) == 1
    assert len(str(caught[0].message)) < 1000


def test_names_that_are_no_strings_are_refused_wherever_a_configuration_is_read(adapter) -> None:
    for value in (3, ["a"], {"a": 1}, True):
        with pytest.raises(LoricaError, match="base_model_name_or_path"):
            base_of(str(adapter(base_model_name_or_path=value)))
    with pytest.raises(LoricaError, match="revision"):
        base_of(str(adapter(base_model_name_or_path="a", revision=3)))
    with pytest.raises(LoricaError, match=r"adapter_config\.json: LoraConfig\.alpha_pattern"):
        read_peft_adapter(adapter(alpha_pattern=["a"]))
