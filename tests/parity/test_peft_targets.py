"""A config selects the modules that it selects in PEFT."""

from __future__ import annotations

import copy

import pytest
import twins
from torch import nn
from twins import lorica, peft

from models import embedding_net, mlp, tiny_bert, tiny_bert_encoder, tiny_gpt2, tiny_llama, tiny_t5, with_model_type

LLAMA_CONFIGS = [
    {"target_modules": ["q_proj"]},
    {"target_modules": ["q_proj", "v_proj"]},
    {"target_modules": ["self_attn.q_proj", "mlp.up_proj"]},
    {"target_modules": ["model.layers.1.mlp.down_proj"]},
    {"target_modules": ["lm_head"]},
    {"target_modules": ["embed_tokens"]},
    {"target_modules": ["embed_tokens", "lm_head", "k_proj"]},
    {"target_modules": r".*\.(q|v)_proj"},
    {"target_modules": r".*\.layers\.0\..*_proj"},
    {"target_modules": r"model\.layers\.\d+\.mlp\.(gate|up)_proj"},
    {"target_modules": r".*\.q_proj|.*\.v_pro"},  # the second half matches no whole name
    {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.q_pro"},
    {"target_modules": "all-linear"},
    {"target_modules": "All-Linear"},
    {"target_modules": "all-linear", "exclude_modules": ["q_proj", "down_proj"]},
    {"target_modules": "all-linear", "exclude_modules": r".*mlp.*"},
    {"target_modules": "all-linear", "modules_to_save": ["up_proj"]},
    {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
    {"target_modules": ["q_proj", "k_proj"], "exclude_modules": "model.layers.1.self_attn.q_proj"},
    {"target_modules": ["q_proj"], "layers_to_transform": 1},
    {"target_modules": ["q_proj"], "layers_to_transform": [0]},
    {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 1], "layers_pattern": "layers"},
    {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["layers"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]},
    {"target_modules": None},
    {"target_modules": None, "exclude_modules": ["v_proj"]},
    {"target_modules": None, "layers_to_transform": [1]},
    {"target_modules": ["q_proj", "does_not_exist"]},
]

OTHERS = [
    (tiny_gpt2, {}),
    (tiny_gpt2, {"target_modules": "all-linear"}),
    (tiny_gpt2, {"target_modules": ["c_proj"], "exclude_modules": ["mlp.c_proj"]}),
    (tiny_gpt2, {"target_modules": ["c_attn"], "layers_to_transform": [1], "layers_pattern": "h"}),
    (tiny_bert, {"task_type": "SEQ_CLS"}),
    (tiny_bert, {"task_type": "SEQ_CLS", "target_modules": "all-linear"}),
    (tiny_bert, {"task_type": "SEQ_CLS", "modules_to_save": ["pooler"]}),
    (lambda: tiny_bert("TokenClassification"), {"task_type": "TOKEN_CLS"}),
    (lambda: tiny_bert("QuestionAnswering"), {"task_type": "QUESTION_ANS"}),
    (tiny_bert_encoder, {"task_type": "FEATURE_EXTRACTION"}),
    (tiny_bert_encoder, {"target_modules": "all-linear"}),
    (tiny_t5, {"task_type": "SEQ_2_SEQ_LM"}),
    (tiny_t5, {"task_type": "SEQ_2_SEQ_LM", "target_modules": "all-linear"}),
    (tiny_t5, {"target_modules": ["q", "wo"], "exclude_modules": r".*decoder.*"}),
    (tiny_llama, {"task_type": "CAUSAL_LM", "target_modules": "all-linear"}),
    (mlp, {"target_modules": ["lin0", "lin1"]}),
    (mlp, {"target_modules": r".*1", "modules_to_save": ["head"]}),
    (mlp, {"target_modules": "all-linear"}),
    (embedding_net, {"target_modules": ["emb"], "modules_to_save": ["head"]}),
]


def selected(model: nn.Module) -> tuple[list[str], dict[str, tuple]]:
    """The names of adapted modules and the parameters that adaptation made."""
    parameters = {n: tuple(p.shape) for n, p in model.named_parameters() if "lora_" in n or "modules_to_save" in n}
    return sorted(model.base_model.targeted_module_names), parameters


def both(build, fields: dict) -> list:
    """What PEFT and lorica select, or the type of the refusal."""
    results = []
    for library in (peft, lorica):
        if library is peft:
            with twins.quiet():
                results.append(selected(library.get_peft_model(build(), library.LoraConfig(**fields))))
        else:
            results.append(selected(library.get_peft_model(build(), library.LoraConfig(**fields))))
    return results


@pytest.mark.parametrize("fields", LLAMA_CONFIGS, ids=str)
@pytest.mark.filterwarnings("ignore:.*does_not_exist.*")
def test_llama(fields: dict) -> None:
    theirs, ours = both(tiny_llama, fields)
    assert ours == theirs


@pytest.mark.parametrize(("build", "fields"), OTHERS, ids=lambda value: getattr(value, "__name__", str(value)))
@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*")
def test_other_models(build, fields: dict) -> None:
    theirs, ours = both(build, fields)
    assert ours == theirs


def experts() -> nn.Module:
    """Numbers inside numbers: layers that hold experts, and a number at the very front."""
    block = nn.ModuleDict({"gate": nn.Linear(3, 3), "experts": nn.ModuleList([nn.Linear(3, 3) for _ in range(2)])})
    named = nn.ModuleDict({"w": nn.Linear(3, 3)})
    root = nn.Module()
    root.model = nn.ModuleDict({"layers": nn.ModuleList([copy.deepcopy(block) for _ in range(3)])})
    root.moe = nn.ModuleDict(
        {
            "layers": nn.ModuleList(
                [nn.ModuleDict({"experts": nn.ModuleList([copy.deepcopy(named) for _ in range(2)])}) for _ in range(3)]
            )
        }
    )
    root.layers = nn.ModuleList([copy.deepcopy(named) for _ in range(3)])
    return root


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["gate"], "layers_to_transform": [1]},
        {"target_modules": ["gate", "w"], "layers_to_transform": [0, 2], "layers_pattern": "layers"},
        {"target_modules": ["w"], "layers_to_transform": 1, "layers_pattern": ["layers", "experts"]},
        {"target_modules": ["w"], "layers_to_transform": [1], "layers_pattern": "experts"},
        {"target_modules": ["w", "gate"], "layers_to_transform": [2]},
        {"target_modules": ["w", "gate"], "layers_to_transform": []},
        {"target_modules": ["experts.0.w", "1.w"]},
        {"target_modules": r".*experts\.\d+\.w"},
        {"target_modules": ["layers.1.gate", "model.layers.0.gate"]},
    ],
    ids=str,
)
def test_numbers_inside_numbers(fields: dict) -> None:
    theirs, ours = both(experts, fields)
    assert ours == theirs


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["nope"]},
        {"target_modules": "nope"},
        {"target_modules": "q_proj"},  # a string is a regular expression for the whole name
        {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [9]},
        {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "blocks"},
        {"target_modules": ["input_layernorm"]},
        {"target_modules": ["rotary_emb"]},
        {"target_modules": r"model\.layers\.\d+"},
        {"target_modules": []},
    ],
    ids=str,
)
def test_what_selects_nothing_usable_is_an_error_in_both(fields: dict) -> None:
    with twins.quiet(), pytest.raises(ValueError):  # noqa: PT011 - PEFT's wordings differ
        peft.get_peft_model(tiny_llama(), peft.LoraConfig(**fields))
    with pytest.raises(ValueError, match=r"target|layer|module"):
        lorica.get_peft_model(tiny_llama(), lorica.LoraConfig(**fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ".*q_proj", "layers_to_transform": [0]},
        {"target_modules": ".*q_proj", "layers_pattern": "layers"},
        {"target_modules": ["q_proj"], "layers_pattern": "layers"},
        {"task_type": "NO_SUCH_TASK"},
    ],
    ids=str,
)
def test_contradictions_are_refused_by_the_config(fields: dict) -> None:
    for library in (peft, lorica):
        with pytest.raises(ValueError, match=r"layers_|task"):
            library.LoraConfig(**fields)


