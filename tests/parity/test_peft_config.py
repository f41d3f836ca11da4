"""``LoraConfig`` has PEFT's fields, defaults, dictionary and file."""

from __future__ import annotations

import dataclasses
import inspect
import json
import warnings

import pytest
import twins
from twins import lorica, peft

OWN = {
    "dropout_position",
    "lora_dtype",
    "share_expert_adapters",
    "normalize_moe_lora",
    "a2a_experimental",
    "fused_as_one",
}

CONFIGS = [
    {},
    {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"},
    {"target_modules": "all-linear", "exclude_modules": ["lm_head"], "lora_dropout": 0.1, "bias": "lora_only"},
    {"target_modules": r".*\.q_proj", "use_rslora": True, "init_lora_weights": "gaussian", "revision": "main"},
    {
        "target_modules": ["q"],
        "rank_pattern": {"q": 3},
        "alpha_pattern": {"q": 2},
        "layers_to_transform": [0, 1],
        "layers_pattern": "layers",
        "modules_to_save": ["head"],
        "inference_mode": True,
    },
    {
        "lora_bias": True,
        "init_lora_weights": False,
        "fan_in_fan_out": True,
        "ensure_weight_tying": True,
        "base_model_name_or_path": "somewhere",
    },
]


def defaults(cls: type) -> dict[str, object]:
    values = {}
    for field in dataclasses.fields(cls):
        made = field.default_factory is not dataclasses.MISSING
        values[field.name] = field.default_factory() if made else field.default
    return values


def test_fields_and_defaults() -> None:
    theirs, ours = defaults(peft.LoraConfig), defaults(lorica.LoraConfig)
    assert set(ours) - set(theirs) == OWN
    assert set(theirs) - set(ours) == set()
    for name, value in theirs.items():
        if name != "runtime_config":
            assert ours[name] == value, name
    assert defaults(lorica.LoraRuntimeConfig) == defaults(peft.LoraRuntimeConfig)


def test_fields_come_in_the_same_order() -> None:
    """Positional arguments mean the same."""
    theirs = list(inspect.signature(peft.LoraConfig).parameters)
    ours = [name for name in inspect.signature(lorica.LoraConfig).parameters if name not in OWN]
    assert ours == theirs


def test_base_config_fields_and_defaults() -> None:
    assert defaults(lorica.PeftConfig) == defaults(peft.PeftConfig)


def test_task_types() -> None:
    ours = {task.name: task.value for task in lorica.TaskType}
    assert ours == {task.name: task.value for task in peft.TaskType}
    assert str(lorica.TaskType.CAUSAL_LM.value) == "CAUSAL_LM"
    assert lorica.TaskType.CAUSAL_LM == "CAUSAL_LM"


@pytest.mark.parametrize("fields", CONFIGS, ids=range(len(CONFIGS)))
def test_dictionaries(fields: dict) -> None:
    theirs, ours = peft.LoraConfig(**fields).to_dict(), lorica.LoraConfig(**fields).to_dict()
    assert set(ours) - OWN == set(theirs)
    for name in set(theirs) - {"peft_version"}:
        assert normal(ours[name]) == normal(theirs[name]), name


def normal(value: object) -> object:
    """Lists that are or were sets have no order."""
    return sorted(value) if isinstance(value, list | set) else value


@pytest.mark.parametrize("fields", CONFIGS, ids=range(len(CONFIGS)))
def test_files(fields: dict, tmp_path) -> None:
    contents = []
    for library in (peft, lorica):
        library.LoraConfig(**fields).save_pretrained(str(tmp_path / library.__name__))
        written = json.loads((tmp_path / library.__name__ / "adapter_config.json").read_text())
        del written["peft_version"]
        contents.append({name: normal(value) for name, value in written.items()})
    assert contents[1] == contents[0]


@pytest.mark.parametrize("fields", CONFIGS, ids=range(len(CONFIGS)))
@pytest.mark.parametrize("kind", ["LoraConfig", "PeftConfig"])
def test_each_reads_the_other_without_a_warning(fields: dict, kind: str, tmp_path) -> None:
    for writer, reader in ((peft, lorica), (lorica, peft), (lorica, lorica)):
        path = str(tmp_path / f"{writer.__name__}-{reader.__name__}")
        writer.LoraConfig(**fields).save_pretrained(path)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            read = getattr(reader, kind).from_pretrained(path)
        assert type(read) is reader.LoraConfig
        expected = reader.LoraConfig(**fields).to_dict()
        actual = read.to_dict()
        assert {**actual, "peft_version": 0} == {**expected, "peft_version": 0}


def test_own_fields_are_written_only_when_set(tmp_path) -> None:
    """Fields that PEFT does not know appear in a file only when they matter, and come back."""
    lorica.LoraConfig(dropout_position="post", lora_dtype="bfloat16").save_pretrained(str(tmp_path))
    read = lorica.LoraConfig.from_pretrained(str(tmp_path))
    assert (read.dropout_position, read.lora_dtype) == ("post", "bfloat16")
    with pytest.warns(UserWarning, match="dropout_position"):
        peft.LoraConfig.from_pretrained(str(tmp_path))


def test_an_unknown_key_warns_and_is_left_out(tmp_path) -> None:
    for library in (peft, lorica):
        peft.LoraConfig(r=5, target_modules=["q"]).save_pretrained(str(tmp_path))
        path = tmp_path / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "field_of_2099": 1}))
        with pytest.warns(UserWarning, match="field_of_2099"):
            assert library.LoraConfig.from_pretrained(str(tmp_path)).r == 5


