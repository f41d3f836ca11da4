"""What users of peft do, as functions of the library. Each returns what it saw, to be compared.

Every function whose name has no underscore in front and that takes the library first is run on both.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
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


# ---- merging --------------------------------------------------------------------------------------------------------


def merging_and_unmerging(lib: Any, tmp_path: Path) -> Any:
    model = _adapted(lib)
    seen = [_seen(model)]
    model.merge_adapter()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    seen += [_seen(model), layer.merged, list(layer.merged_adapters), layer.weight]
    model.unmerge_adapter()
    seen += [_seen(model), layer.merged]
    return seen


def merging_twice_and_unmerging_twice(lib: Any, tmp_path: Path) -> Any:
    model = _mlp(lib)
    model.merge_adapter()
    weight = model.base_model.model.lin0.weight.clone()
    model.merge_adapter()
    same = torch.equal(weight, model.base_model.model.lin0.weight)
    model.unmerge_adapter()
    layer = model.base_model.model.lin0
    return same, _warned(layer.unmerge)


def switching_a_merged_model_warns(lib: Any, tmp_path: Path) -> Any:
    model = _mlp(lib)
    model.add_adapter("second", lib.LoraConfig(target_modules=["lin0"]))
    model.merge_adapter()
    said = _warned(lambda: model.set_adapter("second"))
    return sorted(set(said)), model.base_model.model.lin0.merged


def a_merged_adapter_is_not_deleted(lib: Any, tmp_path: Path) -> Any:
    model = _mlp(lib)
    model.merge_adapter()
    kind, text = _said(lambda: model.delete_adapter("default"))
    return kind, "merged" in text


def merging_for_good(lib: Any, tmp_path: Path) -> Any:
    model = _adapted(lib)
    expected = _seen(model)
    merged = model.merge_and_unload(safe_merge=True)
    return expected, _seen(merged), sorted(merged.state_dict()), type(merged).__name__, hasattr(merged, "peft_config")


def merging_chosen_adapters(lib: Any, tmp_path: Path) -> Any:
    model = _adapted(lib)
    model.add_adapter("second", lib.LoraConfig(target_modules=["v_proj"], r=2))
    randomise(model, seed=4)
    return _seen(model.merge_and_unload(adapter_names=["second"]))


def merging_what_is_broken(lib: Any, tmp_path: Path) -> Any:
    model = _mlp(lib)
    with torch.no_grad():
        model.base_model.model.lin0.lora_A["default"].weight[0, 0] = torch.nan
    return _said(lambda: model.merge_and_unload(safe_merge=True))


def unloading(lib: Any, tmp_path: Path) -> Any:
    plain = _adapted(lib).unload()
    return _seen(plain), sorted(plain.state_dict())


# ---- state ----------------------------------------------------------------------------------------------------------


def the_state_of_layers_and_model(lib: Any, tmp_path: Path) -> Any:
    model = _mlp(lib)
    model.add_adapter("second", lib.LoraConfig(target_modules=["lin0"]))
    model.merge_adapter(["default"])
    layers = [dataclasses.asdict(status) for status in model.get_layer_status()]
    whole = dataclasses.asdict(model.get_model_status())
    whole.pop("base_model_type")
    return layers, whole


def the_configurations_of_a_model(lib: Any, tmp_path: Path) -> Any:
    model = _mlp(lib)
    config = model.peft_config["default"]
    same = model.active_peft_config is config
    return same, isinstance(config, lib.LoraConfig), _plain(config), str(model.peft_type.split(".")[-1])


def scales_are_changed(lib: Any, tmp_path: Path) -> Any:
    model = _mlp(lib)
    layer = model.base_model.model.lin0
    seen = [dict(layer.scaling)]
    layer.scale_layer(3.0)
    seen += [dict(layer.scaling), _seen(model)]
    layer.unscale_layer(3.0)
    layer.set_scale("default", 0.5)
    seen += [dict(layer.scaling)]
    layer.unscale_layer()
    seen += [dict(layer.scaling)]
    layer.scaling["default"] = 7.0
    seen += [dict(layer.scaling), _seen(model)]
    return seen


def copies_and_pickles(lib: Any, tmp_path: Path) -> Any:
    model = _mlp(lib)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.base_model.model.lin0.lora_B["default"].weight.zero_()
    again = pickle.loads(pickle.dumps(model))
    return _seen(model), _seen(other), _seen(again), type(again).__name__


def tensors_of_an_adapter(lib: Any, tmp_path: Path) -> Any:
    model = _mlp(lib, modules_to_save=["head"], target_modules=["lin0"])
    state = lib.get_peft_model_state_dict(model)
    other = _mlp(lib, modules_to_save=["head"], target_modules=["lin0"])
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    result = lib.set_peft_model_state_dict(other, state)
    partial = {name: tensor for name, tensor in state.items() if "lora_B" not in name}
    partial["base_model.model.nobody.lora_A.weight"] = torch.zeros(2)
    second = lib.set_peft_model_state_dict(other, partial)
    return state, lib.get_peft_model_state_dict(other), list(result.unexpected_keys), len(second.unexpected_keys)


def the_base_model_inside(lib: Any, tmp_path: Path) -> Any:
    model = _mlp(lib, modules_to_save=["head"], target_modules=["lin0"])
    state = lib.get_base_model_state_dict(model)
    changed = {name: tensor + 1 for name, tensor in state.items()}
    result = lib.set_base_model_state_dict(model, changed)
    wrong = _said(lambda: lib.set_base_model_state_dict(model, {**changed, "nobody": torch.zeros(1)}))
    loose = lib.set_base_model_state_dict(model, {"nobody": torch.zeros(1)}, strict=False)
    after = lib.get_base_model_state_dict(model)
    return state, after, tuple(map(list, result)), wrong, sorted(loose.missing_keys), loose.unexpected_keys


# ---- files ----------------------------------------------------------------------------------------------------------


def the_files_of_several_adapters(lib: Any, tmp_path: Path) -> Any:
    model = _mlp(lib)
    model.add_adapter("second", lib.LoraConfig(target_modules=["lin0"]))
    model.save_pretrained(tmp_path / "all")
    model.save_pretrained(tmp_path / "one", selected_adapters=["second"])
    return sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())


def adapters_are_loaded(lib: Any, tmp_path: Path) -> Any:
    _adapted(lib, task_type="CAUSAL_LM").save_pretrained(tmp_path)
    frozen = lib.PeftModel.from_pretrained(models.tiny_llama(), tmp_path)
    training = lib.PeftModel.from_pretrained(models.tiny_llama().train(), tmp_path, is_trainable=True)
    seen = [
        (type(m).__name__, m.training, _trains(m), m.peft_config["default"].inference_mode) for m in (frozen, training)
    ]
    frozen.train()
    result = frozen.load_adapter(tmp_path, adapter_name="again")
    seen.append((frozen.training, frozen.active_adapters, list(result.missing_keys), _trains(frozen)))
    frozen.load_adapter(tmp_path, adapter_name="third", is_trainable=True)
    frozen.set_adapter("again")
    return seen, _trains(frozen), _seen(frozen)


def missing_tensors_warn(lib: Any, tmp_path: Path) -> Any:
    from safetensors.torch import load_file, save_file

    _mlp(lib).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    dropped = "base_model.model.lin0.lora_A.weight"
    save_file({name: t for name, t in tensors.items() if name != dropped}, tmp_path / "adapter_model.safetensors")
    said = _warned(lambda: lib.PeftModel.from_pretrained(models.mlp(), tmp_path))
    return len(said), "missing" in said[0], "lin0.lora_A" in said[0]


def loading_with_a_given_configuration(lib: Any, tmp_path: Path) -> Any:
    _mlp(lib).save_pretrained(tmp_path)
    config = lib.LoraConfig(target_modules=["lin0", "lin1"], lora_alpha=32)
    model = lib.PeftModel.from_pretrained(models.mlp(), tmp_path, config=config)
    kind, text = _said(lambda: lib.PeftModel.from_pretrained(models.mlp(), tmp_path, config={"r": 2}))
    return _seen(model), kind, text


def auto_classes(lib: Any, tmp_path: Path) -> Any:
    models.tiny_llama().save_pretrained(tmp_path / "base")
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    fields = {"target_modules": TARGETS}
    randomise(lib.get_peft_model(base, lib.LoraConfig(task_type="CAUSAL_LM", **fields))).save_pretrained(tmp_path / "a")
    model = lib.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "a")
    wrong = [
        _said(lambda: lib.AutoPeftModelForSeq2SeqLM.from_pretrained(tmp_path / "a")),
        _said(lambda: lib.AutoPeftModel.from_pretrained(tmp_path / "a")),
        _said(lambda: lib.AutoPeftModelForCausalLM()),
    ]
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    randomise(lib.get_peft_model(base, lib.LoraConfig(**fields))).save_pretrained(tmp_path / "b")
    free = lib.AutoPeftModel.from_pretrained(tmp_path / "b")
    refused = _said(lambda: lib.AutoPeftModel.from_pretrained(tmp_path / "b", import_allowlist=[]))
    return _seen(model), _seen(free), type(model).__name__, type(free).__name__, wrong, refused


def generating_text(lib: Any, tmp_path: Path) -> Any:
    model = _adapted(lib, task_type="CAUSAL_LM").eval()
    batch = models.ids(2, 5)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    written = [model.generate(batch, **options), model.generate(input_ids=batch, num_beams=2, **options)]
    with model.disable_adapter():
        written.append(model.generate(batch, **options))
    return written


# ---- helpers --------------------------------------------------------------------------------------------------------


def functions_for_models_without_a_wrapper(lib: Any, tmp_path: Path) -> Any:
    import importlib

    functional = importlib.import_module(f"{lib.__name__}.functional")
    model = models.mlp()
    for name in ("first", "second"):
        functional.inject_adapter_in_model(lib.LoraConfig(target_modules=["lin0", "lin1"]), model, name)
    randomise(model)
    functional.set_adapter(model, "first")
    seen = [_seen(model), _trains(model)]
    functional.set_adapter(model, ["first", "second"], inference_mode=True)
    seen += [_seen(model), _trains(model)]
    functional.set_requires_grad(model, "second")
    seen += [_trains(model)]
    left = functional.delete_adapter(model, "first", prefix="lora_")
    seen += [_seen(model), left, sorted(functional.get_peft_model_state_dict(model, adapter_name="second"))]
    return seen


def which_modules_match(lib: Any, tmp_path: Path) -> Any:
    import importlib

    place = importlib.import_module(f"{lib.__name__}.tuners.tuners_utils")
    config = lib.LoraConfig(target_modules=["lin0", "lin1"], exclude_modules=["lin1"])
    keys = ["lin0", "a.lin0", "lin1", "head", "xlin0"]
    model = _mlp(lib)
    found = place.inspect_matched_modules(model.base_model)
    base = {kind: [name for name in names if "lora_" not in name] for kind, names in found.items()}
    return [bool(place.check_target_module_exists(config, key)) for key in keys], base


def small_helpers(lib: Any, tmp_path: Path) -> Any:
    import importlib

    utils = importlib.import_module(f"{lib.__name__}.utils")
    other = importlib.import_module(f"{lib.__name__}.utils.other")
    ids = torch.tensor([[3, 4, -100], [5, 6, 7]])
    model = _mlp(lib)
    lib.cast_mixed_precision_params(model, torch.float16)
    dtypes = sorted((name, str(p.dtype)) for name, p in model.named_parameters())
    return other.shift_tokens_right(ids, 0, 1), utils.infer_device(), dtypes


def a_dictionary_of_buffers(lib: Any, tmp_path: Path) -> Any:
    import importlib

    kind = importlib.import_module(f"{lib.__name__}.tuners._buffer_dict").BufferDict
    holder = nn.Module()
    holder.kept = kind({"b": torch.ones(2), "a": torch.zeros(1)}, persistent=True)
    holder.lost = kind([("x", torch.ones(2))])
    holder.kept["c"] = torch.ones(3)
    popped = holder.kept.pop("a")
    del holder.kept["c"]
    said = (
        _said(lambda: holder.kept.update(3)),
        _said(lambda: holder.kept.update([(1, 2, 3)])),
        _said(lambda: holder.kept(1)),
    )
    seen = sorted(holder.state_dict()), list(holder.kept), len(holder.kept), "b" in holder.kept, popped
    holder.kept.clear()
    return seen, said, len(holder.kept), dict(holder.lost.items())


def principal_components_of_batches(lib: Any, tmp_path: Path) -> Any:
    import importlib

    kind = importlib.import_module(f"{lib.__name__}.utils.incremental_pca").IncrementalPCA
    data = models.floats(60, 6) @ torch.diag(torch.tensor([5.0, 4.0, 3.0, 1.0, 0.5, 0.1])) + 2.0
    data = data @ torch.linalg.qr(models.floats(6, 6))[0]
    whole = kind(n_components=3, batch_size=20).fit(data)
    pieces = kind(n_components=3)
    for piece in data.split(25):
        pieces.partial_fit(piece)
    names = ["components_", "singular_values_", "mean_", "var_", "explained_variance_", "explained_variance_ratio_"]
    wrong = [
        _said(lambda: kind(lowrank=True)),
        _said(lambda: kind(n_components=5, lowrank=True, lowrank_q=2)),
        _said(lambda: kind(n_components=9).fit(data)),
        _said(lambda: kind(n_components=5).partial_fit(data[:3])),
        _said(lambda: pieces.partial_fit(data[:, :4])),
    ]
    found = [{name: getattr(pca, name).float() for name in names} for pca in (whole, pieces)]
    return found, whole.transform(data).float(), int(pieces.n_samples_seen_), wrong


def modules_without_memory(lib: Any, tmp_path: Path) -> Any:
    import importlib

    place = importlib.import_module(f"{lib.__name__}.utils.integrations")
    with place.init_empty_weights():
        empty, kept = nn.BatchNorm1d(3), place.skip_init_on_device(nn.Linear)(2, 2)
    with place.init_empty_weights(include_buffers=True):
        all_empty = nn.BatchNorm1d(3)
    after = nn.Linear(2, 2)
    models_ = {"empty": empty, "kept": kept, "all": all_empty, "after": after}
    return {name: sorted((k, t.is_meta) for k, t in m.state_dict().items()) for name, m in models_.items()}


def which_packages_there_are(lib: Any, tmp_path: Path) -> Any:
    import importlib

    place = importlib.import_module(f"{lib.__name__}.import_utils")
    asked = ["aqlm", "eetq", "hqq", "optimum", "bnb", "torchao", "inc", "bnb_4bit", "diffusers"]
    found = {name: getattr(place, f"is_{name}_available")() for name in asked}
    return found, [getattr(place, f"is_transformers_ge_{version}") for version in ("v5", "v5_1_0", "v5_6_0")]


def constants(lib: Any, tmp_path: Path) -> Any:
    import importlib

    place = importlib.import_module(f"{lib.__name__}.utils.constants")
    names = ["DUMMY_MODEL_CONFIG", "INCLUDE_LINEAR_LAYERS_SHORTHAND", "CONFIG_NAME", "WEIGHTS_NAME"]
    names += ["SAFETENSORS_WEIGHTS_NAME", "EMBEDDING_LAYER_NAMES", "SEQ_CLS_HEAD_NAMES", "TOKENIZER_CONFIG_NAME"]
    names += ["TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING", "MIN_TARGET_MODULES_FOR_OPTIMIZATION"]
    mapping = importlib.import_module(f"{lib.__name__}.mapping")
    prefix = mapping.PEFT_TYPE_TO_PREFIX_MAPPING[lib.PeftType.LORA]
    tuner = mapping.PEFT_TYPE_TO_TUNER_MAPPING["LORA"].__name__
    return {name: getattr(place, name) for name in names}, prefix, tuner, sorted(lib.MODEL_TYPE_TO_PEFT_MODEL_MAPPING)


def checkpointing_by_either_spelling(lib: Any, tmp_path: Path) -> Any:
    model = _adapted(lib)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    seen = [model.is_gradient_checkpointing]
    model.gradient_checkpointing_disable()
    seen += [model.is_gradient_checkpointing]
    model.enable_input_require_grads()
    return seen


def preparing_for_quantised_training(lib: Any, tmp_path: Path) -> Any:
    model = models.tiny_llama().to(torch.bfloat16)
    lib.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return sorted({str(p.dtype) for p in model.parameters()}), _trains(model)
