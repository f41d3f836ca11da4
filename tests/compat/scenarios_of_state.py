"""More of what users of peft do: merging, state, files and helpers; see :mod:`scenarios`."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from pathlib import Path
from typing import Any

import torch
from scenarios import TARGETS, _adapted, _mlp, _plain, _said, _seen, _trains, _warned
from torch import nn

import models
from models import randomise

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


def what_fully_sharded_parallelism_wraps(lib: Any, tmp_path: Path) -> Any:
    """Blocks, and leaves that train, so that a flat parameter holds either frozen or trained weights."""
    import importlib

    place = importlib.import_module(f"{lib.__name__}.utils.other")
    model = _adapted(lib)
    policy = place.fsdp_auto_wrap_policy(model)
    modules = model.named_modules()
    return sorted(name for name, module in modules if policy(module=module, recurse=False, nonwrapped_numel=1))
