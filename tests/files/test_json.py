"""JSON from strangers is bounded and unambiguous."""

from __future__ import annotations

import pytest

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
}


@pytest.mark.parametrize(("text", "message"), BAD.values(), ids=BAD)
def test_it_is_refused_with_the_file_and_the_reason(tmp_path, text, message):
    path = tmp_path / "adapter_config.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CheckpointError, match=message) as caught:
        read_json_object(path)
    assert str(path) in str(caught.value)


def test_a_large_file_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "MAX_BYTES", 10)
    path = tmp_path / "adapter_config.json"
    path.write_text('{"r": 8, "lora_alpha": 16}')
    with pytest.raises(CheckpointError, match="too large"):
        read_json_object(path)