def architectures() -> dict[str, object]:
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    return TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING


def forest(model_type: str) -> nn.Module:
    """A tree that holds every default target name of every architecture, twice, and one decoy."""
    names = sorted({name for value in architectures().values() if not isinstance(value, str) for name in value})
    block = nn.ModuleDict({name: nn.Linear(3, 3) for name in [*names, "decoy"]})
    root = nn.Module()
    root.layers = nn.ModuleList([nn.ModuleDict({"attn": block}), nn.ModuleDict({"attn": nn.ModuleDict(block)})])
    root.language_model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"q_proj": nn.Linear(3, 3)})])})
    return with_model_type(root, model_type)


# PEFT rewrites Mixtral's config for fused experts, and loses its default targets there: the table itself judges.
REWRITTEN = {"mixtral"}


@pytest.mark.parametrize("model_type", sorted(REWRITTEN))
def test_default_targets_that_peft_loses(model_type: str) -> None:
    model = lorica.get_peft_model(forest(model_type), lorica.LoraConfig())
    assert {name.rpartition(".")[2] for name in model.base_model.targeted_module_names} == set(
        architectures()[model_type]
    )


@pytest.mark.parametrize("model_type", sorted(set(architectures()) - REWRITTEN))
def test_default_targets_of_every_architecture(model_type: str) -> None:
    found = []
    for library in (peft, lorica):
        with twins.quiet():
            model = library.get_peft_model(forest(model_type), library.LoraConfig())
        found.append(sorted(model.base_model.targeted_module_names))
        assert found[-1]
    assert found[1] == found[0]


def test_an_unknown_architecture_asks_for_targets() -> None:
    for library in (peft, lorica):
        with pytest.raises(ValueError, match="target_modules"):
            library.get_peft_model(with_model_type(mlp(), "brand_new"), library.LoraConfig())
