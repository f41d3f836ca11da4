"""What users of peft do, as functions of the library. Each returns what it saw, to be compared.

Every function whose name has no underscore in front and that takes the library first is run on both.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import models
from models import randomise

TARGETS = ["q_proj", "down_proj"]


def _adapted(lib: Any, **fields: Any) -> Any:
    return randomise(lib.get_peft_model(models.tiny_llama(), lib.LoraConfig(**{"target_modules": TARGETS, **fields})))


def _mlp(lib: Any, **fields: Any) -> Any:
    return randomise(lib.get_peft_model(models.mlp(), lib.LoraConfig(**{"target_modules": ["lin0", "lin1"], **fields})))


def _seen(model: Any) -> torch.Tensor:
    with torch.no_grad():
        batch = models.floats(3, 10) if hasattr(model, "lin0") else models.ids(2, 7)
        return models.logits(model.eval(), batch)


def _trains(model: nn.Module) -> list[str]:
    return sorted(name for name, p in model.named_parameters() if p.requires_grad)


class Message(str):
    """What an error says. lorica may say more after what peft says."""


def _said(act: Callable[[], Any]) -> tuple[bool, Message]:
    """Whether a call raises a ValueError, and what it says."""
    try:
        act()
    except (ValueError, KeyError, TypeError, AssertionError, OSError, RuntimeError) as error:
        return isinstance(error, ValueError), Message(error)
    return False, Message("nothing was raised")


def _warned(act: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        act()
    return [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]


def _plain(config: Any) -> dict[str, Any]:
    ours = {"dropout_position", "lora_dtype", "share_expert_adapters", "normalize_moe_lora", "a2a_experimental"}
    values = {k: v for k, v in config.to_dict().items() if k not in {"peft_version", "runtime_config", *ours}}
    return {k: sorted(v) if isinstance(v, set) else v for k, v in values.items()}


# ---- configurations -------------------------------------------------------------------------------------------------


def the_defaults_of_a_configuration(lib: Any, tmp_path: Path) -> Any:
    return _plain(lib.LoraConfig())


def a_configuration_is_saved_and_read(lib: Any, tmp_path: Path) -> Any:
    config = lib.LoraConfig(r=3, target_modules=["b", "a"], task_type="CAUSAL_LM", rank_pattern={"a": 2}, use_dora=True)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    read = lib.PeftConfig.from_pretrained(tmp_path)
    again = lib.LoraConfig.from_pretrained(tmp_path)
    raw = lib.PeftConfig.from_json_file(tmp_path / "adapter_config.json")
    raw["target_modules"] = written["target_modules"] = sorted(written["target_modules"])
    written.pop("peft_version")
    raw.pop("peft_version")
    return written, raw, _plain(read), _plain(again), isinstance(read, lib.LoraConfig), isinstance(read, lib.PeftConfig)


def a_configuration_from_a_dictionary(lib: Any, tmp_path: Path) -> Any:
    made = lib.get_peft_config({"peft_type": "LORA", "task_type": "SEQ_CLS", "r": 5})
    return _plain(made), made.peft_type == lib.PeftType.LORA, made.task_type == lib.TaskType.SEQ_CLS


def a_configuration_with_unknown_fields(lib: Any, tmp_path: Path) -> Any:
    said = _warned(lambda: lib.PeftConfig.from_peft_type(peft_type="LORA", r=3, foobar=1, spam=2))
    return said[0].partition("ignored")[0]


def wrong_configurations(lib: Any, tmp_path: Path) -> Any:
    wrong = [
        {"task_type": "CASUAL_LM"},
        {"use_dora": True, "lora_bias": True},
        {"target_modules": "x.*", "layers_to_transform": [1]},
        {"target_modules": "x.*", "layers_pattern": "h"},
        {"target_modules": ["x"], "layers_pattern": "h"},
    ]
    return [_said(lambda fields=fields: lib.LoraConfig(**fields)) for fields in wrong]


def a_configuration_without_a_file(lib: Any, tmp_path: Path) -> Any:
    return _said(lambda: lib.PeftConfig.from_pretrained(tmp_path)), _said(
        lambda: lib.PeftModel.from_pretrained(models.mlp(), tmp_path)
    )


def a_file_where_a_directory_should_be(lib: Any, tmp_path: Path) -> Any:
    (tmp_path / "file").write_text("")
    path = str(tmp_path / "file")
    return [_said(lambda: lib.LoraConfig().save_pretrained(path)), _said(lambda: _mlp(lib).save_pretrained(path))]


# ---- adapting -------------------------------------------------------------------------------------------------------


def the_names_of_parameters(lib: Any, tmp_path: Path) -> Any:
    found = {}
    for key, fields in {
        "plain": {},
        "dora": {"use_dora": True},
        "bias": {"lora_bias": True, "target_modules": ["lin0"]},
        "saved": {"modules_to_save": ["head"], "target_modules": ["lin0"]},
    }.items():
        model = _mlp(lib, **fields)
        found[key] = sorted((name, tuple(p.shape), p.requires_grad) for name, p in model.named_parameters())
    return found


def the_trainable_parameters_are_printed(lib: Any, tmp_path: Path, capsys: Any) -> Any:
    model = _adapted(lib)
    capsys.readouterr()
    model.print_trainable_parameters()
    return capsys.readouterr().out, model.get_nb_trainable_parameters()


def targets_that_are_not_there(lib: Any, tmp_path: Path) -> Any:
    said = [
        _said(lambda: lib.get_peft_model(models.mlp(), lib.LoraConfig(target_modules=["foo"]))),
        _said(lambda: lib.get_peft_model(models.mlp(), lib.LoraConfig(target_modules="foo.*"))),
        _said(lambda: lib.get_peft_model(models.mlp(), lib.LoraConfig())),
    ]
    return [(kind, Message(text.replace("`in", "` in"))) for kind, text in said]  # peft lacks a space


def a_target_that_cannot_be_adapted(lib: Any, tmp_path: Path) -> Any:
    kind, text = _said(lambda: lib.get_peft_model(models.mlp(), lib.LoraConfig(target_modules=["act"])))
    return kind, Message(text.partition(" supported: ")[0])


def a_second_adaptation_warns(lib: Any, tmp_path: Path) -> Any:
    model = models.mlp()
    lib.get_peft_model(model, lib.LoraConfig(target_modules=["lin0"]))
    said = _warned(lambda: lib.get_peft_model(model, lib.LoraConfig(target_modules=["lin0"]), adapter_name="second"))
    return [text for text in said if "second time" in text]


def another_base_model_warns(lib: Any, tmp_path: Path) -> Any:
    config = lib.LoraConfig(target_modules=["lin0"])
    config.base_model_name_or_path = "some/model"
    said = _warned(lambda: lib.get_peft_model(models.mlp(), config))
    return said, config.base_model_name_or_path


def a_name_within_the_prefix_warns(lib: Any, tmp_path: Path) -> Any:
    first = _warned(lambda: lib.get_peft_model(models.mlp(), lib.LoraConfig(target_modules=["lin0"]), "lora"))
    model = _mlp(lib)
    return first, _warned(lambda: model.add_adapter("lora_", lib.LoraConfig(target_modules=["lin0"])))


def a_revision_is_noted(lib: Any, tmp_path: Path) -> Any:
    config = lib.LoraConfig(target_modules=["lin0"], revision="one")
    said = _warned(lambda: lib.get_peft_model(models.mlp(), config, revision="two"))
    return said, config.revision


def targets_are_chosen(lib: Any, tmp_path: Path) -> Any:
    choices = [
        {"target_modules": "all-linear"},
        {"target_modules": r".*layers\.1\..*_proj"},
        {"target_modules": ["q_proj", "o_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
        {"target_modules": ["embed_tokens", "lm_head"]},
        {"target_modules": None},
    ]
    return [sorted(_adapted(lib, **fields).targeted_module_names) for fields in choices]


def ranks_and_scales_of_layers(lib: Any, tmp_path: Path) -> Any:
    model = _adapted(
        lib,
        r=4,
        lora_alpha=6,
        rank_pattern={"down_proj": 2, "layers.1.self_attn.q_proj": 3},
        alpha_pattern={"q_proj": 12},
        use_rslora=True,
        lora_dropout=0.25,
    )
    found = {}
    for name in model.targeted_module_names:
        layer = model.get_base_model().get_submodule(name)
        found[name] = {
            "r": dict(layer.r),
            "alpha": dict(layer.lora_alpha),
            "scaling": dict(layer.scaling),
            "p": layer.lora_dropout["default"].p,
            "rslora": dict(layer.use_rslora),
            "dora": layer.use_dora["default"],
            "sizes": (layer.in_features, layer.out_features),
            "shapes": (tuple(layer.lora_A["default"].weight.shape), tuple(layer.lora_B["default"].weight.shape)),
            "delta": layer.get_delta_weight("default"),
            "weight": layer.weight,
            "base": type(layer.get_base_layer()).__name__,
            "merged": (layer.merged, list(layer.merged_adapters)),
            "active": list(layer.active_adapters),
            "off": layer.disable_adapters,
        }
    return found


def kinds_of_layers(lib: Any, tmp_path: Path) -> Any:
    import importlib

    place = importlib.import_module(f"{lib.__name__}.tuners.lora.layer")
    tuners = importlib.import_module(f"{lib.__name__}.tuners.tuners_utils")
    kinds = ["Linear", "Embedding", "Conv1d", "Conv2d", "ParamWrapper", "LoraLayer"]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.emb = nn.Linear(4, 4), nn.Embedding(5, 4)
            self.one, self.two = nn.Conv1d(2, 4, 3), nn.Conv2d(2, 4, 3)

    model = lib.get_peft_model(Net(), lib.LoraConfig(target_modules=["linear", "emb", "one", "two"]))
    found = {}
    for name in ("linear", "emb", "one", "two"):
        layer = model.get_base_model().get_submodule(name)
        found[name] = [kind for kind in kinds if isinstance(layer, getattr(place, kind))]
        found[name].append(isinstance(layer, tuners.BaseTunerLayer))
        found[name].append(type(layer).__name__)
    return found, isinstance(model.base_model, tuners.BaseTuner), type(model.base_model).__name__


def variants_of_layers(lib: Any, tmp_path: Path) -> Any:
    model = _mlp(lib, use_dora=True)
    plain = _mlp(lib)
    return [
        type(model.base_model.model.lin0.lora_variant["default"]).__name__,
        "default" in plain.base_model.model.lin0.lora_variant,
    ]


def injection_without_a_wrapper(lib: Any, tmp_path: Path) -> Any:
    model = lib.inject_adapter_in_model(lib.LoraConfig(target_modules=["lin0"]), models.mlp(), "first")
    state = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    empty = lib.inject_adapter_in_model(
        lib.LoraConfig(target_modules=["lin0"]), models.mlp(), "first", low_cpu_mem_usage=True
    )
    on_meta = sorted(name for name, p in empty.named_parameters() if p.is_meta)
    return state, _trains(model), on_meta, list(model.peft_config), type(model).__name__


def injection_by_the_names_of_tensors(lib: Any, tmp_path: Path) -> Any:
    names = {f"lin1.lora_{factor}.weight": torch.zeros(2, 2) for factor in "AB"}
    config = lib.LoraConfig(target_modules=["lin1"], r=2)
    model = lib.inject_adapter_in_model(config, models.mlp(), state_dict=names)
    return sorted(model.state_dict())


# ---- several adapters -----------------------------------------------------------------------------------------------


def adapters_come_and_go(lib: Any, tmp_path: Path) -> Any:
    model = _adapted(lib)
    model.add_adapter("second", lib.LoraConfig(target_modules=TARGETS, r=2))
    randomise(model, seed=4)
    seen = [(model.active_adapter, model.active_adapters, _trains(model), _seen(model))]
    model.set_adapter("second")
    seen.append((model.active_adapter, model.active_adapters, _trains(model), _seen(model)))
    model.base_model.set_adapter(["default", "second"])
    seen.append((sorted(model.active_adapters), None, _trains(model), _seen(model)))
    model.set_adapter("default", inference_mode=True)
    seen.append((model.active_adapter, model.active_adapters, _trains(model), _seen(model)))
    model.set_requires_grad("second")
    seen.append((None, None, _trains(model), None))
    model.set_requires_grad(["second", "default"], requires_grad=False)
    seen.append((None, None, _trains(model), None))
    said = _warned(lambda: model.delete_adapter("default"))
    seen.append((sorted(set(said)), model.active_adapters, sorted(model.peft_config), _seen(model)))
    return seen


def what_is_said_of_adapters(lib: Any, tmp_path: Path) -> Any:
    model = _mlp(lib)
    config = lib.LoraConfig(target_modules=["lin0"])
    return [
        _said(lambda: model.add_adapter("default", config)),
        _said(lambda: model.set_adapter("nobody")),
        _said(lambda: model.delete_adapter("nobody")),
        _said(lambda: model.save_pretrained(tmp_path, selected_adapters=["nobody"])),
    ]


def one_adapter_with_biases(lib: Any, tmp_path: Path) -> Any:
    model = _mlp(lib, bias="all")
    trained = _trains(model)
    said = _said(lambda: model.add_adapter("second", lib.LoraConfig(target_modules=["lin0"], bias="lora_only")))
    return trained, said, list(model.peft_config)


def adapters_are_turned_off(lib: Any, tmp_path: Path) -> Any:
    model = _adapted(lib)
    seen = [_seen(model)]
    with model.disable_adapter():
        seen.append(_seen(model))
        with model.disable_adapter():
            seen.append(_seen(model))
    seen.append(_seen(model))
    model.base_model.disable_adapter_layers()
    seen.append(_seen(model))
    model.base_model.enable_adapter_layers()
    seen.append(_seen(model))
    return seen, _trains(model)


def turning_off_trained_biases_warns(lib: Any, tmp_path: Path) -> Any:
    model = _mlp(lib, bias="all")
    return _warned(model.base_model.disable_adapter_layers)


def modules_that_train_whole(lib: Any, tmp_path: Path) -> Any:
    model = _mlp(lib, target_modules=["lin0"], modules_to_save=["head"])
    model.add_adapter("second", lib.LoraConfig(target_modules=["lin0"], modules_to_save=["head"]))
    randomise(model, seed=4)
    seen = [_seen(model)]
    model.set_adapter("second")
    seen.append(_seen(model))
    with model.disable_adapter():
        seen.append(_seen(model))
    return (
        seen,
        _trains(model),
        model.modules_to_save,
        _said(lambda: model.base_model.set_adapter(["default", "second"]))[0],
    )


def rows_that_name_their_adapters(lib: Any, tmp_path: Path) -> Any:
    model = _adapted(lib)
    model.add_adapter("second", lib.LoraConfig(target_modules=["v_proj"], r=2))
    randomise(model, seed=4)
    batch = models.ids(3, 7)
    with torch.no_grad():
        mixed = model.eval()(batch, adapter_names=["default", "__base__", "second"]).logits
    wrong = _said(lambda: model(batch, adapter_names=["default"]))[0]
    return mixed, _said(lambda: model(batch, adapter_names=["default", "nobody", "default"]))[0], wrong


def adapters_are_combined(lib: Any, tmp_path: Path) -> Any:
    model = _mlp(lib, r=3)
    model.add_adapter("second", lib.LoraConfig(target_modules=["lin0", "lin1"], r=3))
    randomise(model, seed=4)
    seen = []
    for kind in ("linear", "cat", "svd", "ties", "magnitude_prune"):
        density = {"density": 0.5} if kind in ("ties", "magnitude_prune") else {}
        model.add_weighted_adapter(["default", "second"], [0.7, 0.2], kind, combination_type=kind, **density)
        model.set_adapter(kind)
        seen.append((_seen(model), model.peft_config[kind].r, sorted(model.peft_config)))
    wrong = [
        _said(lambda: model.add_weighted_adapter(["default", "nobody"], [1.0, 1.0], "new")),
        _said(lambda: model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "new", "magic")),
    ]
    return seen, [kind for kind, _ in wrong]


def an_adapter_as_plain_lora(lib: Any, tmp_path: Path) -> Any:
    model = _mlp(lib, r=4)
    config, tensors = lib.convert_to_lora(model, rank=4)
    lib.save_as_lora(tmp_path / "plain", model, rank=4)
    plain = lib.PeftModel.from_pretrained(models.mlp(), tmp_path / "plain")
    return isinstance(config, lib.LoraConfig), config.r, sorted(tensors), _seen(model), _seen(plain)


def tokens_that_train(lib: Any, tmp_path: Path) -> Any:
    model = lib.get_peft_model(
        models.tiny_llama(), lib.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3, 7])
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.add_(0.5)
    model.save_pretrained(tmp_path / "tokens")
    again = lib.PeftModel.from_pretrained(models.tiny_llama(), tmp_path / "tokens")
    return _trains(model), sorted(lib.get_peft_model_state_dict(model)), _seen(model), _seen(again)
