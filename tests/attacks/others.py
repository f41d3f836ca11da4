"""Attacks on what is no adapter of PEFT's: metadata of distributed checkpoints, files of torch, indices, YAML, states.

Each writes a directory of its own. They are made in less than a second together, and have 2 MB; one has 17 MB more.
"""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from lorica.convert.dcp import METADATA, DistributedWriter

# ---- pickles ---------------------------------------------------------------------------------------------------------

_HUGE = (2**60).to_bytes(8, "little")


#: Why some of the pickles are refused, besides not being metadata.
REASONS = {
    "calls a command": "posix.system, which no checkpoint needs",
    "names by STACK_GLOBAL": "posix.system, which no checkpoint needs",
    "names what is imported": "antigravity.fly_hash, which no checkpoint needs",
    "imports by getattr": "builtins.__import__, which no checkpoint needs",
    "names by the registry of extensions": "the operation EXT1 is not needed",
    "calls by OBJ": "posix.system, which no checkpoint needs",
    "refers to something outside": "it refers to something outside",
    "a key that doubles": "is no key",
    "a member of a set that doubles": "is no key",
    "a key as deep as the stack": "is no key",
    "a value that doubles": "it repeats itself too often",
    "text that doubles": "it repeats itself too often",
    "lists that are copied": "it repeats itself too often",
    "a list in itself": "it is nested too deeply",
    "values inside of values": "it is nested too deeply",
    "lists inside of lists": "it is nested too deeply",
    "a number of many bytes": "a number is too large",
    "17 MB": "are too many",
}


def _calls(name: str, *steps: bytes) -> bytes:
    module, _, leaf = name.rpartition(".")
    return b"\x80\x02c" + f"{module}\n{leaf}\n".encode() + b"".join(steps) + b"."


def pickles(canary: Path) -> dict[str, bytes]:
    """Return programs that run something, or make a reader hang, fill the memory or overflow the stack.

    Args:
        canary: a file that those which run make.
    """
    touch = f"X{chr(len(str(canary)) + 6)}\0\0\0touch {canary}".encode()
    text = f"(S'touch {canary}'\n".encode()
    return {
        "calls a command": _calls("posix.system", touch, b"\x85R"),
        "calls a command, in the first protocol": b"cposix\nsystem\n" + text + b"tR.",
        "calls by INST": text[:0] + b"(S'touch " + str(canary).encode() + b"'\niposix\nsystem\n.",
        "calls by OBJ": b"\x80\x02(cposix\nsystem\n" + touch + b"o.",
        "calls by NEWOBJ": _calls("posix.system", touch, b"\x85\x81"),
        "calls by NEWOBJ_EX": _calls("posix.system", touch, b"\x85}\x92"),
        "names by STACK_GLOBAL": b"\x80\x04\x8c\x05posix\x8c\x06system\x93" + touch + b"\x85R.",
        "names by the registry of extensions": b"\x80\x02\x82\x01.",
        "names what is imported": _calls("antigravity.fly_hash"),
        "imports by getattr": _calls("builtins.getattr", b"cbuiltins\n__import__\nX\x02\0\0\0os\x86R"),
        "fills in a function": _calls("torch.Size", b"N}X\x0c\0\0\0__defaults__K\x07\x85s\x86b"),
        "refers to something outside": b"\x80\x02X\x01\0\0\0xQ.",
        "a place in billions": b"\x80\x02Nr\xff\xff\xff\x7f.",
        "a key that doubles": b"\x80\x02}NN\x86" + b"q\0h\0\x86" * 60 + b"Ns.",
        "a member of a set that doubles": b"\x80\x04\x8f(NN\x86" + b"q\0h\0\x86" * 60 + b"\x90.",
        "a key as deep as the stack": b"\x80\x02}N" + b"\x85" * 200_000 + b"Ns.",
        "a value that doubles": b"\x80\x02NN\x86" + b"q\0h\0\x86" * 60 + b".",
        "text that doubles": b"\x80\x02(cpathlib\nPosixPath\nq\1X\4\0\0\0aaaaq\0" + b"h\1h\0h\0\x86Rq\0" * 40 + b"t.",
        "lists that are copied": b"\x80\x02(cbuiltins\nlist\nq\1]("
        + b"N" * 50_000
        + b"eq\0"
        + b"h\1h\0\x85R" * 3000
        + b"t.",
        "a list in itself": b"\x80\x02]q\0h\0a.",
        "values inside of values": b"\x80\x02N" + b"\x85" * 200_000 + b".",
        "lists inside of lists": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
        "text of exabytes": b"\x80\x04\x8d" + _HUGE + b"x.",
        "bytes of exabytes": b"\x80\x04\x8e" + _HUGE + b"x.",
        "an array of exabytes": b"\x80\x05\x96" + _HUGE + b"x.",
        "a frame of exabytes": b"\x80\x04\x95" + _HUGE + b"N.",
        "a number of gigabytes": b"\x80\x02\x8b\xff\xff\xff\x7f\1.",
        "a number of many digits": b"I" + b"9" * 100_000 + b"\n.",
        "a number of many bytes": b"\x80\x02\x8b\xa0\x86\x01\0" + b"\x7f" * 100_000 + b".",
        "no end": b"\x80\x02N",
        "two ends": b"\x80\x02NN.",
        "nothing": b"",
        "no pickle": b"PK\x03\x04 and so on",
        "17 MB": pickle.dumps(b"\0" * (17 * 1024 * 1024)),
    }