def test_runtime_config_is_not_saved(tmp_path) -> None:
    for library in (peft, lorica):
        config = library.LoraConfig(runtime_config=library.LoraRuntimeConfig())
        config.save_pretrained(str(tmp_path))
        assert "runtime_config" not in json.loads((tmp_path / "adapter_config.json").read_text())
        assert "runtime_config" not in config.to_dict()


def test_a_path_without_a_config_is_an_error(tmp_path) -> None:
    for library in (peft, lorica):
        with twins.quiet(), pytest.raises((ValueError, OSError), match="adapter_config"):
            library.PeftConfig.from_pretrained(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("get_peft_model", ""),
        ("inject_adapter_in_model", ""),
        ("get_peft_model_state_dict", ""),
        ("set_peft_model_state_dict", ""),
        ("prepare_model_for_kbit_training", ""),
        ("cast_mixed_precision_params", ""),
        ("__init__", "PeftModel"),
        ("__init__", "LoraModel"),
        ("save_pretrained", "PeftModel"),
        ("from_pretrained", "PeftModel"),
        ("load_adapter", "PeftModel"),
        ("add_adapter", "PeftModel"),
        ("set_adapter", "PeftModel"),
        ("delete_adapter", "PeftModel"),
        ("set_requires_grad", "PeftModel"),
        ("create_or_update_model_card", "PeftModel"),
        ("merge_and_unload", "LoraModel"),
        ("unload", "LoraModel"),
        ("merge_adapter", "LoraModel"),
        ("unmerge_adapter", "LoraModel"),
        ("set_adapter", "LoraModel"),
        ("delete_adapter", "LoraModel"),
        ("enable_adapter_layers", "LoraModel"),
        ("disable_adapter_layers", "LoraModel"),
        ("set_requires_grad", "LoraModel"),
    ],
)
def test_arguments_and_defaults(name: str, where: str) -> None:
    """Every call written for PEFT is valid: its arguments come in the same order, with the same defaults."""
    theirs, ours = (
        [
            (p.name, p.default)
            for p in inspect.signature(getattr(getattr(lib, where) if where else lib, name)).parameters.values()
            if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        ]
        for lib in (peft, lorica)
    )
    assert ours[: len(theirs)] == theirs
