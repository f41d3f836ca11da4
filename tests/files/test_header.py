"""Headers of safetensors files: what the format's own library takes is taken, everything else is refused by name."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lorica.errors import CheckpointError
from lorica.files import header
from lorica.files.tensors import TensorReader

ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def made(path: Path, text: str | bytes, data: bytes = b"") -> Path:
    raw = text if isinstance(text, bytes) else text.encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def of(path: Path, tensors: dict[str, Any], data: bytes = bytes(8)) -> Path:
    return made(path, json.dumps(tensors), data)


def test_what_the_formats_library_writes_is_read(tmp_path):
    tensors = {
        "b": torch.ones(3),
        "a": torch.ones(2, 0),
        "c": torch.tensor(1, dtype=torch.uint64),
        "größe": torch.ones(1),
    }
    save_file(tensors, tmp_path / "file", metadata={"format": "pt", "note": "{[,]}"})
    reader = TensorReader(tmp_path / "file")
    assert reader.shapes == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert reader.metadata == {"format": "pt", "note": "{[,]}"}
    assert [*reader.tensors] == [name for name, _ in sorted(reader.tensors.items(), key=lambda item: item[1].start)]


@pytest.mark.parametrize(
    ("dtype", "shape", "length"), [("F4", [4], 2), ("F6_E2M3", [4], 3), ("F8_E8M0", [4], 4), ("C64", [2], 16)]
)
def test_dtypes_that_are_only_copied_are_read(dtype, shape, length, tmp_path):
    path = of(tmp_path / "file", {"a": {"dtype": dtype, "shape": shape, "data_offsets": [0, length]}}, bytes(length))
    with safe_open(path, framework="pt"):
        assert TensorReader(path).shapes == {"a": tuple(shape)}


WRONG = {
    "no dtype": ({"a": {"shape": [2], "data_offsets": [0, 8]}}, "tensor a: needs dtype, shape and data_offsets"),
    "another field": ({"a": ONE | {"run": "x"}}, "tensor a: needs dtype, shape and data_offsets, and nothing else"),
    "unknown dtype": ({"a": ONE | {"dtype": "F33"}}, "tensor a: dtype F33"),
    "a dtype that is a list": ({"a": ONE | {"dtype": []}}, r"tensor a: dtype \[\]"),
    "a negative length": ({"a": ONE | {"shape": [-2]}}, "tensor a: -2"),
    "half a length": ({"a": ONE | {"shape": [2.0]}}, "tensor a: 2.0"),
    "a true length": ({"a": ONE | {"shape": [True, 2]}}, "tensor a: True"),
    "an infinite length": ({"a": ONE | {"shape": [math.inf]}}, "tensor a: inf"),
    "a shape that is a number": ({"a": ONE | {"shape": 2}}, "tensor a: shape"),
    "too many dimensions": ({"a": ONE | {"shape": [1] * 65}}, "tensor a: shape"),
    "a product that overflows": ({"a": ONE | {"shape": [2**32, 2**32, 2]}}, "tensor a: shape"),
    "a product that overflows beside 0": (
        {"a": {"dtype": "F32", "shape": [2**40, 2**40, 0], "data_offsets": [0, 0]}},
        "tensor a: shape .* overflows",
    ),
    "a length of many digits": ({"a": ONE | {"shape": [10**4000]}}, "tensor a: a number of many digits"),
    "bytes of another shape": ({"a": ONE | {"shape": [3]}}, "tensor a: shape"),
    "three offsets": ({"a": ONE | {"data_offsets": [0, 8, 8]}}, "tensor a: data_offsets"),
    "offsets that go back": ({"a": ONE | {"shape": [0], "data_offsets": [8, 0]}}, "tensor a: shape"),
    "an offset beyond the file": ({"a": ONE | {"shape": [3], "data_offsets": [0, 12]}}, "end at byte"),
    "a gap": ({"a": ONE | {"shape": [1], "data_offsets": [4, 8]}}, "tensor a: .* gap"),
    "an overlap": ({"a": ONE, "b": ONE}, "tensor b: .* overlap"),
    "bytes that nobody has": ({"a": ONE | {"shape": [1], "data_offsets": [0, 4]}}, "end at byte"),
    "metadata of numbers": ({"__metadata__": {"a": 1}, "a": ONE}, "__metadata__"),
    "metadata that is a list": ({"__metadata__": [], "a": ONE}, "__metadata__"),
    "a name with NUL": ({"a\0": ONE}, r"tensor a\\x00: a name"),
    "a name that rings": ({"a\x1b[2J": ONE}, r"tensor a\\x1b"),
    "a name with half a character": ({"a\ud800": ONE}, r"tensor a\\ud800"),
    "a long name": ({"a" * 3000: ONE}, "tensor a+…: a name"),
}


@pytest.mark.parametrize(("tensors", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_entry_is_named(tensors, message, tmp_path):
    path = of(tmp_path / "file", tensors)
    with pytest.raises(CheckpointError, match=message) as caught:
        TensorReader(path)
    assert str(path) in str(caught.value)


ENTRY = json.dumps(ONE)
TEXTS = {
    "nothing": (b"", 0, "Expecting value"),
    "a list": ("[]", 0, "no JSON object"),
    "no UTF-8": (b'{"\xff": 1}', 0, "decode"),
    "UTF-16": ("{}".encode("utf-16"), 0, "decode"),
    "a key twice": (f'{{"a":{ENTRY},"a":{ENTRY}}}', 8, "'a' stands twice"),
    "a field twice": (
        '{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        8,
        "'dtype' stands twice",
    ),
    "very deep": ('{"a":' + "[" * 100_000 + "]" * 100_000 + "}", 0, "nested too deeply"),
    "a number of 10,000 digits": ('{"a":{"dtype":"F32","shape":[' + "9" * 10_000 + "]}}", 0, "limit"),
    "text behind it": ("{} {}", 0, "Extra data"),
}


@pytest.mark.parametrize(("text", "data", "message"), TEXTS.values(), ids=TEXTS)
def test_a_wrong_text_is_refused(text, data, message, tmp_path):
    path = made(tmp_path / "file", text, bytes(data))
    with pytest.raises(CheckpointError, match=message) as caught:
        TensorReader(path)
    assert str(path) in str(caught.value)


def test_nothing_is_read_of_a_header_that_is_longer_than_the_file(tmp_path, monkeypatch):
    lengths = []
    reading = header.read_fully
    monkeypatch.setattr(header, "read_fully", lambda file, length: (lengths.append(length), reading(file, length))[1])
    (tmp_path / "file").write_bytes(struct.pack("<Q", 2**60) + b"{}")
    with pytest.raises(CheckpointError, match="1,152,921,504,606,846,976 bytes is not in a file of 10 bytes"):
        TensorReader(tmp_path / "file")
    assert lengths == [8]


def test_bounds_hold_before_anything_is_parsed(tmp_path, monkeypatch):
    monkeypatch.setattr(header.json, "loads", lambda *_, **__: pytest.fail("parsed"))
    for name, most in (("MAX_BYTES", 10), ("_MAX_OTHER_BYTES", 10), ("_MAX_OF", {b"{": 1})):
        with monkeypatch.context() as patched:
            patched.setattr(header, name, most)
            with pytest.raises(CheckpointError, match="limit"):
                TensorReader(made(tmp_path / "file", f'{{"ä":{ENTRY}}}', bytes(8)))


def test_a_file_that_shrinks_while_its_header_is_read_is_refused(tmp_path, monkeypatch):
    path = of(tmp_path / "file", {"a": ONE})
    reading = header.read_fully

    def shrinking(file: Any, length: int) -> bytes:
        if length != 8:
            path.write_bytes(path.read_bytes()[:20])
        return reading(file, length)

    monkeypatch.setattr(header, "read_fully", shrinking)
    with pytest.raises(CheckpointError, match="became shorter"):
        TensorReader(path)


lengths = st.integers(-1, 3) | st.sampled_from([2**20, 2**63, 1.0, True, None])
places = st.integers(0, 24) | st.sampled_from([-8, 2**63, 0.0, True])
entries = st.fixed_dictionaries(
    {"dtype": st.sampled_from(["F32", "U8", "BF16", "F4", "x"]), "shape": st.lists(lengths, max_size=3)},
    optional={"data_offsets": st.lists(places, min_size=2, max_size=2)},
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tensors=st.dictionaries(st.sampled_from("abc"), entries, max_size=3), size=st.integers(0, 24))
def test_nothing_is_taken_that_the_formats_library_refuses(tensors, size, tmp_path):
    path = of(tmp_path / "file", tensors, bytes(size))
    try:
        ours: object = TensorReader(path).shapes
    except CheckpointError:
        ours = None
    try:
        with safe_open(path, framework="pt") as file:
            theirs: object = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError:
        theirs = None
    assert ours == theirs


def test_a_length_that_looks_like_a_pickle_is_none(tmp_path):
    text = '{"__metadata__":{"a":"' + "x" * (0x0480 - 25) + '"}}'
    assert len(text) == 0x0480
    path = made(tmp_path / "file", text)
    assert path.read_bytes().startswith(b"\x80\x04")
    assert TensorReader(path).shapes == {}
