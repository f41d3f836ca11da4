"""Adding, switching, disabling, merging and removing adapters leaves the model as PEFT leaves it."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable

import pytest
import torch
import twins
from torch import nn
from twins import lorica, peft

from cases import OPS, Op
from models import ids, mlp, tiny_bert, tiny_gpt2, tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

BATCH = torch.linspace(-1, 1, 30).view(3, 10)
FIRST = {"target_modules": ["lin0"], "r": 4, "lora_alpha": 6, "modules_to_save": ["head"]}
SECOND = {"target_modules": ["lin0", "lin1"], "r": 2, "use_rslora": True, "modules_to_save": ["head"]}


def pair_of_two() -> twins.Twins:
    pair = twins.adapt(mlp(), FIRST)
    twins.add(pair, "second", SECOND)
    twins.share_factors(pair)
    return pair


def status(model) -> tuple[list[dict], dict]:
    """Everything that the status functions say; only the list of layers has no order."""
    layers = sorted((dataclasses.asdict(s) for s in model.get_layer_status()), key=lambda s: s["name"])
    return layers, dataclasses.asdict(model.get_model_status())


def assert_same_status(pair: twins.Twins) -> None:
    with twins.quiet():
        theirs, ours = (status(model) for model in pair)
    if theirs[1]["merged_adapters"] == "irregular":  # PEFT counts saved modules, which never merge, as not merged
        theirs[1]["merged_adapters"] = sorted({name for layer in theirs[0] for name in layer["merged_adapters"]})
    assert ours == theirs


def assert_alike(pair: twins.Twins) -> None:
    theirs, ours = pair
    assert_same_status(pair)
    twins.assert_same_parameters(pair)
    assert ours.active_adapters == theirs.active_adapters
    assert ours.active_adapter == theirs.active_adapter
    assert sorted(ours.peft_config) == sorted(theirs.peft_config)
    twins.assert_close(ours(BATCH), theirs(BATCH))


def keeping_flags(model: nn.Module, action: Callable[[], None]) -> None:
    """Do something and undo what it did to ``requires_grad``.

    In PEFT, turning adapters off and on again lets every active one train, also one that was frozen; lorica's switch
    has nothing to do with what trains (``test_switching_off_and_on_leaves_what_trains_alone``).
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    action()
    for parameter, requires_grad in flags:
        parameter.requires_grad_(requires_grad)


STEPS = {
    "set second": lambda m: m.set_adapter("second"),
    "set default": lambda m: m.set_adapter("default"),
    "set for inference": lambda m: m.set_adapter("default", inference_mode=True),
    "disable layers": lambda m: keeping_flags(m, m.base_model.disable_adapter_layers),
    "enable layers": lambda m: keeping_flags(m, m.base_model.enable_adapter_layers),
    "freeze": lambda m: m.set_requires_grad("default", requires_grad=False),
    "thaw both": lambda m: m.set_requires_grad(["default", "second"]),
    # Of both at once, PEFT would leave the resting one's copy of a whole module trainable when the other is set again.
    "thaw": lambda m: m.set_requires_grad(m.active_adapters),
    "merge": lambda m: m.merge_adapter(),
    "unmerge": lambda m: m.unmerge_adapter(),
    "merge second": lambda m: m.merge_adapter(adapter_names=["second"]),
    "safe merge": lambda m: m.merge_adapter(safe_merge=True),
    "delete default": lambda m: m.delete_adapter("default"),
    "train": lambda m: m.train(),
}

STORIES = [
    ["set second", "set default", "train"],
    ["set for inference", "set second"],
    ["disable layers", "enable layers"],
    ["disable layers", "set second", "enable layers"],
    ["freeze", "thaw both", "set second"],
    ["merge", "unmerge"],
    ["safe merge", "unmerge", "set second", "merge", "unmerge"],
    ["set second", "merge second", "unmerge", "set default"],
    ["merge", "disable layers", "enable layers"],
    ["delete default"],
    ["set second", "delete default", "train"],
    ["set second", "delete default", "set second", "merge", "unmerge"],
]


@pytest.mark.parametrize("story", STORIES, ids=" > ".join)
def test_every_step_leaves_the_same_state(story: list[str]) -> None:
    pair = pair_of_two()
    assert_alike(pair)
    for step in story:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # merging twice, deleting what is active: either may say so
            for model in pair:
                STEPS[step](model)
        assert_alike(pair)


