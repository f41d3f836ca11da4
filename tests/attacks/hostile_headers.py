"""Hostile contents of a file of weights: each is wrong in one way, and says which."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from good_adapter import FIRST_A, FIRST_B, good_tensors
from safetensors.torch import save


def safetensors(header: bytes | str | dict[str, Any], data: bytes = b"", length: int | None = None) -> bytes:
    """Return a file with any header, whether it is one or not."""
    raw = header if isinstance(header, bytes) else (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def good_header() -> tuple[dict[str, Any], bytes]:
    raw = save(good_tensors())
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def _changed(name: str = FIRST_A, **fields: Any) -> Callable[[], bytes]:
    def content() -> bytes:
        header, data = good_header()
        header[name] |= fields
        return safetensors(header, data)

    return content


def _renamed(old: str, new: str) -> Callable[[], bytes]:
    def content() -> bytes:
        header, data = good_header()
        return safetensors({new if name == old else name: value for name, value in header.items()}, data)

    return content


def _moved(by: int) -> bytes:
    """Move all tensors but the first."""
    header, data = good_header()
    for name, value in header.items():
        if value["data_offsets"][0]:
            header[name]["data_offsets"] = [place + by for place in value["data_offsets"]]
    return safetensors(header, data + bytes(max(by, 0)))


def _holding(value: float, name: str = FIRST_A) -> Callable[[], bytes]:
    def content() -> bytes:
        tensors = good_tensors()
        tensors[name].view(-1)[-1] = value
        return save(tensors)

    return content


def many_tensors(count: int, *, width: int = 0, stem: str = "") -> bytes:
    entries = (
        f'"{stem}{number:0{width}}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for number in range(count)
    )
    return safetensors("{" + ",".join(entries) + "}")


def _twice() -> bytes:
    entry = '"dtype":"F32","shape":[0],"data_offsets":[0,0]'
    return safetensors(f'{{"{FIRST_A}":{{{entry}}},"{FIRST_A}":{{{entry}}}}}')


class _Payload:
    """Makes a directory when it is unpickled."""

    def __init__(self, canary: str) -> None:
        self._canary = canary

    def __reduce__(self) -> Any:
        return os.mkdir, (self._canary,)


def pickled(folder: Path) -> bytes:
    """Return a pickle that makes the directory ``canary`` beside ``folder`` when it is loaded."""
    return pickle.dumps(_Payload(str(folder.parent / "canary")))


def torch_pickle(path: Path) -> None:
    torch.save({FIRST_A: _Payload(str(path.parent.parent / "canary"))}, path)


_ZEROS = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
CONTENTS: dict[str, tuple[Callable[[], bytes], str]] = {
    "a header of 2^60 bytes": (lambda: safetensors("{}", length=2**60), "not in a file of 10 bytes"),
    "a header of 2^64-1 bytes": (lambda: safetensors("{}", length=2**64 - 1), "not in a file of 10 bytes"),
    "a header one byte longer than the file": (lambda: safetensors("{}", length=3), "not in a file of 10 bytes"),
    "a million empty tensors in 67 MB": (lambda: many_tensors(1_000_000, width=17), "too large"),
    "a million empty tensors": (lambda: many_tensors(600_000), "too large|too many tensors"),
    "one name of 20 MB": (lambda: safetensors({"a" * 20_000_000: _ZEROS}), "a{100}.*: a name"),
    "a shape of two million lengths": (
        lambda: safetensors({FIRST_A: _ZEROS | {"shape": [0] * 2_000_000}}),
        "says too much",
    ),
    "ten million lists": (lambda: safetensors('{"a":[' + "[]," * 10_000_000 + "[]]}"), "says too much"),
    "a header that is nested": (lambda: safetensors("[" * 100_000 + "]" * 100_000), "nested too deeply"),
    "a header that is a list": (lambda: safetensors("[]"), "no JSON object"),
    "a header that is no JSON": (lambda: safetensors("{"), "not a readable"),
    "a header in UTF-16": (lambda: safetensors("{}".encode("utf-16")), "not a readable"),
    "a tensor twice": (_twice, FIRST_A),
    "a gap": (lambda: _moved(4), "lora_.*gap"),
    "an overlap": (lambda: _moved(-4), "lora_.*overlap"),
    "bytes behind the tensors": (lambda: save(good_tensors()) + b"x", "end at byte"),
    "an offset beyond the file": (_changed(data_offsets=[0, 2**40]), "shape"),
    "a negative offset": (_changed(data_offsets=[-256, 0]), f"{FIRST_A}: -256"),
    "offsets that go back": (_changed(data_offsets=[256, 0]), FIRST_A),
    "half a byte": (_changed(data_offsets=[0, 256.0]), f"{FIRST_A}: 256.0"),
    "a shape whose product overflows": (_changed(shape=[2**33, 2**33]), FIRST_A),
    "a shape whose product overflows to its bytes": (_changed(shape=[2**32, 2**32, 4, 16]), FIRST_A),
    "an empty shape that overflows": (_changed(shape=[0, 2**47, 2**47], data_offsets=[0, 0]), FIRST_A),
    "a length of 4000 digits": (_changed(shape=[10**3999]), FIRST_A),
    "a length of 10,000 digits": (
        lambda: safetensors(f'{{"{FIRST_A}":{{"dtype":"F32","shape":[{"9" * 10_000}]}}}}'),
        "not a readable",
    ),
    "a dtype that is none": (_changed(dtype="F33"), f"{FIRST_A}: dtype F33"),
    "a shape that is no list": (_changed(shape="4, 16"), f"{FIRST_A}: shape"),
    "a field too many": (_changed(__reduce__="os.system"), f"{FIRST_A}: needs"),
    "a tensor that is a number": (lambda: safetensors({FIRST_A: 1}), f"{FIRST_A}: needs"),
    "metadata that is a tree": (lambda: safetensors({"__metadata__": {"a": {"b": []}}}), "__metadata__"),
    "a name with NUL": (_renamed(FIRST_A, f"{FIRST_A}\0"), r"lora_A.weight\\x00: a name"),
    "a name that clears the screen": (_renamed(FIRST_A, "\x1b[2J"), r"\\x1b\[2J: a name"),
    "a name with half a character": (_renamed(FIRST_A, "\ud800"), r"\\ud800: a name"),
    "NaN": (_holding(float("nan")), f"{FIRST_A} holds NaN"),
    "infinity in the last tensor": (
        _holding(float("inf"), [*sorted(good_tensors())][-1]),
        "layers.1.self_attn.v_proj.lora_B.weight holds NaN or infinity",
    ),
    "minus infinity": (_holding(-float("inf"), FIRST_B), f"{FIRST_B} holds NaN or infinity"),
}