# ---- files of torch --------------------------------------------------------------------------------------------------


class _Storage:
    def __init__(self, count: Any, key: Any, kind: Any) -> None:
        self.pid = ("storage", kind, key, "cpu", count)


class _Tensor:
    """Says of a tensor what is not so."""

    def __init__(
        self, size: Any, stride: Any, *, count: Any = 4, offset: Any = 0, key: Any = "0", kind: Any = torch.FloatStorage
    ) -> None:
        self.args = (_Storage(count, key, kind), offset, size, stride, False, OrderedDict())

    def __reduce__(self) -> tuple[Any, ...]:
        return torch._utils._rebuild_tensor_v2, self.args


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        return value.pid if isinstance(value, _Storage) else None


def _said(value: Any) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, 2).dump(value)
    return buffer.getvalue()


def _packed(data: bytes, members: dict[str, bytes] | None = None, method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in {"data.pkl": data, "data/0": b"\0" * 16, **(members or {})}.items():
            archive.writestr(f"archive/{name}", content)
    return buffer.getvalue()


def _on_one_another() -> bytes:
    """Return an archive with fifty members of a megabyte in one place."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", _said({}))
        archive.writestr("archive/data/0", b"\0" * 1024 * 1024)
        for number in range(1, 50):
            member = copy(archive.filelist[-1])
            member.filename = f"archive/data/{number}"
            archive.filelist.append(member)
    return buffer.getvalue()


def _claimed(*args: Any, **options: Any) -> Callable[[Path], bytes]:
    return lambda _: _packed(_said({"a": _Tensor(*args, **options)}))


_PLAIN = _Tensor((4,), (1,))
#: Files of ``torch.save`` that say what is not so, or would run something, given a file that it would make.
TORCH_FILES: dict[str, Callable[[Path], bytes]] = {
    "runs something": lambda path: _packed(pickles(path)["calls a command"]),
    "more numbers than there are": _claimed((1000,), (1,)),
    "a trillion by steps of zero": _claimed((10**12,), (0,)),
    "beyond the end by a step": _claimed((2,), (10**15,)),
    "beyond the end by an offset": _claimed((4,), (1,), offset=1),
    "before the beginning": _claimed((4,), (1,), offset=-4),
    "backwards": _claimed((4,), (-1,), offset=3),
    "a thousand dimensions": _claimed((1,) * 1000, (1,) * 1000),
    "a size that overflows": _claimed((2**62, 2**62, 0), (1, 1, 1)),
    "sizes that are no numbers": _claimed(("4",), (1.0,)),
    "a storage of terabytes": _claimed((4,), (1,), count=10**12),
    "a storage that is not there": _claimed((4,), (1,), key="7"),
    "a storage outside": _claimed((4,), (1,), key="../../etc/passwd"),
    "a storage of no kind": _claimed((4,), (1,), kind=OrderedDict),
    "a thousand tensors in one storage": lambda _: _packed(
        _said({str(number): _Tensor((2**16,), (1,), count=2**16) for number in range(1000)}), {"data/0": b"\0" * 2**18}
    ),
    "100 MB in 100 kB": lambda _: _packed(_said({"a": _PLAIN}), {"data/1": b"\0" * 10**8}, zipfile.ZIP_DEFLATED),
    "members on one another": lambda _: _on_one_another(),
    "bytes in another order": lambda _: _packed(_said({"a": _PLAIN}), {"byteorder": b"big"}),
    "no pickle": lambda _: _packed(b""),
    "no archive": lambda _: b"PK\x03\x04",
    "half an archive": lambda _: _packed(_said({"a": _PLAIN}))[:-10],
    "a bare pickle": lambda _: pickle.dumps({"a": 1}),
}


# ---- distributed checkpoints -----------------------------------------------------------------------------------------

KEY = "decoder.layers.mlp.linear_fc2.adapter"
_MODEL = {"num_layers": 2, "num_attention_heads": 4, "num_query_groups": 2, "hidden_size": 16}


def checkpoint(folder: Path) -> Any:
    """Write a good one with an adapter of two layers; return its metadata, to be changed."""
    with DistributedWriter(folder) as writer:
        for leaf, shape in (("linear_in", (2, 2, 24)), ("linear_out", (2, 16, 2))):
            for layer in range(2):
                writer.write(f"{KEY}.{leaf}.weight", shape, (layer,), torch.ones(shape[1:]))
    words = {"peft": {"dim": 2, "alpha": 4}, "model": _MODEL}
    (folder / "run_config.yaml").write_text(json.dumps(words))
    return pickle.loads((folder / METADATA).read_bytes())


def _first(metadata: Any) -> tuple[Any, Any, Any]:
    """Return the first tensor's metadata, its first chunk, and where that is."""
    index = next(iter(metadata.storage_data))
    about = metadata.state_dict_metadata[index.fqn]
    return about, about.chunks[0], metadata.storage_data[index]


def halves(folder: Path, second: int) -> None:
    """Write a tensor ``[2, 24]`` in two chunks ``[2, 12]``, of which the other begins at the column ``second``."""
    with DistributedWriter(folder) as writer:
        writer.write("a", (2, 24), (), torch.ones(2, 12))
        writer.write("b", (2, 12), (), torch.ones(2, 12))
    metadata = pickle.loads((folder / METADATA).read_bytes())
    place = metadata.storage_data.pop(MetadataIndex("b", torch.Size((0, 0)), 0))
    [chunk] = metadata.state_dict_metadata.pop("b").chunks
    chunk.offsets = torch.Size((0, second))
    metadata.storage_data[MetadataIndex("a", chunk.offsets, 1)] = place
    metadata.state_dict_metadata["a"].chunks.append(chunk)
    (folder / METADATA).write_bytes(pickle.dumps(metadata))


def _shape(metadata: Any, *shape: int, chunk: tuple[int, ...] | None = None) -> None:
    about, first, _ = _first(metadata)
    about.size, first.sizes = torch.Size(shape), torch.Size(shape if chunk is None else chunk)
    about.chunks = [first]


def _in_one_place(metadata: Any) -> None:
    places = [*metadata.storage_data.values()]
    for place in places[1:]:
        place.offset = places[0].offset


def _set(owner: int, name: str, value: Any) -> Callable[[Any], None]:
    return lambda metadata: setattr(_first(metadata)[owner], name, value)


METADATA_CHANGES: dict[str, Callable[[Any], None]] = {
    "10¹⁸ layers": lambda m: _shape(m, 10**18, 2, 24),
    "10¹⁸ layers of nothing": lambda m: _shape(m, 10**18, 0, 24),
    "10¹⁸ layers of which two are there": lambda m: _shape(m, 10**18, 2, 24, chunk=(1, 2, 24)),
    "a hundred thousand dimensions": lambda m: _shape(m, *[1] * 100_000),
    "chunks in one place of the file": _in_one_place,
    "a file outside": _set(2, "relative_path", "../../../etc/passwd"),
    "a file by its whole name": _set(2, "relative_path", "/etc/passwd"),
    "a name that is no text": _set(2, "relative_path", ["__0_0.distcp"]),
    "a place before the beginning": _set(2, "offset", -1),
    "a place beyond the end": _set(2, "offset", 2**62),
    "a length of exabytes": _set(2, "length", 2**60),
    "a place that is no number": _set(2, "offset", "0"),
    "a size that is no number": _set(0, "size", ("2", "2", "24")),
    "sizes that are no list": _set(1, "sizes", 5),
    "no chunks": _set(0, "chunks", []),
    "chunks that are none": _set(0, "chunks", [1, 2]),
    "no places": lambda m: m.storage_data.clear(),
    "no tensors": lambda m: m.state_dict_metadata.clear(),
}


# ---- shards of neuronx-distributed -----------------------------------------------------------------------------------

_CUT = {"tensor_model_parallel": True, "partition_dim": 0, "partition_stride": 1, "num_partitions": 1}
_LINEAR = {"fused_linear_name": "y", "linear_names": ["a", "b"], "fuse_axis": 0, "original_dims": [2, 2], "tp_size": 1}
_HEADS = {"tp_size": 1, "num_attention_heads": 65536, "num_key_value_heads": 1, "kv_size_multiplier": 1}
_HEADS |= {"q_output_size_per_partition": 65536, "kv_output_size_per_partition": 1, "fuse_qkv": True}
_HEADS |= {f"{part}_projection_name": part for part in ("query", "key", "value", "output", "gqa_qkv")}


def _modules(kind: str, fields: dict[str, Any], count: int = 1) -> dict[str, Any]:
    said = [{"module_fully_qualified_name": f"m{n}", "specs": [[kind, fields]]} for n in range(count)]
    return {"parameters": {}, "model_weight_transformation_specs": said}


def _lies(**about: Any) -> dict[str, Any]:
    return {"parameters": {"x.lora_B.default.weight": _CUT | about}}


#: What may be said of the shards of one rank that has one B of ``[4, 2]``.
NEURON_METADATA: dict[str, Any] = {
    "65,536 ranks": _lies(num_partitions=65536),
    "10¹⁸ ranks": _lies(num_partitions=10**18),
    "10¹⁸ strides": _lies(partition_stride=10**18),
    "a dimension that is not there": _lies(partition_dim=10**18),
    "a dimension before the first": _lies(partition_dim=-1),
    "strides of text": _lies(partition_stride="x"),
    "fused on 65,536 ranks": _modules("FusedLinearsSpec", _LINEAR | {"tp_size": 65536}),
    "fused of 10¹⁸ rows": _modules("FusedLinearsSpec", _LINEAR | {"original_dims": [10**18] * 2}),
    "fused of a million": _modules("FusedLinearsSpec", _LINEAR | {"original_dims": [1] * 1_000_001}),
    "fused on a third axis": _modules("FusedLinearsSpec", _LINEAR | {"fuse_axis": 2}),
    "a thousand layers of 65,536 heads": _modules("GQAQKVColumnParallelLinearSpec", _HEADS, 1000),
    "more copies than heads": _modules("GQAQKVColumnParallelLinearSpec", _HEADS | {"kv_size_multiplier": 3}),
    "a specification that is none": _modules("os.system", _LINEAR),
    "a specification that is a list": {"parameters": {}, "model_weight_transformation_specs": [[[]]]},
    "parameters that are a list": {"parameters": []},
    "parameters that are none": {"parameters": {"x.lora_B.default.weight": None}},
    "nothing": {},
}


# ---- an index of shards ----------------------------------------------------------------------------------------------

_FILE = "shards-00000.safetensors"


def _tensor(shape: Any, *shards: Any, dtype: Any = "float32") -> dict[str, Any]:
    return {"shape": shape, "dtype": dtype, "shards": [*shards]}


INDICES: dict[str, Any] = {
    "shards on one another": _tensor([4, 4], [[0, 0], [4, 2], _FILE], [[0, 1], [4, 2], _FILE]),
    "10¹⁸ numbers": _tensor([10**18], [[0], [10**18], _FILE]),
    "10¹⁸ numbers in two dimensions": _tensor([10**9, 10**9], [[0, 0], [10**9, 10**9], _FILE]),
    "a thousand dimensions": _tensor([1] * 1000, [[0] * 1000, [1] * 1000, _FILE]),
    "a thousand dimensions of 10¹⁸": _tensor([10**18] * 1000, [[0] * 1000, [10**18] * 1000, _FILE]),
    "a file outside": _tensor([4], [[0], [4], "../shards-00000.safetensors"]),
    "a file by its whole name": _tensor([4], [[0], [4], "/etc/passwd"]),
    "a file that is not there": _tensor([4], [[0], [4], "shards-00009.safetensors"]),
    "another shape than the file": _tensor([5], [[0], [5], _FILE]),
    "less than nothing": _tensor([-4], [[0], [-4], _FILE]),
    "true": _tensor([True], [[0], [True], _FILE]),
    "text": _tensor("4", ["0", "4", _FILE]),
    "no such dtype": _tensor([4], [[0], [4], _FILE], dtype="complex64"),
    "a dtype that is a list": _tensor([4], [[0], [4], _FILE], dtype=[]),
    "no list of shards": {"shape": [4], "dtype": "float32", "shards": 7},
    "nothing": None,
}


# ---- YAML ------------------------------------------------------------------------------------------------------------

_NINE = "\n".join(f"c{n}: &c{n} [{','.join([f'*c{n - 1}' if n else 'x'] * 9)}]" for n in range(12))
_MERGED = "\n".join(f"m{n}: &m{n} {{<<: [{f'*m{n - 1}, *m{n - 1}' if n else '{a: 1}'}]}}" for n in range(40))
YAMLS: dict[str, str] = {
    "a trillion values by aliases": _NINE,
    "a trillion keys by merging": _MERGED,
    "an alias in itself": "a: &a [*a]",
    "100,000 lists inside of lists": "[" * 100_000,
    "mappings inside of mappings": "{a: " * 5000,
    "a number of sexagesimal places": "a: 1" + ":1" * 50_000,
    "a number of many digits": "a: " + "9" * 5000,
    "a day that is none": "a: 2024-13-45",
    "a key twice": "a: 1\na: 2",
    "an object": "!!python/object/apply:os.system ['true']",
    "a name": "a: !!python/name:os.system",
    "bytes": "a: !!binary AAAA",
    "20,000 values": "- a\n" * 20_000,
    "a million characters": "a: " + "x" * 1_000_000,
    "NUL": "a: \0",
    "a key that is a list": "? [a]\n: b",
    "no text": "a: \ud800",
}
