"""Names are matched as PEFT matches them, with wildcards besides."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorica import LoraConfig
from lorica.targets.match import matches, pattern_value, selected, shortest_names

PARTS = st.sampled_from(["a", "b", "q_proj", "layers", "0", "1"])
KEYS = st.lists(PARTS, min_size=1, max_size=5).map(".".join)


@given(KEYS, st.lists(KEYS, min_size=1, max_size=3))
def test_a_list_means_equal_names_and_endings_at_a_dot(key, names):
    assert matches(names, key) == any(f".{key}".endswith(f".{name}") for name in names)


@given(KEYS, KEYS)
def test_a_string_is_an_expression_for_the_whole_name(key, name):
    assert matches(re.escape(name), key) == (name == key)


@given(st.sets(KEYS, min_size=1, max_size=8), st.data())
def test_short_names_mean_what_the_long_ones_did(keys, data):
    chosen = data.draw(st.sets(st.sampled_from(sorted(keys)), min_size=1))
    # A name can be the ending of one that is not chosen; no list of names can tell those apart, PEFT's neither.
    others = {key for key in keys - chosen if not any(f".{key}".endswith(f".{name}") for name in chosen)}
    short = shortest_names(chosen, others)
    assert {key for key in chosen | others if matches(short, key)} == chosen
    assert len(short) <= len(chosen)


@pytest.mark.parametrize(
    ("name", "key", "meant"),
    [
        ("*.layers.0.*.linear_qkv", "decoder.layers.0.attention.linear_qkv", True),
        ("*.layers.0.*.linear_qkv", "decoder.layers.10.attention.linear_qkv", False),
        ("*.linear_fc1", "layers.3.mlp.linear_fc1", True),
        ("layers.*.mlp", "layers.3.mlp", True),
        ("layers.*.mlp", "x.layers.3.mlp", False),
        ("*a.b", "xaxb", False),
    ],
)
def test_wildcards(name, key, meant):
    assert matches([name], key) is meant
    if name.startswith("*"):
        assert matches(name, key) is meant


@pytest.mark.parametrize(
    ("fields", "chosen"),
    [
        ({"layers_to_transform": 1}, {"m.layers.1.q", "m.layers.1.experts.0.q"}),
        ({"layers_to_transform": [0]}, {"m.layers.0.q", "m.h.0.q"}),
        ({"layers_to_transform": [0], "layers_pattern": "layers"}, {"m.layers.0.q"}),
        ({"layers_to_transform": [0], "layers_pattern": ["h", "blocks"]}, {"m.h.0.q"}),
        ({"layers_to_transform": []}, {"m.layers.0.q", "m.layers.1.q", "m.h.0.q", "m.layers.1.experts.0.q", "m.q"}),
    ],
)
def test_layers_are_chosen_by_their_first_number(fields, chosen):
    config = LoraConfig(target_modules=["q"], **fields)
    keys = ["m.layers.0.q", "m.layers.1.q", "m.h.0.q", "m.layers.1.experts.0.q", "m.q"]
    assert {key for key in keys if selected(config, config.target_modules, key)} == chosen


def test_the_first_pattern_that_fits_the_end_of_a_name_counts():
    patterns = {"q_proj": 4, r"layers\.1\..*": 2, "proj": 9}
    assert pattern_value(patterns, "layers.1.q_proj", 8) == 4
    assert pattern_value(patterns, "layers.1.k_proj", 8) == 2
    assert pattern_value(patterns, "layers.0.k_proj", 8) == 8
    assert pattern_value(None, "layers.0.k_proj", 8) == 8
