"""Every field of a configuration is of its type and in its range, or the error names it."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lorica
from lorica.config.options import OPTIONS
from lorica.errors import ConfigError, LoricaError
from models import mlp

#: What a JSON file can say, and what Python can.
VALUES = [
    None,
    True,
    0,
    1,
    -1,
    3,
    10**18,
    10**400,
    10**5000,
    0.5,
    -0.5,
    1e30,
    math.nan,
    math.inf,
    "",
    "x",
    "lin0",
    "1",
    "\ud800\0",
    "x" * 100_000,
    [],
    [1],
    ["lin0"],
    [[]],
    [None],
    [[0, 1]],
    [-1, 1.5],
    ["lin0", 3],
    {},
    {"x": 1},
    {"lin0": 2},
    {"lin0": "2"},
    {"lin0": math.nan},
    {"lin0": [0]},
    {"lin0": None},
    {1: 2},
    object(),
    torch.ones(2),
    torch.float32,
    b"lin0",
    {"lin0"},
    {3},
]

#: Those that would put an object into a file that JSON has no words for, or that are no value of a file.
FIELDS = [field.name for field in dataclasses.fields(lorica.LoraConfig)]


def shown(value: object) -> str:
    return f"{type(value).__name__}-{str(value)[:12] if not isinstance(value, int) else value.bit_length()}"


def _tried(field: str, value: object) -> lorica.LoraConfig | None:
    """Return the configuration, or None where it is refused as it should be."""
    given = copy.copy(value)
    try:
        return lorica.LoraConfig(**{"target_modules": ["lin0", "lin1"], field: given})
    except ConfigError as error:
        text = str(error)
    assert field in text
    assert len(text) < 2000
    text.encode()  # goes to a terminal, and into a log
    return None


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.filterwarnings("ignore")
def test_a_field_is_right_or_refused_by_name(field) -> None:
    """What is accepted can be used, written and read again; nothing is accepted that breaks later."""
    accepted = 0
    for value in VALUES:
        config = _tried(field, value)
        if config is None:
            continue
        accepted += 1
        again = lorica.LoraConfig(**json.loads(_written(config)))
        assert again.to_dict() == config.to_dict()
        _used(config)
    assert accepted < len(VALUES) - 8


def _written(config: lorica.LoraConfig) -> str:
    fields = {name: sorted(one) if isinstance(one, set) else one for name, one in config.to_dict().items()}
    return json.dumps(fields, allow_nan=False)


def _used(config: lorica.LoraConfig) -> None:
    base = mlp()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    try:
        model = lorica.get_peft_model(base, config)
    except LoricaError:
        assert all(torch.equal(tensor, base.state_dict()[name]) for name, tensor in before.items())
        return
    if not config.arrow_config:  # which needs other adapters
        assert torch.isfinite(model(torch.ones(1, 10))).all()


OPTION_FIELDS = [(group, field.name) for group, cls in OPTIONS.items() for field in dataclasses.fields(cls)]


@pytest.mark.parametrize(
    ("group", "field"), [*OPTION_FIELDS, ("loftq_config", "loftq_bits"), ("loftq_config", "loftq_iter")]
)
@pytest.mark.filterwarnings("ignore")
def test_a_field_of_options_is_right_or_refused_by_name(group, field) -> None:
    for value in VALUES:
        try:
            config = lorica.LoraConfig(target_modules=["lin0"], **{group: {field: copy.copy(value)}})
        except ConfigError as error:
            text = str(error)
        else:
            _written(config)
            _used(config)
            continue
        assert group in text
        assert field in text


@pytest.mark.parametrize("group", [*OPTIONS, "loftq_config"])
@pytest.mark.filterwarnings("ignore")
def test_options_are_a_mapping_with_known_names(group) -> None:
    for value in (3, "x", [1], True, 1.5, {"no_such_option": 1}, {"__class__": 1}, {3: 4}):
        if group == "loftq_config" and isinstance(value, dict):
            continue  # PEFT keeps what it does not know
        with pytest.raises(ConfigError, match=group):
            lorica.LoraConfig(**{group: value})


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"lora_alpha": 1e30}, "lora_alpha"),
        ({"lora_alpha": math.nan}, "lora_alpha"),
        ({"lora_alpha": -math.inf}, "lora_alpha"),
        ({"r": 20_000_000}, "r="),
        ({"r": True}, "r="),
        ({"rank_pattern": {"lin0": 20_000_000}}, "rank_pattern"),
        ({"rank_pattern": {"lin0": 1.0}}, "rank_pattern"),
        ({"alpha_pattern": {"lin0": 1e30}}, "alpha_pattern"),
        ({"alpha_pattern": {"lin0": math.nan}}, "alpha_pattern"),
        ({"layer_replication": [[0, 10**9]]}, "layer_replication"),
        ({"layer_replication": [[0, 1]] * 100_000}, "layer_replication"),
        ({"monteclora_config": {"num_samples": 10**9}}, "num_samples"),
        ({"monteclora_config": {"buffer_size": 10**12}}, "buffer_size"),
        ({"velora_config": {"num_groups": 10**12}}, "num_groups"),
        ({"loftq_config": {"loftq_iter": 10**9}, "init_lora_weights": "loftq"}, "loftq_iter"),
        ({"arrow_config": {"task_adapter_names": [3]}}, "task_adapter_names"),
        ({"megatron_config": {"a": [math.nan, object()]}}, "megatron_config"),
        ({"modules_to_save": [f"n{i}" for i in range(100_000)]}, "modules_to_save"),
        ({"trainable_token_indices": {f"n{i}": [0] for i in range(100_000)}}, "trainable_token_indices"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_would_cost_a_machine_is_refused(fields, name) -> None:
    with pytest.raises(ConfigError, match=name):
        lorica.LoraConfig(**{"target_modules": ["lin0"], **fields})


def test_what_was_accepted_still_is() -> None:
    """Values that are in adapters of the hub, or that callers pass."""
    config = lorica.LoraConfig(
        r=256,
        lora_alpha=512.5,
        lora_dropout=0,
        target_modules=("lin0", "lin1"),
        modules_to_save=[],
        layers_pattern="",
        use_dora=None,
        loftq_config=None,
        rank_pattern=None,
        alpha_pattern={"lin0": 3},
        auto_mapping={"base_model_class": "A", "parent_library": "b", "unsloth_fixed": True},
        lora_dtype=torch.bfloat16,
        revision=None,
        task_type=lorica.TaskType.CAUSAL_LM,
    )
    assert config.target_modules == {"lin0", "lin1"}
    assert (config.use_dora, config.loftq_config, config.rank_pattern) == (False, {}, {})
    assert config.lora_dtype == "bfloat16"


_JSON = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=6), st.sampled_from(["lin0", "eva"])
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from([*FIELDS, *OPTIONS, "x"]), _JSON, min_size=1, max_size=4))
def test_any_object_is_a_configuration_or_a_readable_error(tmp_path_factory, fields) -> None:
    path = tmp_path_factory.mktemp("fields") / "adapter_config.json"
    path.write_text(json.dumps(fields | {"peft_type": "LORA"}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            config = lorica.PeftConfig.from_pretrained(path.parent)
        except LoricaError as error:
            assert str(path) in str(error)  # noqa: PT017 - either is right
            return
        assert isinstance(config, lorica.LoraConfig)
        _written(config)
