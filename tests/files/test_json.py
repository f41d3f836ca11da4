"""JSON from strangers is bounded and unambiguous."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lorica.errors import CheckpointError
from lorica.files import json as reading
from lorica.files.json import read_json_object

BAD = {
    "not JSON": ("{", "not valid JSON"),
    "not UTF-8": (b"\xff\xfe\x00", "not valid JSON"),
    "a list": ("[1]", "expected a JSON object"),
    "a key twice": ('{"r": 8, "r": 9}', "'r' stands twice"),
    "a key twice inside": ('{"a": {"r": 8, "r": 9}}', "'r' stands twice"),
    "too deep": ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
    "65 deep": ('{"a":' + "[" * 64 + "]" * 64 + "}", "nested too deeply"),
    "NaN": ('{"a": {"b": [1, NaN]}}', r"a\.b\[1\]: NaN is no finite number"),
    "infinity": ('{"a": -Infinity}', "a: -Infinity is no finite number"),
    "too large": ('{"a": 1e999}', "a: 1e999 is no finite number"),
    "many digits": ('{"a": ' + "7" * 10_000 + "}", "a: 7+… is no finite number of at most 20 digits"),
    "NUL": (r'{"a": ["b\u0000"]}', r"a\[0\]: holds NUL"),
    "NUL in a key": (r'{"a": {"\u0000": 1}}', "holds NUL"),
    "half a character": (r'{"a": "\ud800"}', "a: holds NUL, or half of a character"),
}


def written(folder: Path, text: str | bytes) -> Path:
    (folder / "adapter_config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder / "adapter_config.json"


@pytest.mark.parametrize(("text", "message"), BAD.values(), ids=BAD)
def test_it_is_refused_with_the_file_and_the_reason(text, message, tmp_path):
    path = written(tmp_path, text)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_json_object(path)
    assert str(path) in str(caught.value)


def test_what_configurations_hold_is_read(tmp_path):
    value = {"a": [1, -2.5, 1e-3, True, None, {"b": "größe 🙂", "c": []}], "seed": 2**64 - 1, "": {}}
    assert read_json_object(written(tmp_path, json.dumps(value))) == value
    assert read_json_object(written(tmp_path, json.dumps(value, ensure_ascii=False))) == value
    deep = '{"a":' + "[" * 63 + "]" * 63 + "}"
    assert read_json_object(written(tmp_path, deep)) == json.loads(deep)


def test_a_large_file_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "MAX_BYTES", 10)
    monkeypatch.setattr(reading, "read_fully", lambda *_: pytest.fail("read"))
    with pytest.raises(CheckpointError, match="too large"):
        read_json_object(written(tmp_path, '{"r": 8, "lora_alpha": 16}'))


@pytest.mark.parametrize("size", [8, 80])
def test_a_file_that_changes_while_it_is_read_is_refused(size, tmp_path, monkeypatch):
    path = written(tmp_path, "{" + " " * 50 + "}")
    mode = path.stat().st_mode
    monkeypatch.setattr(reading.os, "fstat", lambda _: SimpleNamespace(st_size=size, st_mode=mode))
    with pytest.raises(CheckpointError, match="changed while it was read"):
        read_json_object(path)


def test_values_are_counted_before_they_are_made(tmp_path, monkeypatch):
    monkeypatch.setattr(reading.json, "loads", lambda *_, **__: pytest.fail("parsed"))
    with pytest.raises(CheckpointError, match=r"more values than a configuration has \(limit 62\)"):
        read_json_object(written(tmp_path, '{"a": [' + "{}," * 40 + "{}]}"), limit=1000)


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**21), 10**21) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)


def is_impossible(value: Any) -> bool:
    """Whether some part of a value is none that a configuration can have."""
    if isinstance(value, dict):
        return any(map(is_impossible, (*value, *value.values())))
    if isinstance(value, list):
        return any(map(is_impossible, value))
    if isinstance(value, float):
        return not math.isfinite(value)
    return "\0" in value if isinstance(value, str) else len(str(value)) > 20


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=st.dictionaries(st.text(max_size=3), values, max_size=4), only_ascii=st.booleans())
@example(value={"\0": []}, only_ascii=False)
def test_any_object_is_read_as_it_is_or_refused(value: dict[str, Any], only_ascii: bool, tmp_path: Path):
    path = written(tmp_path, json.dumps(value, ensure_ascii=only_ascii))
    if is_impossible(value):
        with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
            read_json_object(path)
    else:
        assert read_json_object(path) == value