@pytest.mark.parametrize("before", ["default", "second"])
def test_deleting_the_only_adapter_of_a_layer(before: str) -> None:
    """PEFT keeps an empty wrapper around such a layer; the base layer itself will do as well."""
    pair = pair_of_two()
    for model in pair:
        model.set_adapter(before)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.delete_adapter("second")
    theirs, ours = pair
    assert ours.active_adapters == theirs.active_adapters == ["default"]
    twins.assert_close(ours(BATCH), theirs(BATCH))
    parameters = [
        {n.replace(".base_layer", ""): (p.shape, p.requires_grad) for n, p in model.named_parameters()}
        for model in pair
    ]
    assert parameters[1] == parameters[0]
    twins.add(pair, "second", SECOND)
    twins.share_factors(pair)
    for model in pair:
        model.set_adapter("second")
    assert_alike(pair)


@pytest.mark.parametrize("seed", range(6))
def test_random_stories(seed: int) -> None:
    """Any order of switching, disabling and merging."""
    generator = torch.Generator().manual_seed(seed)
    names = ["set second", "set default", "disable layers", "enable layers", "freeze", "thaw", "train"]
    pair = pair_of_two()
    for index in torch.randint(0, len(names), (12,), generator=generator).tolist():
        for model in pair:
            STEPS[names[index]](model)
        assert_alike(pair)


def test_switching_off_and_on_leaves_what_trains_alone() -> None:
    ours = pair_of_two()[1]
    ours.set_requires_grad("default", requires_grad=False)
    flags = {name: parameter.requires_grad for name, parameter in ours.named_parameters()}
    for action in (ours.base_model.disable_adapter_layers, ours.base_model.enable_adapter_layers):
        action()
        assert {name: parameter.requires_grad for name, parameter in ours.named_parameters()} == flags


def test_disabling_for_a_while() -> None:
    pair = pair_of_two()
    base = mlp()
    for model in pair:
        with model.disable_adapter():
            assert torch.equal(model(BATCH), base(BATCH))
    assert_alike(pair)
    for model in pair:
        model.merge_adapter()
        with model.disable_adapter():
            twins.assert_close(model(BATCH), base(BATCH))


@pytest.mark.parametrize("name", ["merge_and_unload", "unload"])
def test_unloading_restores_the_classes(name: str) -> None:
    pair = pair_of_two()
    head = {f"head.{key}": t for key, t in pair[1].base_model.model.head.original_module.state_dict().items()}
    theirs, ours = (getattr(model, name)() for model in pair)
    assert type(ours).__name__ == type(theirs).__name__ == "MLP"
    assert [(n, type(m)) for n, m in ours.named_modules()] == [(n, type(m)) for n, m in theirs.named_modules()]
    expected = dict(theirs.state_dict())
    if name == "unload":  # PEFT hands out the trained copy of the head; "the original base model" has the original
        expected |= head
    twins.assert_same_tensors(dict(ours.state_dict()), expected, 1e-6)
    flags = [{n: p.requires_grad for n, p in model.named_parameters()} for model in (theirs, ours)]
    if name == "unload":
        flags = [{n: flag for n, flag in model.items() if n not in head} for model in flags]
    assert flags[1] == flags[0]


def test_printed_text(capsys) -> None:
    for build, fields in ((mlp, FIRST), (tiny_llama, {}), (tiny_bert, {"task_type": "SEQ_CLS"})):
        for model in twins.adapt(build(), fields):
            model.print_trainable_parameters()
        theirs, ours = capsys.readouterr().out.splitlines()
        assert ours == theirs


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
@pytest.mark.filterwarnings("ignore:.*groups.*")
def test_status_of_every_base_layer(op: Op) -> None:
    fields = {"target_modules": ["target"], "r": 4, **op.fields}
    pair = twins.adapt(op.build(), fields)
    assert_same_status(pair)


@pytest.mark.parametrize("inference_mode", [False, True])
def test_inference_mode(inference_mode: bool) -> None:
    pair = twins.adapt(mlp(), {**FIRST, "inference_mode": inference_mode})
    twins.assert_same_parameters(pair)
    twins.add(pair, "second", {**SECOND, "inference_mode": not inference_mode})
    twins.assert_same_parameters(pair)


def test_injection_without_a_wrapper() -> None:
    """``inject_adapter_in_model`` and the state-dict functions on the bare model."""
    models = []
    for library in (peft, lorica):
        model = copy.deepcopy(mlp())
        config = library.LoraConfig(target_modules=["lin0", "lin1"], init_lora_weights=False, r=4)
        models.append(library.inject_adapter_in_model(config, model, adapter_name="mine"))
        assert models[-1] is model
    theirs, ours = models
    twins.randomise(theirs)
    tensors = peft.get_peft_model_state_dict(theirs, adapter_name="mine")
    assert sorted(tensors) == ["lin0.lora_A.weight", "lin0.lora_B.weight", "lin1.lora_A.weight", "lin1.lora_B.weight"]
    lorica.set_peft_model_state_dict(ours, tensors, adapter_name="mine")
    twins.assert_same_tensors(lorica.get_peft_model_state_dict(ours, adapter_name="mine"), tensors)
    twins.assert_same_tensors(dict(ours.state_dict()), dict(theirs.state_dict()))
    twins.assert_same_run((theirs, ours), BATCH)
    flags = [{n: p.requires_grad for n, p in model.named_parameters()} for model in models]
    assert flags[1] == flags[0]


def test_injecting_twice() -> None:
    models = []
    for library in (peft, lorica):
        model = mlp()
        for name, targets in (("one", ["lin0"]), ("two", ["lin0", "lin1"])):
            config = library.LoraConfig(target_modules=targets, init_lora_weights=False, r=3)
            with twins.quiet():
                model = library.inject_adapter_in_model(config, model, adapter_name=name)
        models.append(model)
    theirs, ours = models
    twins.randomise(theirs)
    for name in ("one", "two"):
        tensors = peft.get_peft_model_state_dict(theirs, adapter_name=name)
        lorica.set_peft_model_state_dict(ours, tensors, adapter_name=name)
        twins.assert_same_tensors(lorica.get_peft_model_state_dict(ours, adapter_name=name), tensors)
    # PEFT leaves "one" trainable though it is no longer active; only the active one is compared
    flags = [{n: p.requires_grad for n, p in model.named_parameters() if ".one." not in n} for model in models]
    assert flags[1] == flags[0]
    twins.assert_close(ours(BATCH), theirs(BATCH))


def test_injection_on_the_meta_device() -> None:
    for library in (peft, lorica):
        config = library.LoraConfig(target_modules=["lin0"])
        model = library.inject_adapter_in_model(config, mlp(), low_cpu_mem_usage=True)
        assert {p.device.type for n, p in model.named_parameters() if "lora_" in n} == {"meta"}
        tensors = {"lin0.lora_A.weight": torch.ones(8, 10), "lin0.lora_B.weight": torch.ones(20, 8)}
        library.set_peft_model_state_dict(model, tensors, low_cpu_mem_usage=True)
        assert {p.device.type for p in model.parameters()} == {"cpu"}
        assert bool((model.lin0.lora_A["default"].weight == 1).all())


def test_classes_follow_the_task() -> None:
    for task, build in (
        ("CAUSAL_LM", tiny_llama),
        ("SEQ_CLS", tiny_bert),
        ("TOKEN_CLS", lambda: tiny_bert("TokenClassification")),
        ("QUESTION_ANS", lambda: tiny_bert("QuestionAnswering")),
        (None, mlp),
    ):
        targets = ["lin0"] if task is None else None
        fields = {"task_type": task, "target_modules": targets}
        theirs, ours = twins.adapt(build(), fields)
        assert type(ours).__name__ == type(theirs).__name__
        assert type(ours.base_model).__name__ == type(theirs.base_model).__name__ == "LoraModel"
        assert ours.modules_to_save == theirs.modules_to_save
        assert ours.get_base_model() is ours.base_model.model


@pytest.mark.parametrize(
    ("build", "fields"),
    [(tiny_gpt2, {"target_modules": ["c_attn"]}), (mlp, {"target_modules": ["lin0"], "fan_in_fan_out": True})],
    ids=["gpt2", "mlp"],
)
@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*")
def test_a_wrong_fan_in_fan_out_is_corrected(build, fields: dict) -> None:
    pair = twins.adapted(build(), fields)
    twins.assert_same_parameters(pair)
    twins.assert_same_run(pair, BATCH if build is mlp else ids(1, 3), 2e-6)


def test_unknown_names_are_refused(tmp_path) -> None:
    for library in (peft, lorica):
        model = library.get_peft_model(mlp(), library.LoraConfig(target_modules=["lin0"]))
        with pytest.raises((ValueError, KeyError), match="nope"):
            model.set_adapter("nope")
        with pytest.raises((ValueError, KeyError), match="nope"):
            model.delete_adapter("nope")
        with pytest.raises(ValueError, match="nope"):
            model.save_pretrained(str(tmp_path), selected_adapters=["nope"])
        assert not list(tmp_path.iterdir())
